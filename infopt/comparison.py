"""What a comparison leaves behind: `compare.json`, every arm against the first, with its judgements.

    results/<utc>-<name>-<hash>/
        compare.json    this file's `Comparison`, the one authoritative document
        report.md, report.html, …   derived; `infopt results export` renders them again

Every candidate's judgements stand under its label; `Comparison.baseline` names the arm they refer to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from infopt.judgement import Judgement
from infopt.result import Arm, Record, Value, read_record


class ArmResult(Record):
    """One arm's figures. `error` says why an arm has none (it ran out of memory, its engine died)."""

    label: str
    arm: Arm
    figures: dict[str, Value] = Field(default_factory=dict)
    """By key: `tpot_s.p50`, `weights_bytes`, `kld.mean`."""
    quality: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, Any] = Field(default_factory=dict)
    blocks: dict[str, tuple[float | None, ...]] = Field(default_factory=dict)
    """By key: one value per block in the order of pairs, so that index i of two arms is one pair; None is missing."""
    error: str | None = None


class Comparison(Record):
    schema_version: Literal[1] = 1
    id: str
    created_utc: str
    is_complete: bool
    incomplete_reason: str | None = None
    mode: Literal["live", "stored"]
    infopt_version: str
    environment: dict[str, Any] = Field(default_factory=dict)
    """The machine and the libraries, as in `Run`."""
    workload: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    baseline: str
    """Label of the first arm, which every other arm is judged against."""
    arms: tuple[ArmResult, ...]
    judgements: dict[str, tuple[Judgement, ...]] = Field(default_factory=dict)
    """By the candidate's label, in the order of `arms`."""
    self_test: tuple[Judgement, ...] = ()
    """The baseline against itself (A/A): what this machine's noise alone would have shown."""
    warnings: tuple[str, ...] = ()
    pairs: int
    exit_code: int

    @property
    def candidates(self) -> tuple[ArmResult, ...]:
        return tuple(arm for arm in self.arms if arm.label != self.baseline)

    def arm(self, label: str) -> ArmResult:
        """The arm of that label. Raises KeyError."""
        for each in self.arms:
            if each.label == label:
                return each
        raise KeyError(label)


def read_comparison(folder: Path) -> Comparison:
    """The comparison stored in `folder`. Raises InputError when it is missing, broken or of another schema."""
    return read_record(folder / "compare.json", Comparison)
