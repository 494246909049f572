"""Where drafts come from: text seen before, or a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from infopt.protocols import Sampling
from infopt.runtime.sampling import draw, probabilities
from infopt.runtime.steps import Room, Run, Step

#: Tokens that a drafting model may lack of a text before it reads them by themselves.
BEHIND = 16


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next. `proposed[i]`: what token i was drawn from; None where it could only be that one.

    `kind`: drafts of a kind are accepted alike (prompt lookup: how long a stretch matched).
    """

    tokens: tuple[int, ...] = ()
    proposed: tuple[torch.Tensor | None, ...] = ()
    kind: int = 0


@dataclass(frozen=True)
class Wanted:
    """A row that takes a draft of at most `most` tokens to follow `ids`: its prompt and output so far.

    `state` is what the drafter's `open` gave the row; `source` and `sampling` are those that the row itself draws with.
    """

    state: Any
    ids: Sequence[int]
    most: int
    source: torch.Generator
    sampling: Sampling


class Drafter(Protocol):
    """Drafts for all rows of a loop."""

    is_free: bool
    """Whether a long draft costs what a short one does, so that how much of it is tried can be decided afterwards."""

    def open(self) -> Any:
        """What is kept for a row."""
        ...

    def require(self, rooms: Sequence[Room], beside: float = 0) -> None:
        """Refuses, before anything is computed, what memory will not hold of the target's rows. `beside`: bytes that these take.

        Raises InputError.
        """
        ...

    def catch_up(self, wanted: Sequence[Wanted]) -> None:
        """Reads what a drafter has not seen of long texts, a prompt for one, which is no cost of a drafted token."""
        ...

    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]: ...

    def close(self, state: Any) -> None: ...


@dataclass
class Seen:
    """Where each stretch of tokens last ended in a row's text, as far as `known` tokens of it."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    known: int = 0


class PromptLookup:
    """What followed the last time that the text's last words appeared (arXiv 2304.04487; Saxena, prompt lookup decoding).

    The longest stretch of `longest` to `shortest` tokens that occurred before is continued as it was then.
    """

    is_free = True

    def __init__(self, longest: int = 5, shortest: int = 2) -> None:
        self.sizes = range(longest, shortest - 1, -1)

    def open(self) -> Seen:
        return Seen()

    def require(self, rooms: Sequence[Room], beside: float = 0) -> None: ...

    def catch_up(self, wanted: Sequence[Wanted]) -> None: ...

    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        return [self._proposed(each.state, each.ids, each.most) for each in wanted]

    def _proposed(self, seen: Seen, ids: Sequence[int], most: int) -> Draft:
        for end in range(seen.known + 1, len(ids)):  # stretches that something follows
            for size in self.sizes:
                if size <= end:
                    seen.ends[tuple(ids[end - size : end])] = end
        seen.known = max(seen.known, len(ids) - 1)
        for size in self.sizes:
            found = seen.ends.get(tuple(ids[-size:])) if size < len(ids) else None
            if found is not None and most > 0:
                period = len(ids) - found  # what is copied may reach into the copy, as in LZ77: a loop goes on
                tokens = tuple(ids[found + i % period] for i in range(most))
                return Draft(tokens, (None,) * most, size)
        return Draft()

    def close(self, state: Seen) -> None:
        state.ends.clear()


@dataclass
class Ahead:
    """A row's text in the model that drafts: its sequence there, and the tokens in it.

    `kept`: tokens at the front that are the row's, which only grows: what is drafted and refused lies behind it.
    """

    sequence: Any
    ids: list[int] = field(default_factory=list)
    kept: int = 0
    largest: int = 0
    """Of the row's tokens, as far as `kept`."""


