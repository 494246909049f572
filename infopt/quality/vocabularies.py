"""Two models' tokens: of one numbering, or the candidate's a part of the reference's with numbers of its own.

Token ids are compared everywhere in fidelity, so models of other vocabularies are refused there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from infopt.errors import InputError
from infopt.model.same_tokens import SPARE_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Part:
    """A candidate's vocabulary that is a part of the reference's. `ids[i]`: what the reference calls its token i.

    A token that it lacks, it reads as the pieces that `spell` gives, in its own numbers. `of`: the reference's tokens.
    """

    def __init__(self, ids: Sequence[int], of: int, spell: Callable[[int], Sequence[int]]) -> None:
        self.ids = tuple(ids)
        self.described = f"the candidate has {len(self.ids)} of {of}"
        self._spell = spell
        self._known = {old: (new,) for new, old in enumerate(self.ids)}
        self._spelled: dict[int, tuple[int, ...]] = {}

    def pieces(self, token: int) -> tuple[int, ...]:
        """The candidate's tokens for one of the reference's."""
        if token in self._known:
            return self._known[token]
        if token not in self._spelled:
            self._spelled[token] = tuple(self._spell(token))
        return self._spelled[token]

    def lacking(self, windows: Sequence[Sequence[int]]) -> int:
        """How many tokens of these windows of the reference's the candidate does not have."""
        return sum(token not in self._known for window in windows for token in window)


def is_same(reference: PreTrainedTokenizerBase, candidate: PreTrainedTokenizerBase) -> bool:
    """Whether an id means the same to both."""
    try:
        return between(reference, candidate) is None
    except InputError:
        return False


def between(reference: PreTrainedTokenizerBase, candidate: PreTrainedTokenizerBase) -> Part | None:
    """How the candidate's tokens lie in the reference's; None where both have nearly the same, with the same numbers.

    Raises InputError for vocabularies that have nothing to do with each other.
    """
    ours, theirs = reference.get_vocab(), candidate.get_vocab()
    differing = sum(token in ours and ours[token] != index for token, index in theirs.items())
    if not differing and len(ours.keys() - theirs.keys()) <= SPARE_TOKENS * len(ours):
        return None
    missing = len(theirs.keys() - ours.keys())
    backend = getattr(candidate, "backend_tokenizer", None)
    if missing or backend is None or sorted(theirs.values()) != list(range(len(theirs))):
        raise InputError(
            f"the vocabularies differ: of the candidate's {len(theirs)} tokens {differing} have another number in the reference, "
            f"{missing} are not there",
            hint="compare models that share a tokenizer",
        )
    names = {index: token for token, index in ours.items()}

    def spell(token: int) -> list[int]:
        pieces = [piece.id for piece in backend.model.tokenize(names[token])] if token in names else []
        if not pieces:
            raise InputError(f"the vocabularies differ: the candidate cannot read the reference's token {token}")
        return pieces

    return Part([ours[token] for token in sorted(theirs, key=theirs.__getitem__)], len(ours), spell)
