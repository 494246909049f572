"""Which inputs of a layer matter, in groups (channels, heads), and how those that stay make up for those that go."""

from __future__ import annotations

import torch

from infopt.calibrate.hessian import Hessian
from infopt.errors import InputError

#: Rows of a weight that are solved for at a time, in float64: a head has as many as there are tokens in the vocabulary.
ROWS = 8192


class Activity:
    """How strong an input's groups of `size` neighbouring channels are over calibration text, a window at a time.

    `mean` is Minitron's (arXiv 2407.14679, section 2.2): the group's L2 norm, averaged over a window's tokens; then the L2
    norm over windows. `squares` is its sum of squares over all tokens. Both float32 [groups].
    """

    def __init__(self, window: int, size: int = 1) -> None:
        self.window, self.size = window, size
        self._squares: torch.Tensor | float = 0.0
        self._windows: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """`x` [tokens, in], of whole windows"""
        norms = x.float().view(len(x), -1, self.size).norm(dim=-1)  # [tokens, groups]
        self._squares = self._squares + norms.square().sum(0)
        self._windows = self._windows + norms.view(-1, self.window, norms.shape[1]).mean(1).square().sum(0)

    @property
    def squares(self) -> torch.Tensor:
        assert isinstance(self._squares, torch.Tensor), "no inputs were added"
        return self._squares

    @property
    def mean(self) -> torch.Tensor:
        assert isinstance(self._windows, torch.Tensor), "no inputs were added"
        return self._windows.sqrt()


class Inputs(Activity):
    """Of one layer: how strong they are, and their second moments."""

    def __init__(self, window: int, size: int = 1) -> None:
        super().__init__(window, size)
        self.hessian = Hessian()

    def add(self, x: torch.Tensor) -> None:
        super().add(x)
        self.hessian.add(x)


def contribution(weight: torch.Tensor, moments: torch.Tensor, size: int = 1) -> torch.Tensor:
    """‖W_g·X_g‖² of each group g of `size` inputs, float32 [groups]: how much of the output, squared, comes from it.

    `weight` float32 [out, in], `moments` X·Xᵀ times whatever, [in, in]. Of a single channel it is (‖x_j‖·‖W_j‖)², the score of
    structured Wanda and, but for the mean, of FLAP (arXiv 2312.11983).
    """
    groups = weight.shape[1] // size
    w = weight.view(len(weight), groups, size).transpose(0, 1)  # [groups, out, size]
    each = torch.arange(groups, device=weight.device)
    inner = moments.view(groups, size, groups, size)[each, :, each, :]  # [groups, size, size]
    energy: torch.Tensor = (w @ inner).mul_(w).sum((1, 2))
    return energy


def strongest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` highest, ascending; of equal ones the first. Raises InputError for scores that are no numbers."""
    if not bool(scores.isfinite().all()):
        raise InputError("calibration met activations that are not finite", hint="engine: {dtype: float32}")
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def refit(stays: torch.Tensor, missing: torch.Tensor, moments: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """The least-squares weight for inputs X: `stays` + `missing`·(M + λ·1)⁻¹, M = X·Xᵀ, λ `damping` times M's mean diagonal.

    `missing` [out, in] is E·Xᵀ, E what the output lacks with the weight as it stays: so λ pulls towards that weight, not towards
    0. float32, `moments` [in, in]. Raises InputError, with the layer's `name`, when M cannot be factored.
    """
    damped = moments.double()
    diagonal = damped.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1  # what was never seen is asked nothing
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise InputError(
            f"the inputs of {name} are too much alike to solve for its weight", hint="raise damping, or calibrate on more text"
        )
    fitted = stays.clone()
    for start in range(0, len(stays), ROWS):
        rows = slice(start, start + ROWS)
        fitted[rows] += torch.cholesky_solve(missing[rows].double().T, factor).T.float()
    return fitted


def narrowed(weight: torch.Tensor, kept: torch.Tensor, moments: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """`weight` [out, in] with zeros for the inputs that are not `kept`, the others refitted to do their work: all float32."""
    missing = weight.index_fill(1, kept, 0) @ moments[:, kept]  # no `linear`, whose operands calibration may round
    fitted = refit(weight[:, kept], missing, moments[kept][:, kept], damping, name)
    return torch.zeros_like(weight).index_copy_(1, kept, fitted)
