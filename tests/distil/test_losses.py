"""Every loss and its gradient against torch's autograd, over whole and over kept distributions."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div

from infopt.distil.losses import Divergence, Likeliest, divergence, token_loss

KINDS = get_args(Divergence)


def logits(seed: int, positions: int = 150, vocabulary: int = 40, spread: float = 3.0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return spread * torch.randn(positions, vocabulary, generator=made, dtype=torch.float64)


def by_definition(z: torch.Tensor, p: torch.Tensor, kind: str, temperature: float) -> torch.Tensor:
    """[positions], from probabilities `p` of the teacher, with torch's own functions."""
    log_q = (z / temperature).log_softmax(-1)
    return of_probabilities(log_q, p, kind) * temperature**2


def of_probabilities(log_q: torch.Tensor, p: torch.Tensor, kind: str) -> torch.Tensor:
    log_p = p.log()
    if kind == "forward":
        return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if kind == "reverse":
        return kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    mean = ((log_q.exp() + p) / 2).log()
    both = kl_div(mean, log_p, reduction="none", log_target=True) + kl_div(mean, log_q, reduction="none", log_target=True)
    return both.sum(-1) / 2


def compare(found: tuple[float, torch.Tensor], loss: torch.Tensor, z: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    assert found[0] == pytest.approx(loss.item(), rel=1e-4, abs=1e-7)
    assert z.grad is not None
    torch.testing.assert_close(found[1], z.grad, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_divergences_of_whole_distributions(kind: Divergence, temperature: float, weighted: bool) -> None:
    z, target = logits(0).requires_grad_(), logits(1)
    weights = torch.rand(len(z), generator=torch.Generator().manual_seed(2)) if weighted else None
    each = by_definition(z, (target / temperature).softmax(-1), kind, temperature)
    loss = each.mean() if weights is None else (each * weights).sum() / weights.sum()
    compare(divergence(z.detach(), target, kind, temperature, weights), loss, z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_other_tokens_count_as_one(kind: Divergence, temperature: float) -> None:
    z, target = logits(3).requires_grad_(), logits(4)
    kept = Likeliest.of(target, 5, temperature)
    p = (target / temperature).softmax(-1).gather(1, kept.tokens)
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(kept.log_probabilities.double(), p.log(), rtol=1e-4, atol=1e-5)
    q = (z / temperature).softmax(-1).gather(1, kept.tokens)
    log_q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1).log()
    compare(divergence(z.detach(), kept, kind, temperature), of_probabilities(log_q, p, kind).mean() * temperature**2, z)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), spread=st.floats(0.1, 30))
def test_keeping_less_never_adds_divergence_and_keeping_all_loses_none(kind: Divergence, seed: int, spread: float) -> None:
    z, target = logits(seed, 8, 12, spread).float(), logits(seed + 1, 8, 12, spread).float()
    whole = divergence(z, target, kind)[0]
    values = [divergence(z, Likeliest.of(target, count), kind)[0] for count in (1, 4, 12)]
    least = 1e-4 * (1 + whole)
    assert values[0] <= values[1] + least
    assert values[1] <= values[2] + least
    assert values[2] == pytest.approx(whole, rel=1e-3, abs=1e-4)
    assert whole >= -1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_same_distribution_has_no_divergence(kind: Divergence, temperature: float) -> None:
    z = logits(5, 20, 5000).float()
    for target in (z, Likeliest.of(z, 7, temperature)):
        value, gradient = divergence(z, target, kind, temperature)
        assert value == pytest.approx(0, abs=1e-5)
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
def test_token_loss_is_cross_entropy(weighted: bool) -> None:
    z = logits(6).requires_grad_()
    tokens = torch.randint(0, z.shape[1], (len(z),), generator=torch.Generator().manual_seed(7))
    weights = torch.rand(len(z), generator=torch.Generator().manual_seed(8)) if weighted else None
    each = cross_entropy(z, tokens, reduction="none")
    loss = each.mean() if weights is None else (each * weights).sum() / weights.sum()
    compare(token_loss(z.detach(), tokens, weights), loss, z)


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_stay_numbers(kind: Divergence) -> None:
    z, target = logits(9, 4, 30, 400.0).float(), logits(10, 4, 30, 400.0).float()
    for wanted in (target, Likeliest.of(target, 3)):
        value, gradient = divergence(z, wanted, kind)
        assert torch.isfinite(torch.tensor(value))
        assert torch.isfinite(gradient).all()
