"""A linear layer that answers as it was, or as it will be: teacher and student of one distillation in one model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from infopt.layers import packing
from infopt.layers.grid import Grid


class StudentLinear(nn.Linear):
    """As student it multiplies by `weight` [out, in], rounded to `grid` where there is one; as teacher by `original`.

    So both share embeddings, norms and what else is not trained. With a grid, `weight` is float32 and scales are fitted
    to it anew in each pass; its gradient is that of the rounded weight (straight-through).
    """

    original: torch.Tensor

    def __init__(self, layer: nn.Linear, weight: torch.Tensor, grid: Grid | None = None) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = nn.Parameter(weight, requires_grad=grid is not None), layer.bias
        self.register_buffer("original", layer.weight.data, persistent=False)
        self.grid, self.is_teacher = grid, False
        self.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        if self.is_teacher:
            weight = self.original
        elif self.grid is not None:
            weight = _StraightThrough.apply(weight, self.grid, self.original.dtype)  # type: ignore[no-untyped-call]
        return linear(x, weight, self.bias)

    def plain(self, weight: torch.Tensor) -> nn.Linear:
        """The layer with `weight` for good, nothing left to train."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta").train(self.training)
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer


class _StraightThrough(torch.autograd.Function):
    """Rounding with the gradient of the identity (Bengio et al., arXiv 1308.3432; Jacob et al., arXiv 1712.05877, section 3).

    Scales follow the weight's range, so that nothing lies outside the grid and no gradient is cut off.
    """

    @staticmethod
    def forward(context: Any, weight: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
        return packing.rounded(weight, packing.fit(weight, grid, dtype), grid).to(dtype)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0].float(), None, None


@contextmanager
def teaching(layers: Iterable[StudentLinear]) -> Iterator[None]:
    """The layers answer as teacher."""
    found = list(layers)
    for layer in found:
        layer.is_teacher = True
    try:
        yield
    finally:
        for layer in found:
            layer.is_teacher = False
