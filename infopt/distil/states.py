"""Losses on what lies inside: hidden states, and attention, of some student blocks against the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from infopt.distil.examples import Batch


def pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """(student's block, teacher's block), counted from 0: as far through both (TinyBERT, arXiv 1909.10351, section 3.1)."""
    return [(block, max(0, round((block + 1) * teacher / student) - 1)) for block in range(student)]


class HiddenStates(nn.Module):
    """Mean squared distance of hidden states after each pair of blocks, over the mean square of the teacher's.

    Where widths differ, a matrix per pair, which is trained along and then thrown away, takes the student's to the teacher's.
    """

    def __init__(self, found: Sequence[tuple[int, int]], student: int, teacher: int, seed: int) -> None:
        super().__init__()
        self.pairs = list(found)
        self.projections = nn.ParameterList()
        if student != teacher:
            made = torch.Generator().manual_seed(seed)
            for _ in found:
                self.projections.append(nn.Parameter(torch.randn(teacher, student, generator=made) / student**0.5))

    def forward(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        losses = []
        for number, (own, other) in enumerate(self.pairs):
            # The first of `hidden_states` is the embedding.
            found = student.hidden_states[own + 1][batch.rows, batch.places].float()
            wanted = teacher.hidden_states[other + 1][batch.rows, batch.places].float()
            if len(self.projections):
                found = found @ self.projections[number].T
            losses.append((found - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12))
        return torch.stack(losses).mean()


def attention(student: Any, teacher: Any, found: Sequence[tuple[int, int]], batch: Batch) -> torch.Tensor:
    """Mean KL(teacher ‖ student), in nats, of the attention of each pair of blocks, averaged over its heads."""
    losses = []
    for own, other in found:
        p, q = (
            out.attentions[index].mean(1)[batch.rows, batch.places].float().clamp_min(1e-12)
            for out, index in ((teacher, other), (student, own))
        )
        losses.append((p * (p.log() - q.log())).sum(-1).mean())
    return torch.stack(losses).mean()
