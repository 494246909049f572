"""What every way of running a model offers the loop: sequences that grow by tokens, and the logits that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

#: New tokens of one sequence from which on their sums may be made in ways that few tokens do not allow, if the logits after
#: all but the last are not wanted: drafts that are verified, and texts that are scored, are computed as single tokens are.
PROMPT = 32


@dataclass(frozen=True)
class Run:
    """New tokens of one sequence, and whether the logits after each of them are wanted, or after the last alone."""

    sequence: Any
    ids: Sequence[int]
    all_logits: bool = False
    goes_on: bool = False
    """Whether the likeliest token is likely to be run next, so that a GPU may begin with it before it is asked."""


@dataclass(frozen=True)
class Room:
    """What `sequences` of `tokens` positions will want, whose first `shared` positions are the same and forked from one."""

    tokens: int
    sequences: int = 1
    shared: int = 0


@dataclass(frozen=True)
class Output:
    """For every position asked for, run after run: the likeliest token, by how much (logits), and all logits if wanted."""

    tokens: list[int]
    margins: list[float]
    logits: torch.Tensor | None
    """float32 [positions, vocabulary]; valid until the next step."""


class Step(Protocol):
    """One way of running a model. `name` is named in reports: whole, swapped or stock."""

    name: str
    vocabulary: int
    context: int

    @property
    def remarks(self) -> tuple[str, ...]:
        """What it found out while it ran, a line each."""
        ...

    def open(self) -> Any:
        """A new, empty sequence."""
        ...

    def length(self, sequence: Any) -> int: ...

    def require(self, rooms: Sequence[Room], beside: float = 0) -> float:
        """Bytes that keys and values of `rooms` will take. `beside`: what other models have been promised of the same budget.

        Refuses, before anything is computed, what memory will not hold. Raises InputError.
        """
        ...

    def prepare(self, rows: int, most: int) -> None:
        """Makes ready what steps of `rows` sequences with up to `most` new tokens each will need, so that none of them waits."""
        ...

    def run(self, runs: Sequence[Run], want_logits: bool = True) -> Output:
        """Raises InputError where a logit is not finite, naming the layer."""
        ...

    def cut(self, sequence: Any, length: int) -> None:
        """Forgets positions from `length` on."""
        ...

    def fork(self, sequence: Any) -> Any:
        """Another sequence with the same tokens; what both have is computed, and where possible kept, once."""
        ...

    def close(self, sequence: Any) -> None: ...
