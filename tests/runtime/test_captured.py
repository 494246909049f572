"""Whether launches overlap: only where they can, find the same, and sooner. Graphs and their times are scripted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from infopt.kernels.gpu import overlap
from infopt.kernels.gpu.attention import Where
from infopt.runtime import captured
from infopt.runtime.captured import Captured, Capturing

#: What graphs leave between their kernels: one after the other they may have the same memory.
BETWEEN = torch.zeros(2, 11)


@dataclass
class Graph:
    """Finds logits of the tokens that stand there, by way of memory that graphs share."""

    call: Captured
    overlaps: bool
    find: Callable[[torch.Tensor], torch.Tensor]

    def replay(self) -> None:
        self.call.logits.copy_(self.find(self.call.ids))
        self.call.tokens.copy_(self.call.logits.argmax(1))
        self.call.where.lengths.add_(1)


def usual(ids: torch.Tensor) -> torch.Tensor:
    BETWEEN.copy_(torch.nn.functional.one_hot((ids.long() * 3 + 1) % 11, 11))
    return BETWEEN


def early(ids: torch.Tensor) -> torch.Tensor:
    """Its last kernel did not wait for the one before: it reads what the last replay of either left."""
    found = BETWEEN.clone()
    usual(ids)
    return found


def broken(ids: torch.Tensor) -> torch.Tensor:
    raise AssertionError("it was never captured")


@pytest.mark.parametrize(("find", "seconds", "capability", "overlaps", "why"), [
    (usual, {True: 2e-3, False: 3e-3}, (9, 0), True, "a step takes 2000 µs where launches overlap, 3000 where not"),
    (usual, {True: 3e-3, False: 2e-3}, (9, 0), False, "a step takes 3000 µs where launches overlap, 2000 where not"),
    (early, {}, (9, 0), False, "launches do not overlap: they would find something else"),
    (broken, {}, (9, 0), False, "launches do not overlap: RuntimeError: not supported"),
    (usual, {}, (8, 0), False, "this GPU has no overlapping launches"),
])  # fmt: skip
def test_launches_overlap_where_that_is_sooner_and_the_same(
    find: Callable[[torch.Tensor], torch.Tensor], seconds: dict[bool, float], capability: tuple[int, int], overlaps: bool,
    why: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    modes = []

    def capture(self: Capturing, call: Captured, compute: object, mode: bool, pool: object) -> None:
        modes.append(mode)
        if mode and find is broken:
            raise RuntimeError("not supported")
        call.logits = torch.zeros(2, 11)
        call.graph = Graph(call, mode, find if mode else usual)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(Capturing, "_capture", capture)
    monkeypatch.setattr(captured, "timed", lambda call: seconds[call.graph.overlaps])

    def call() -> Captured:
        where = Where(torch.zeros(2, 4).int(), torch.zeros(2).int(), torch.ones(2).int())
        return Captured(torch.zeros(2).int(), where, torch.zeros(2).int(), torch.zeros(2), torch.empty(0))

    capturing, first, second = Capturing(torch.device("cpu")), call(), call()
    capturing.make(first, lambda call: None)
    assert (capturing.overlaps, capturing.about_overlap) == (overlaps, why)
    assert first.graph.overlaps == overlaps
    assert first.graph.call.logits is first.logits  # where its replays leave them
    capturing.make(second, lambda call: None)
    assert second.graph.overlaps == overlaps
    assert modes == ([False, overlaps] if capability == (8, 0) else [False, True, overlaps])


def test_launches_are_told_to_overlap_inside_alone() -> None:
    assert overlap.launch() == {"OVERLAP": False}
    with overlap.overlapping(True):
        assert overlap.launch() == {"OVERLAP": True, "launch_pdl": True}
        with overlap.overlapping(False):
            assert overlap.launch() == {"OVERLAP": False}
    assert overlap.launch() == {"OVERLAP": False}
