"""The int8 layer against plain torch: both paths, odd sizes, activation groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.layers import int8_linear
from infopt.layers.int8_linear import FEW_ROWS, Int8Linear, round_groups, unpack_bytes


def layer(out: int, inner: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, group: int | None = None) -> Int8Linear:
    random = torch.Generator().manual_seed(out * inner)
    q = torch.randint(-128, 128, (out, inner), generator=random).to(torch.int8)
    scale = (torch.rand(out, 1, generator=random) / 50).bfloat16().to(dtype)
    return Int8Linear(q, scale, torch.randn(out, generator=random).to(dtype) if bias else None, group)


def dense(of: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    """The definition in float64."""
    y = x.double() @ (of.weight.double() * of.weight_scale.double()).T
    return y if of.bias is None else y + of.bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "inner"), [(64, 64), (7, 96), (192, 576), (5, 100), (33, 8)])
def test_many_rows_are_the_definition(out: int, inner: int, bias: bool) -> None:
    module = layer(out, inner, bias=bias)
    x = torch.randn(2, FEW_ROWS, inner)
    y = module(x)
    assert y.shape == (2, FEW_ROWS, out)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), dense(module, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS])
@pytest.mark.parametrize(("out", "inner"), [(64, 64), (7, 96), (192, 576), (1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_rows_are_as_exact_as_bfloat16(rows: int, out: int, inner: int, dtype: torch.dtype) -> None:
    module = layer(out, inner, dtype=dtype)
    x = torch.randn(1, rows, inner).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    terms = x.double().abs() @ (module.weight.double() * module.weight_scale.double()).abs().T + module.bias.double().abs()
    assert ((y.double() - dense(module, x)).abs() <= 2**-7 * terms).all()


def test_sizes_that_the_product_would_misread_are_not_given_to_it() -> None:
    assert layer(8, 100).few_rows == 0
    assert layer(8, 40).few_rows == 0
    x = torch.randn(1, 100)
    module = layer(8, 100)
    torch.testing.assert_close(module(x).double(), dense(module, x), rtol=1e-4, atol=1e-4)


def test_without_the_product_every_step_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> None:
        raise NotImplementedError("no such operator on this device")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", missing)
    int8_linear.has_kernel.cache_clear()
    try:
        module = layer(64, 64)
    finally:
        int8_linear.has_kernel.cache_clear()
    assert module.few_rows == 0
    x = torch.randn(1, 64)
    torch.testing.assert_close(module(x).double(), dense(module, x), rtol=1e-4, atol=1e-4)


def test_a_product_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda x, q, scale: right(x, q, scale) + 1)
    int8_linear.has_kernel.cache_clear()
    try:
        assert not int8_linear.has_kernel(torch.device("cpu"))
    finally:
        int8_linear.has_kernel.cache_clear()


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(50, 64)
    x = torch.randn(20, 64)
    whole = module(x)
    monkeypatch.setattr(int8_linear, "BLOCK", 7 * 64)
    torch.testing.assert_close(module(x), whole, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 8, 64]), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_rounding_per_group(rows: int, groups: int, size: int, seed: int, spread: float) -> None:
    x = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed)) * spread
    rounded = round_groups(x, size)
    peak = x.view(rows, groups, size).abs().amax(-1, keepdim=True).expand(rows, groups, size).reshape(x.shape)
    assert ((rounded - x).abs() <= peak / 127 * 0.501).all()
    assert rounded.view(rows, groups, size).unique(dim=-1).shape[-1] <= 255
    assert torch.allclose(round_groups(rounded, size), rounded, rtol=1e-5, atol=0)


def test_groups_keep_an_outlier_to_themselves() -> None:
    x = torch.full((1, 128), 0.01)
    x[0, 0] = 100.0
    assert round_groups(x, 128)[0, 1] == 0
    assert round_groups(x, 64)[0, 64] == pytest.approx(0.01, rel=1e-6)
    assert torch.equal(round_groups(torch.zeros(2, 8), 4), torch.zeros(2, 8))


@pytest.mark.parametrize("rows", [1, 40])
def test_activation_groups_are_rounded_before_the_product(rows: int) -> None:
    module = layer(24, 64, group=32)
    x = torch.randn(rows, 64)
    expected = dense(module, round_groups(x, 32))
    assert (module(x).double() - expected).norm() <= 2**-7 * expected.norm()
    assert (dense(module, x) - expected).norm() > 1e-4 * expected.norm()


@pytest.mark.parametrize("inner", [4, 6, 9, 64])
def test_bytes_come_back_as_they_were_packed(inner: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    q = torch.arange(3 * inner).mul(29).remainder(256).sub(128).to(torch.int8).view(3, inner)
    assert torch.equal(unpack_bytes(pack_to_int32(q, 8), (3, inner)), q)
