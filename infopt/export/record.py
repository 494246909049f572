"""What an export leaves behind for its user: what is in it, what changed on the way, and how it was checked."""

from __future__ import annotations

from infopt.result import Record


class LoadBackCheck(Record):
    """The export, opened in `reader`, against the model that it should be, on the same tokens.

    With a `tolerance` that is what was written, weight for weight. None: it is the source, and `top1_floor` decides; where
    that is None too, the check is told and nothing more.
    """

    reader: str
    refusal: str | None = None
    """Why this reader does not open it; the figures are None then."""
    tokens: int
    max_abs_logit_difference: float | None
    tolerance: float | None = None
    top1_agreement: float | None
    top1_floor: float | None = None
    texts: int
    """Texts that its tokenizer encodes as the source's does, of `texts_tried`."""
    texts_tried: int
    answers: int | None = None
    """Prompts that were answered greedily in `reader`; `same_answers`: how many in the source's own tokens."""
    same_answers: int | None = None


class Against(Record):
    """The export against its source as it was before: what the storage type costs."""

    max_abs_logit_difference: float
    top1_agreement: float
    perplexity_ratio: float


class Export(Record):
    schema_version: int = 1
    created_utc: str
    infopt_version: str
    to: str
    type: str
    path: str
    source: str
    source_description: str
    source_hash: str
    calibration_hash: str | None = None
    """Of the text that the source was calibrated on; the fingerprint of that text lies beside the export then."""
    stored: dict[str, tuple[str, ...]]
    """Storage type → the tensors stored in it; empty where the format's builder does not say."""
    exact: int
    """Matrices that are stored bit for bit as the source has them."""
    bytes: int
    checks: tuple[LoadBackCheck, ...]
    against_source: Against
    notes: tuple[str, ...]
    versions: dict[str, str]
