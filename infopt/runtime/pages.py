"""Keys and values in pages that sequences share: a fork copies only the page it goes on writing to."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from infopt import units
from infopt.errors import InputError
from infopt.kernels.arena import Arena
from infopt.runtime.steps import Room

PAGE = 64
"""Positions of a page."""


@dataclass
class Sequence:
    """Positions 0 … length − 1 have keys and values; `pages` may hold more."""

    length: int = 0
    pages: list[int] = field(default_factory=list)
    table: Any = None
    """Where its pages are, made anew whenever they change."""


@dataclass
class Budget:
    """Bytes of keys and values that a model and those that draft for it may take together, and those that they have taken."""

    most: float = 1 << 40
    taken: float = 0

    def require(self, needed: float, rooms: Iterable[Room], beside: float = 0) -> None:
        """Refuses what will not fit, before anything is computed. Raises InputError with both figures.

        `needed`: bytes beyond those taken; `beside`: of them, what others have been promised.
        """
        left = self.most - self.taken - beside
        if needed > left:
            texts = " and ".join(f"{count} × {tokens}" for tokens, count in _counted(rooms))
            raise InputError(
                f"keys and values of {texts} tokens take {units.size(needed)}; {units.size(max(0, left))} are left",
                hint="a shorter context, fewer sequences, or cache: {dtype: float16}",
            )


class Pages(ABC):
    """Pages of `page_bytes`, made within a budget when needed and used again when given back."""

    def __init__(self, page_bytes: int, budget: Budget) -> None:
        self.page_bytes, self.budget = page_bytes, budget
        self._uses: list[int] = []
        self._free: list[int] = []

    @abstractmethod
    def _make(self, page: int) -> None:
        """Memory for a page more, the last."""

    @abstractmethod
    def _copy(self, page: int, to: int) -> None: ...

    @abstractmethod
    def _table(self, pages: list[int]) -> Any:
        """Where a sequence's pages are, as the kernels are told."""

    @property
    def bytes(self) -> int:
        """Taken from the system so far."""
        return len(self._uses) * self.page_bytes

    def require(self, rooms: Iterable[Room], beside: float = 0) -> float:
        """Bytes that it will take from the budget. Raises InputError where they are not there."""
        rooms = list(rooms)
        free = len(self._free) * self.page_bytes
        needed = self._count(rooms) * self.page_bytes
        self.budget.require(needed, rooms, beside - free)
        return max(0, needed - free)

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Room for `length` positions, none of it another sequence's too. Raises InputError when memory is short."""
        count, first = -(-length // PAGE), sequence.length // PAGE
        shared = [index for index in range(first, min(count, len(sequence.pages))) if self._uses[sequence.pages[index]] > 1]
        if count <= len(sequence.pages) and not shared and sequence.table is not None:
            return
        try:
            for index in shared:
                before, own = sequence.pages[index], self._take()
                self._copy(before, own)
                self._uses[before] -= 1
                sequence.pages[index] = own
            while len(sequence.pages) < count:
                sequence.pages.append(self._take())
        finally:  # whatever it has now, the table says
            sequence.table = self._table(sequence.pages)

    def cut(self, sequence: Sequence, length: int) -> None:
        """Forgets positions from `length` on; their pages are kept for what comes."""
        sequence.length = min(sequence.length, length)

    def fork(self, sequence: Sequence) -> Sequence:
        """A sequence with the same positions: whichever of the two writes to a page first copies it."""
        shared = sequence.pages[: -(-sequence.length // PAGE)]
        for page in shared:
            self._uses[page] += 1
        return Sequence(sequence.length, shared)

    def close(self, sequence: Sequence) -> None:
        """Gives its pages back."""
        for page in sequence.pages:
            self._uses[page] -= 1
            if not self._uses[page]:
                self._free.append(page)
        sequence.pages, sequence.length, sequence.table = [], 0, None

    def _count(self, rooms: Iterable[Room]) -> int:
        # A page that is full before a fork is one page; of a page that each goes on writing to, each has its own.
        return sum(each.sequences * -(-each.tokens // PAGE) - (each.sequences - 1) * (each.shared // PAGE) for each in rooms)

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            if self.budget.taken + self.page_bytes > self.budget.most:
                raise InputError(
                    f"keys and values fill {units.size(self.budget.taken)}, which is all that is allowed",
                    hint="a shorter context, fewer sequences, or cache: {dtype: float16}",
                )
            page = len(self._uses)
            self._make(page)
            self._uses.append(0)
            self.budget.taken += self.page_bytes
        self._uses[page] = 1
        return page


class OverPages:
    """What steps offer of sequences whose keys and values lie in pages."""

    pages: Pages

    @property
    def remarks(self) -> tuple[str, ...]:
        return ()

    def kv_bytes(self, length: int) -> float:
        """What a step of one token reads of a sequence's keys and values."""
        return self.pages.page_bytes / PAGE * length

    def open(self) -> Sequence:
        return Sequence()

    def length(self, sequence: Sequence) -> int:
        return sequence.length

    def require(self, rooms: Iterable[Room], beside: float = 0) -> float:
        return self.pages.require(rooms, beside)

    def cut(self, sequence: Sequence, length: int) -> None:
        self.pages.cut(sequence, length)

    def fork(self, sequence: Sequence) -> Sequence:
        return self.pages.fork(sequence)

    def close(self, sequence: Sequence) -> None:
        self.pages.close(sequence)


class HostPages(Pages):
    """Each page has an address of its own."""

    def __init__(self, page_bytes: int, budget: Budget) -> None:
        super().__init__(page_bytes, budget)
        self._arena = Arena()
        self._memory: list[torch.Tensor] = []

    def _make(self, page: int) -> None:
        self._memory.append(self._arena.take(self.page_bytes))

    def _copy(self, page: int, to: int) -> None:
        self._memory[to].copy_(self._memory[page])

    def _table(self, pages: list[int]) -> Any:
        return (ctypes.c_void_p * len(pages))(*(self._memory[page].data_ptr() for page in pages))


def _counted(rooms: Iterable[Room], most: int = 3) -> list[tuple[str, int]]:
    """(tokens, how many sequences of them), the longest first; the shorter ones, beyond `most`, as one."""
    found: Counter[int] = Counter()
    for room in rooms:
        found[room.tokens] += room.sequences
    longest = sorted(found.items(), reverse=True)
    rest = sum(count for _, count in longest[most - 1 :])
    if len(longest) <= most:
        return [(str(tokens), count) for tokens, count in longest]
    return [*((str(tokens), count) for tokens, count in longest[: most - 1]), (f"up to {longest[most - 1][0]}", rest)]
