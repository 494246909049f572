"""What the flags of a command say, as data that parent and worker processes share. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WARMUP_CAP = 10
"""Iterations after which an arm's first block begins, still trending or not."""
WARMUP_LATER, WARMUP_FRESH = 1, 3
"""Iterations of later blocks: in a process that stayed up, whose caches and clocks are at rest, and in a fresh one."""


def portable(path: str) -> str:
    """A path as results keep it: one typed in full becomes relative to here, or its last part, since results travel."""
    if not Path(path).is_absolute():
        return path
    return str(Path(path).relative_to(Path.cwd()) if Path(path).is_relative_to(Path.cwd()) else Path(path).name)


@dataclass(frozen=True)
class LoadOptions:
    """How models are opened, the same for every arm of a command."""

    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    allow_leakage: bool = False
    """Judge on what calibration has seen, and say so, rather than refuse."""


@dataclass(frozen=True)
class WorkloadSpec:
    """`prompts_file` None: fixed shape, prompts cut from the bundled text; else the user's prompts, in order."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    batch: int = 1
    requests: int = 3
    prompts_file: str | None = None
    ignore_eos: bool = True

    @property
    def name(self) -> str:
        if self.prompts_file:
            return Path(self.prompts_file).stem
        return f"{self.prompt_tokens}+{self.new_tokens}x{self.batch}"


@dataclass(frozen=True)
class QualitySettings:
    """How much of each tier; 0 leaves it out. `text`, `prompts_file`, `choices_file` None: the bundled ones."""

    fidelity_tokens: int = 4096
    choice_items: int = 60
    behaviour_prompts: int = 20
    text: str | None = None
    prompts_file: str | None = None
    choices_file: str | None = None


@dataclass(frozen=True)
class Settings:
    """What `bench` and `compare` have in common. `objectives`: upper limits per request, for goodput."""

    price_per_hour: float | None = None
    utilisation: float = 1.0
    objectives: dict[str, float] = field(default_factory=dict)
    quality: QualitySettings | None = field(default_factory=QualitySettings)
    warmup_cap: int = WARMUP_CAP

    def as_dict(self) -> dict[str, Any]:
        """For `run.json`."""
        found = asdict(self)
        for key in ("text", "prompts_file", "choices_file"):
            if found["quality"] and found["quality"][key]:
                found["quality"][key] = portable(found["quality"][key])
        return found
