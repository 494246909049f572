"""Captured steps: what they read and leave, how they are made, what they found, and what was launched before anybody asked."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from infopt.kernels.gpu.attention import Where
from infopt.kernels.gpu.overlap import overlapping
from infopt.runtime.pages import Sequence
from infopt.runtime.steps import Run

#: The first compute capability whose launches overlap: Hopper.
OVERLAPPING = (9, 0)
#: Replays by which it is found whether they should.
CHECKS = 9


@dataclass
class Captured:
    """A step of `rows` sequences with `tokens` new ones each: what it reads, what it leaves, and its graph."""

    ids: torch.Tensor
    where: Where
    tokens: torch.Tensor
    leads: torch.Tensor
    logits: torch.Tensor
    graph: Any = None
    known: list[Any] = field(default_factory=list)
    """Page tables that `where.tables` has, row by row."""


@dataclass(frozen=True)
class Found:
    """What a step finds, on the host once `done`; its logits stay on the GPU."""

    call: Captured
    tokens: torch.Tensor
    leads: torch.Tensor
    done: Any = None

    def arrived(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.done is not None:
            self.done.synchronize()
        return self.tokens, self.leads


@dataclass
class Pending:
    """A step that was launched before it was asked for: for these sequences, at these lengths, fed with these tokens."""

    found: Found
    sequences: list[Sequence]
    lengths: list[int]
    fed: list[int] = field(default_factory=list)

    def fits(self, runs: Several[Run]) -> bool:
        """Whether it is what is asked for now."""
        asked = [(id(run.sequence), run.sequence.length, run.ids[0]) for run in runs]
        launched = zip(self.sequences, self.lengths, self.fed, strict=True)
        return asked == [(id(sequence), length, token) for sequence, length, token in launched]


class Capturing:
    """Makes graphs of steps: on a stream of its own, since each has a workspace of the matrix library's, and in one pool of
    memory. Where the GPU can let launches overlap, the first step is captured with and without, and the sooner of two that find
    the same says how all are."""

    def __init__(self, device: torch.device) -> None:
        self._side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.overlaps: bool | None = None if torch.cuda.get_device_capability(device) >= OVERLAPPING else False
        self.about_overlap = "" if self.overlaps is None else "this GPU has no overlapping launches"
        self.forget()

    def forget(self) -> None:
        """All graphs are gone: a pool that none uses any more takes no new ones."""
        self._pool = torch.cuda.graph_pool_handle()

    def make(self, call: Captured, compute: Callable[[Captured], None]) -> None:
        """`compute`: the step; it leaves `call.logits`, which stay where they are in every replay."""
        self._capture(call, compute, bool(self.overlaps), self._pool)
        if self.overlaps is None:
            other, pool = replace(call), torch.cuda.graph_pool_handle()
            self.overlaps = self._is_better(call, other, compute, pool)
            if self.overlaps:
                call.graph, call.logits, self._pool = other.graph, other.logits, pool

    def _capture(self, call: Captured, compute: Callable[[Captured], None], overlaps: bool, pool: Any) -> None:
        with overlapping(overlaps), torch.cuda.stream(torch.cuda.current_stream()):  # whatever fails, that is the stream again
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                compute(call)  # compiles the kernels, which a capture cannot
            torch.cuda.current_stream().wait_stream(self._side)
            call.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(call.graph, pool=pool, stream=self._side):
                compute(call)

    def _is_better(self, call: Captured, other: Captured, compute: Callable[[Captured], None], pool: Any) -> bool:
        try:
            self._capture(other, compute, True, pool)
        except (torch.OutOfMemoryError, TypeError, AssertionError):
            raise
        except Exception as error:  # Triton and CUDA raise of every kind
            self.about_overlap = f"launches do not overlap: {type(error).__name__}: {error}"[:200]
            return False
        source = torch.Generator(call.ids.device).manual_seed(0)
        for _ in range(CHECKS):
            # Other tokens each time, and the one that overlaps first: if it reads too soon it finds what was left of the last.
            ids = torch.randint(call.logits.shape[1], call.ids.shape, generator=source, device=call.ids.device)
            found = [replayed(each, ids) for each in (other, call)]
            if not all(torch.equal(*parts) for parts in zip(*found, strict=True)):
                self.about_overlap = "launches do not overlap: they would find something else"
                return False
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(CHECKS):
            for each, kept in zip((call, other), seconds, strict=True):
                kept.append(timed(each))
        plain, overlapped = (sorted(kept)[CHECKS // 2] for kept in seconds)
        self.about_overlap = f"a step takes {overlapped * 1e6:.0f} µs where launches overlap, {plain * 1e6:.0f} where not"
        return overlapped < plain


def replayed(call: Captured, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits after `ids` alone."""
    call.ids.copy_(ids)
    call.where.lengths.zero_()
    call.graph.replay()
    return call.tokens.clone(), call.logits.clone()


def timed(call: Captured, count: int = 3) -> float:
    """Seconds of a replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    call.where.lengths.zero_()
    start.record()
    for _ in range(count):
        call.graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count
