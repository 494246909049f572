"""Every product equals its twin: kinds of weights, groups, tails, extremes, and what is fused with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from infopt.kernels.gpu import norm, ops, products
from infopt.kernels.gpu.choices import Choice
from infopt.kernels.gpu.weight import Weight, dense, float8, integers, plain
from infopt.kernels.packed import rounded

#: Four bits: fields meet activations with what reading them added still in, at most 2¹¹ beside a field of about 4.
TOLERANCE = {"int4": 4e-4}
KINDS = ["float32", "float8", "int8", "int4", "int4 with zeros", "int4 by rows"]
FUSED: dict[str, dict[str, Any]] = {
    "alone": {}, "norm": {"gain": True, "epsilon": 1e-5}, "silu": {"activation": 0}, "gelu": {"activation": 1},
    "residual": {"residual": True},
}  # fmt: skip


def weight(kind: str, rows: int, inner: int, bias: bool = False, group: int = 32) -> Weight:
    found, beside = torch.randn(rows, inner), torch.randn(rows) if bias else None
    if kind == "float32":
        return plain(found, beside)
    if kind == "float8":
        return float8(found, beside)
    if kind == "int4 by rows":
        q, scales = rounded(found, 4, inner)
        return integers(q, scales, None, 4, None, beside)
    bits = 8 if kind == "int8" else 4
    q, scales = rounded(found, bits, group)
    zeros = torch.randint(-8, 8, scales.shape, dtype=torch.int8) if "zeros" in kind else None
    return integers(q, scales, zeros, bits, group, beside)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def both(choice: Choice, x: torch.Tensor, made: Weight, fused: dict[str, Any], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    made, x, given = made.to(device), x.to(device), dict(fused)
    outputs = made.rows // (2 if "activation" in given else 1)
    if "gain" in given:
        given["gain"] = (torch.rand(made.inner) + 0.5).to(device)
    if "residual" in given:
        given["residual"] = torch.randn(len(x), outputs).to(device)
    wanted = products.twin(x, made, **given)
    defaults: dict[str, Any] = {"gain": None, "epsilon": 0.0, "activation": None, "residual": None, "dtype": x.dtype}
    return ops.multiply(choice, x, made, **defaults | given), wanted


VECTOR, TILES = Choice("vector", 4, 2, 1), Choice("tiles", 64, 16, 4, 128, 2, 2)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", [VECTOR, TILES, Choice("library")], ids=["vector", "tiles", "library"])
def test_a_product_is_its_twin(choice: Choice, kind: str, fused: str, device: str) -> None:
    torch.manual_seed(0)
    made = weight(kind, 96, 160, bias=fused == "residual")  # neither a whole block of rows nor of inputs
    found, wanted = both(choice, torch.randn(3, 160), made, FUSED[fused], device)
    assert off(found, wanted) < (TOLERANCE.get(made.kind, 2e-6) if choice is VECTOR else 2e-6)


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("group", [64, 128])
def test_larger_groups(kind: str, group: int, device: str) -> None:
    torch.manual_seed(1)
    made = weight(kind, 64, 256, group=group)
    for choice in (VECTOR, TILES):
        found, wanted = both(choice, torch.randn(1, 256), made, {}, device)
        assert off(found, wanted) < 4e-4


@pytest.mark.parametrize(("rows", "choice"), [(1, Choice("vector", 8, 1, 1)), (5, Choice("vector", 2, 4, 2)), (17, TILES)])
def test_numbers_of_rows_that_fill_no_block(rows: int, choice: Choice, device: str) -> None:
    torch.manual_seed(2)
    found, wanted = both(choice, torch.randn(rows, 96), weight("int4", 64, 96), {}, device)
    assert off(found, wanted) < 4e-4


@pytest.mark.parametrize("choice", [VECTOR, TILES], ids=["vector", "tiles"])
def test_extremes(choice: Choice, device: str) -> None:
    """All integers there are, activations of very different sizes, and an input whose weights are zero."""
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(4, 8).roll(3, 1)
    q[:, 5] = 0
    made = integers(q, torch.full((4, 4), 0.01), None, 4, 32)
    x = torch.randn(2, 128) * torch.logspace(-4, 2, 128)
    x[:, 5] = 1000.0
    found, wanted = both(choice, x, made, {}, device)
    assert off(found, wanted) < 2e-3
    zeros = both(choice, torch.zeros(1, 128), made, {"gain": True, "epsilon": 1e-6}, device)
    assert torch.equal(*(part.cpu() for part in zeros))


@pytest.mark.parametrize("choice", [VECTOR, TILES], ids=["vector", "tiles"])
def test_half_precision(choice: Choice, device: str) -> None:
    torch.manual_seed(3)
    made = weight("int4", 64, 128)
    found, wanted = both(choice, torch.randn(2, 128).half(), made, {}, device)
    assert found.dtype == torch.float16
    assert off(found, wanted) < 2e-3


def test_the_same_on_every_run(device: str) -> None:
    torch.manual_seed(4)
    made, x = weight("int4", 64, 512).to(device), torch.randn(3, 512, device=device)
    runs = [products.by_tiles(
        x, made, activation=None, residual=None, dtype=torch.float32, block=64, rows=16, inputs=128, splits=4, warps=4, stages=2
    ) for _ in range(2)]  # fmt: skip
    assert torch.equal(*runs)


def test_float8_with_float8(device: str) -> None:
    """Activations are rounded too: to a scale a row."""
    torch.manual_seed(5)
    made, x = weight("float8", 64, 128).to(device), torch.randn(4, 128, device=device).bfloat16()
    found = ops.multiply(Choice("scaled"), x, made, gain=None, epsilon=0, activation=None, residual=None, dtype=torch.bfloat16)
    steps = x.float().abs().amax(1, keepdim=True) / 448
    rounded_x = (x.float() / steps).to(torch.float8_e4m3fn).float() * steps
    assert off(found, rounded_x @ dense(made).T) < 5e-3


def test_a_norm_is_its_twin(device: str) -> None:
    torch.manual_seed(6)
    x, gain, residual = (torch.randn(size, device=device) for size in ((3, 100), (100,), (3, 100)))
    for beside in (None, residual):
        assert off(norm.norm(x, gain, 1e-5, beside), norm.norm_twin(x, gain, 1e-5, beside)) < 1e-6


def test_the_likeliest_is_the_first_of_the_largest(device: str) -> None:
    logits = torch.randn(5, 9001)
    logits[1, 8000] = logits[1].max() + 1
    logits[2, 5] = logits[2, 8999] = 9
    logits[3, 4100] = torch.nan
    logits[4] = -torch.inf
    logits[4, 9000] = 0
    tokens, leads = (part.cpu() for part in norm.likeliest(logits.to(device)))
    wanted, wanted_leads = norm.likeliest_twin(logits)
    usual = [0, 1, 2, 4]
    assert tokens[usual].tolist() == wanted[usual].tolist() == [int(logits[0].argmax()), 8000, 5, 9000]
    assert torch.allclose(leads[usual], wanted_leads[usual])
    assert leads[2] == 0
    assert leads[3].isnan()
    assert wanted_leads[3].isnan()
