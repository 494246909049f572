"""Second moments of a layer's inputs: what a weight's error costs, to second order."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

#: Input features in one block of the product; only the blocks on and above the diagonal are multiplied.
BLOCK = 256


class Hessian:
    """H = (2/n)·Σ x·xᵀ over n calibration tokens: the Hessian of ‖(W − Ŵ)·X‖² in any row of W (GPTQ, section 3).

    Symmetric, so only its upper half is added up. float32, [in, in], on the inputs' device.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """`x` [tokens, in]"""
        x = x.float().T.contiguous()
        features = len(x)
        if self._sum is None:
            self._sum = torch.zeros(features, features, device=x.device)
        for start in range(0, features, BLOCK):
            end = min(start + BLOCK, features)
            self._sum[start:end, start:] += linear(x[start:end], x[start:])
        self.tokens += x.shape[1]

    def mean(self) -> torch.Tensor:
        """H. Call it once: the sum is scaled in place."""
        assert self._sum is not None, "no inputs were added"
        upper = self._sum.mul_(2 / self.tokens).triu_()
        self._sum = None
        return upper.add_(upper.triu(1).T)
