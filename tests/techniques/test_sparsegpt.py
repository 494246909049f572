"""SparseGPT against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from infopt.errors import InputError
from infopt.layers import sparsity
from infopt.techniques.sparsegpt import prune_columns


def inputs(seed: int = 0, tokens: int = 300, inner: int = 160) -> torch.Tensor:
    """[tokens, inner] float64, correlated, of very different sizes."""
    made = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, inner, generator=made) @ (torch.eye(inner) + torch.randn(inner, inner, generator=made) / 8)
    return (mixed * (torch.rand(inner, generator=made) * 3 + 0.1)).double()


def loss(x: torch.Tensor, error: torch.Tensor) -> float:
    return float((x @ error.double().T).square().mean())


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_is_its_definition_in_float64(pattern: str | None) -> None:
    """Column by column: H⁻¹ of the columns that are left, instead of a factor of the whole one."""
    x = inputs()
    weight = torch.randn(12, 160, generator=torch.Generator().manual_seed(1))
    hessian = 2 * x.T @ x / len(x)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    w, keep = weight.double().clone(), torch.ones(12, 160, dtype=torch.bool)
    for i in range(160):
        left = torch.linalg.inv(damped[i:, i:])
        if i % (4 if pattern else 128) == 0:
            end = min(i + (4 if pattern else 128), 160)
            # The pivots of the inverse's factor are what each column's own remaining inverse starts with.
            pivots = torch.stack([torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(i, end)])
            keep[:, i:end] = sparsity.keep(w[:, i:end].square() / pivots, 0.5, pattern)
        gone = torch.where(keep[:, i], 0, w[:, i])
        w[:, i:] -= gone[:, None] * left[0] / left[0, 0]
        w[:, i] = torch.where(keep[:, i], w[:, i], 0)
    found = prune_columns(weight, hessian.float(), 0.5, pattern, 0.01)
    assert ((found != 0) == keep).float().mean() > 0.995  # scores that are nearly equal may fall to either side
    assert loss(x, found - weight) == pytest.approx(loss(x, w - weight), rel=0.02)


def test_what_makes_up_for_the_loss_costs_least() -> None:
    x = inputs(2)
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(3))
    hessian = (2 * x.T @ x / len(x)).float()
    by_size = weight * sparsity.keep(weight.abs(), 0.5)
    by_input = weight * sparsity.keep(weight.abs() * x.float().square().sum(0).sqrt(), 0.5, by_row=True)
    corrected = prune_columns(weight, hessian, 0.5, None, 0.01)
    losses = [loss(x, pruned - weight) for pruned in (corrected, by_input, by_size)]
    assert losses[0] < 0.7 * losses[1] < 0.7 * losses[2]


def test_inputs_that_were_never_seen_cost_nothing() -> None:
    x = inputs()
    x[:, [3, 70]] = 0
    found = prune_columns(torch.ones(4, 160), (2 * x.T @ x / len(x)).float(), 0.25, None, 0.01)
    assert found.isfinite().all()
    assert (found[:, [3, 70]] == 0).all()
    with pytest.raises(InputError, match="too much alike"):
        prune_columns(torch.ones(4, 160), -torch.eye(160), 0.5, None, 0.01)
