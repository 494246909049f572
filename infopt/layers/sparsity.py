"""Which weights stay when some are set to zero: by a score each, over a layer, over a row, or so many of every few."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from infopt.errors import RecipeError
from infopt.layers import grid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from infopt.protocols import Shapes

#: What every report says of a model whose weights are zeros here and there.
REMARK = "weights are zeros where they were pruned; no shape changed, so neither its size nor its speed is expected to"


def kept_of(pattern: str) -> tuple[int, int]:
    """`2:4` → 2 of 4 neighbouring inputs."""
    kept, _, of = pattern.partition(":")
    return int(kept), int(of)


def check(
    shapes: Shapes, sparsity: float, pattern: str | None, ignore: Iterable[str], path: str, compared: Callable[[int, int], int]
) -> None:
    """Refuses what leaves no weight, a pattern that a layer's inputs do not divide into, or that goes with another sparsity.

    `compared`: (rows, inputs) → weights that are held against each other. Raises RecipeError.
    """
    chosen = grid.chosen(shapes, ignore)
    if pattern is None:
        _refuse_nothing_left({name: compared(*shape) for name, shape in chosen.items()}, sparsity, path)
        return
    kept, of = kept_of(pattern)
    if sparsity != 1 - kept / of:
        raise RecipeError(f"{path}.sparsity", f"found {sparsity}; allowed: {1 - kept / of}, the share that {pattern} leaves out")
    odd = {inner: name for name, (_, inner) in chosen.items() if inner % of}
    if odd:
        inner, name = next(iter(odd.items()))
        message = f"{name} has {inner} inputs, which do not divide into groups of {of}"
        raise RecipeError(f"{path}.pattern", message, hint="pattern: null")


def _refuse_nothing_left(compared: dict[str, int], sparsity: float, path: str) -> None:
    for name, count in compared.items():
        if round(count * sparsity) >= count:
            message = f"found {sparsity:g}, which leaves nothing of {count} weights that are compared in {name}"
            raise RecipeError(f"{path}.sparsity", f"{message}; allowed: up to {math.floor((1 - 1 / count) * 1e4) / 1e4:g}")


def keep(scores: torch.Tensor, sparsity: float, pattern: str | None = None, *, by_row: bool = False) -> torch.Tensor:
    """bool [rows, inputs]: False for the lowest share of `scores` in all rows together, in each row, or in each group of inputs.

    Of equal scores the first go, so that exactly the share that was asked for does.
    """
    import torch

    if pattern is not None:
        kept, of = kept_of(pattern)
        compared, count = scores.reshape(-1, of), of - kept
    elif by_row:
        compared, count = scores, round(scores.shape[1] * sparsity)
    else:
        return _keep_in_all(scores.flatten(), round(scores.numel() * sparsity)).view(scores.shape)
    lowest = compared.argsort(dim=1, stable=True)[:, :count]
    found = torch.ones_like(compared, dtype=torch.bool).scatter_(1, lowest, False)
    return found.view(scores.shape)


def _keep_in_all(scores: torch.Tensor, count: int) -> torch.Tensor:
    """False for the `count` lowest, without sorting a whole layer."""
    import torch

    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    gone = scores < threshold
    gone[(scores == threshold).nonzero()[: count - int(gone.sum()), 0]] = True
    return ~gone
