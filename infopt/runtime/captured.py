"""What a captured step reads and leaves, what it found, and what of it was launched before anybody asked."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any

import torch

from infopt.kernels.gpu.attention import Where
from infopt.runtime.pages import Sequence
from infopt.runtime.steps import Run


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
