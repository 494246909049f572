"""Whether an id means the same to two tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPARE_TOKENS = 0.01
"""Share of a model's tokens that another may lack: releases of one tokenizer differ by a few special ones."""


def difference(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """In a few words, what keeps `other` from standing in for `own`; None where nothing does."""
    ours, theirs = own.get_vocab(), other.get_vocab()
    differing = sum(theirs.get(token, index) != index for token, index in ours.items())
    missing = len(ours.keys() - theirs.keys())
    if not differing and missing <= len(ours) * SPARE_TOKENS:
        return None
    return f"{len(theirs)} against {len(ours)}; {differing} have another number, {missing} are not there"
