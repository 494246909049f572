"""The artifact folder: weights that load elsewhere, and `infopt.json`, which says how they came to be.

DIR/
    *.safetensors, config.json, tokenizer…   as plain transformers loads them
    infopt.json                              this file's `Artifact`
    recipe.yaml                              resolved; its run-time half applies when the artifact is benched
    README.md                                the model card
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from infopt.errors import InputError
from infopt.result import Record, read_record

FILE = "infopt.json"


class StepQuality(Record):
    """The model after a step against the model before the first, on `tokens` tokens of bundled text. KLD in nats.

    After `trim_vocab` KLD is over the tokens that both have.
    """

    tokens: int
    kld_mean: float
    kld_low: float | None
    kld_high: float | None
    ppl_ratio: float
    ppl_ratio_low: float | None
    ppl_ratio_high: float | None
    top1_agreement: float


class StepRecord(Record):
    """One weight step as it really went. `peak_bytes` is resident host memory, or device memory on a GPU."""

    name: str
    options: dict[str, Any]
    seconds: float
    peak_bytes: int | None
    weights_bytes: int | None = None
    """What the model's weights would take on disk after this step."""
    quality: StepQuality | None = None
    """None where the recipe has one step only, or running the model in between would have spoilt it."""
    is_at_load: bool
    """True: there is no file format for it; the artifact holds the weights from before and repeats it when opened."""


class LoadBack(Record):
    """The saved folder, opened again the way its users will, against the model in memory on the same tokens."""

    reader: str | None = None
    """Who opened it, with its version."""
    refusal: str | None = None
    """Why this reader does not open it; the figures are None then."""
    tokens: int
    max_abs_logit_difference: float | None
    tolerance: float
    top1_agreement: float | None
    rounded_cache_logit_difference: float | None = None
    """Largest |logit| difference with keys and values rounded as the file says, which the other figures leave out."""


class Artifact(Record):
    schema_version: Literal[1] = 1
    created_utc: str
    infopt_version: str
    reference: str
    """As the user wrote it: `demo`, a hub id, a folder."""
    reference_description: str
    reference_hash: str
    revision: str | None = None
    recipe: dict[str, Any]
    steps: tuple[StepRecord, ...]
    load_back: tuple[LoadBack, ...]
    """First by plain transformers, then, where infopt opens it in its own way, by infopt."""
    calibration_hash: str | None
    leaks: tuple[str, ...] = ()
    """What its calibration text shares with infopt's own evaluation sets, where that was allowed."""
    notes: tuple[str, ...] = ()
    """What its user should know."""
    seed: int
    versions: dict[str, str]
    bytes_before: int
    bytes_after: int
    content_hash: str | None = None

    @property
    def at_load(self) -> tuple[int, ...]:
        """Indices of the steps that run again when the artifact is opened."""
        return tuple(i for i, step in enumerate(self.steps) if step.is_at_load)


def is_artifact(folder: Path) -> bool:
    return (folder.expanduser() / FILE).is_file()


def require_reference(model: str) -> None:
    """Raises InputError for an artifact, where weights that nothing was done to yet are wanted."""
    if is_artifact(Path(model)):
        source = read_artifact(Path(model)).reference
        raise InputError(
            f"{model} is already optimized; optimize starts from a reference model", hint=f"infopt optimize {source} …"
        )


def read_artifact(folder: Path) -> Artifact:
    """Raises InputError when `infopt.json` is missing, broken or of another schema."""
    return read_record(folder.expanduser() / FILE, Artifact)
