"""Where drafts come from: text seen before, or a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from infopt.protocols import Sampling
from infopt.runtime.sampling import draw, probabilities
from infopt.runtime.steps import Run, Step


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next. `proposed[i]`: what token i was drawn from; None where it could only be that one.

    `kind`: drafts of a kind are accepted alike (prompt lookup: how long a stretch matched).
    """

    tokens: tuple[int, ...] = ()
    proposed: tuple[torch.Tensor | None, ...] = ()
    kind: int = 0


class Drafter(Protocol):
    """Drafts for one sequence."""

    def propose(self, ids: Sequence[int], most: int, source: torch.Generator) -> Draft:
        """At most `most` tokens to follow `ids`: prompt and output so far."""
        ...

    def close(self) -> None: ...


class PromptLookup:
    """What followed the last time that the text's last words appeared (arXiv 2304.04487; Saxena, prompt lookup decoding).

    The longest stretch of `longest` to `shortest` tokens that occurred before is continued as it was then.
    """

    def __init__(self, longest: int = 5, shortest: int = 2) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = 0

    def propose(self, ids: Sequence[int], most: int, source: torch.Generator) -> Draft:
        for end in range(self._known + 1, len(ids)):  # stretches that something follows
            for size in self.sizes:
                if size <= end:
                    self._ends[tuple(ids[end - size : end])] = end
        self._known = max(self._known, len(ids) - 1)
        for size in self.sizes:
            found = self._ends.get(tuple(ids[-size:])) if size < len(ids) else None
            if found is not None and most > 0:
                tokens = tuple(ids[found : found + most])
                return Draft(tokens, (None,) * len(tokens), size)
        return Draft()

    def close(self) -> None:
        self._ends.clear()


class ModelDraft:
    """A model of its own, or the first layers of the target, that goes ahead token by token.

    What it is drawn from is kept, so that sampling stays exact; greedy drafts are its likeliest tokens.
    """

    def __init__(self, step: Step, sampling: Sampling) -> None:
        self.step, self.sampling = step, sampling
        self._sequence: Any = step.open()
        self._ids: list[int] = []

    def propose(self, ids: Sequence[int], most: int, source: torch.Generator) -> Draft:
        most = min(most, self.step.context - len(ids))
        if most < 1:
            return Draft()
        same = next((i for i, (a, b) in enumerate(zip(self._ids, ids, strict=False)) if a != b), min(len(self._ids), len(ids)))
        same = min(same, len(ids) - 1)
        self.step.cut(self._sequence, same)
        is_greedy = self.sampling.temperature == 0 and self.sampling.repetition_penalty == 1
        tokens: list[int] = []
        proposed: list[torch.Tensor | None] = []
        new = list(ids[same:])
        while True:
            found = self.step.run([Run(self._sequence, new)], want_logits=not is_greedy)
            if is_greedy:
                tokens.append(found.tokens[0])
                proposed.append(None)
            else:
                assert found.logits is not None
                weights = probabilities(found.logits[0], self.sampling, [*ids, *tokens])
                tokens.append(draw(weights, source))
                proposed.append(weights)
            if len(tokens) >= most:
                break
            new = tokens[-1:]
        self._ids = [*ids, *tokens[:-1]]
        return Draft(tuple(tokens), tuple(proposed))

    def close(self) -> None:
        self.step.close(self._sequence)