class ModelDraft:
    """A model of its own, or the first layers of the target, that goes ahead token by token, all rows together.

    What a token is drawn from is kept, so that sampling stays exact; greedy drafts are the model's likeliest tokens.
    `vocabulary`: of the target, where models of one tokenizer pad their tables to different sizes; what only one of the two has
    is never drafted, nor anything after it.
    """

    is_free = False

    def __init__(self, step: Step, vocabulary: int | None = None) -> None:
        self.step, self.vocabulary = step, vocabulary or step.vocabulary
        self.shared = min(step.vocabulary, self.vocabulary)

    def open(self) -> Ahead:
        return Ahead(self.step.open())

    def require(self, rooms: Sequence[Room], beside: float = 0) -> None:
        # Each row is read by itself here: nothing is shared.
        self.step.require([Room(min(room.tokens, self.step.context), room.sequences) for room in rooms], beside)
        self.step.prepare(sum(room.sequences for room in rooms), 2)  # else the first drafts would pay for it

    def catch_up(self, wanted: Sequence[Wanted]) -> None:
        behind = [each for each in wanted if self._most(each) > 0 and len(each.ids) - len(each.state.ids) > BEHIND]
        runs = []
        for each in behind:
            same = self._cut_to(each)
            each.state.ids = list(each.ids[:-1])
            runs.append(Run(each.state.sequence, each.ids[same:-1]))
        if runs:
            self.step.run(runs, want_logits=False)

    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        going = [_Going(each, self._most(each), self.shared, self.vocabulary) for each in wanted]
        for row in going:
            if row.most > 0:
                row.fed = list(row.wanted.ids[self._cut_to(row.wanted) :])
        while active := [row for row in going if len(row.tokens) < row.most]:
            greedy = self.shared == self.step.vocabulary and all(row.is_greedy for row in active)
            found = self.step.run([Run(row.wanted.state.sequence, row.fed) for row in active], want_logits=not greedy)
            for index, row in enumerate(active):
                row.take(found.tokens[index], None if found.logits is None else found.logits[index])
        return [Draft(tuple(row.tokens), tuple(row.proposed)) for row in going]

    def _most(self, wanted: Wanted) -> int:
        state, ids = wanted.state, wanted.ids
        known = max(state.largest, *ids[state.kept :]) < self.step.vocabulary
        return min(wanted.most, self.step.context - len(ids)) if known else 0

    def _cut_to(self, wanted: Wanted) -> int:
        """How many tokens of the row's text its sequence here has already; what else it has is forgotten."""
        state, ids = wanted.state, wanted.ids
        most = min(len(state.ids), len(ids) - 1)
        same = next((i for i in range(state.kept, most) if state.ids[i] != ids[i]), most)
        self.step.cut(state.sequence, same)
        state.ids[same:] = ids[same:]
        state.largest, state.kept = max([state.largest, *ids[state.kept : same]]), same
        return same

    def close(self, state: Ahead) -> None:
        self.step.close(state.sequence)


class _Going:
    """A row's draft in the making."""

    def __init__(self, wanted: Wanted, most: int, shared: int, vocabulary: int) -> None:
        self.wanted, self.most, self.shared, self.vocabulary = wanted, most, shared, vocabulary
        self.is_greedy = wanted.sampling.temperature == 0 and wanted.sampling.repetition_penalty == 1
        self.tokens: list[int] = []
        self.proposed: list[torch.Tensor | None] = []
        self.fed: list[int] = []

    def take(self, likeliest: int, logits: torch.Tensor | None) -> None:
        """The next token; the last one of a draft is never fed, so the sequence does not have it."""
        weights = None
        if not self.is_greedy:
            assert logits is not None
            weights = probabilities(logits[: self.shared], self.wanted.sampling, [*self.wanted.ids, *self.tokens])
            weights = torch.nn.functional.pad(weights, (0, self.vocabulary - self.shared))
        elif logits is not None:
            likeliest = int(logits[: self.shared].argmax())
        self.tokens.append(likeliest if weights is None else draw(weights, self.wanted.source))
        self.proposed.append(weights)
        self.fed = self.tokens[-1:]
        if len(self.tokens) < self.most:
            self.wanted.state.ids.append(self.tokens[-1])
