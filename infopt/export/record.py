"""What an export leaves behind for its user: what is in it, what changed on the way, and how it was checked."""

from __future__ import annotations

from infopt.result import Record


class LoadBackCheck(Record):
    """The export, opened in `reader`, against the model that it should be, on the same tokens.

    `tolerance` None: no figure decides, `top1_floor` does.
    """

    reader: str
    tokens: int
    max_abs_logit_difference: float
    tolerance: float | None
    top1_agreement: float
    top1_floor: float | None = None
    texts: int
    """Texts that its tokenizer encodes as the source's does."""
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
    stored: dict[str, tuple[str, ...]]
    """Storage type → the tensors stored in it; empty where the format's builder does not say."""
    exact: int
    """Matrices that are stored bit for bit as the source has them."""
    bytes: int
    checks: tuple[LoadBackCheck, ...]
    against_source: Against
    notes: tuple[str, ...]
    versions: dict[str, str]
