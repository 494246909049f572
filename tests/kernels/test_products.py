"""The kernels' products are what their plain-torch twin says, on every instruction set that this processor has."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.kernels import build, library, packed
from infopt.kernels.library import CLayer, CModel
from infopt.kernels.packed import KINDS, Kind, Packed

ISAS = build.usable()


class Threads:
    """An engine that only multiplies."""

    def __init__(self, isa: str, threads: int = 2) -> None:
        self.library = library.load(isa)
        self._layer = CLayer()
        self._model = CModel(hidden=32, heads=1, kv_heads=1, head_dim=16, layer=ctypes.pointer(self._layer))
        self.engine = self.library.infopt_open(ctypes.byref(self._model), threads)

    def multiply(self, weights: Packed, x: torch.Tensor, is_prompt: bool = False) -> torch.Tensor:
        padded = torch.zeros(len(x), weights.padded_inner)
        padded[:, : weights.inner] = x
        out = torch.empty(len(x), weights.padded_rows)
        matrix = library.matrix(weights)
        self.library.infopt_multiply(self.engine, ctypes.byref(matrix), padded.data_ptr(), len(x), out.data_ptr(), is_prompt)
        return out[:, : weights.rows]


@cache
def opened(isa: str) -> Threads:
    return Threads(isa)


@pytest.fixture(scope="module", params=ISAS)
def threads(request: pytest.FixtureRequest) -> Threads:
    return opened(request.param)


def test_the_library_is_built_for_the_set_that_it_says() -> None:
    assert [library.load(isa).infopt_isa().decode() for isa in ISAS] == list(ISAS)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS), rows=st.integers(1, 70), inner=st.integers(1, 200), tokens=st.integers(1, 19),
    has_bias=st.booleans(), seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_any_shape(threads: Threads, kind: Kind, rows: int, inner: int, tokens: int, has_bias: bool, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    weights = packed.pack(torch.randn(rows, inner, generator=source), kind)
    if has_bias:
        weights = weights.with_bias(torch.randn(rows, generator=source))
    x = torch.randn(tokens, inner, generator=source)
    wanted = packed.multiply(weights, x)
    # Of the terms, not of the sum, which may be near 0.
    assert threads.multiply(weights, x).sub(wanted).abs().max() <= 1e-5 * (1 + wanted.abs().max())


@pytest.mark.skipif("amx" not in ISAS, reason="this processor has no tiles")
@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["int8", "int4", "zeros"]), rows=st.integers(1, 70), inner=st.integers(1, 200),
    tokens=st.integers(1, 40), seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_tiles_of_integers_change_no_bit(kind: Any, rows: int, inner: int, tokens: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inner, generator=source)
    if kind == "zeros":
        q, zeros = (torch.randint(-8, 8, shape, generator=source) for shape in ((rows, inner), (rows, 1)))
        weights = packed.pack_integers(q.to(torch.int8), torch.rand(rows, 1, generator=source), zeros, 4, None)
    else:
        weights = packed.pack(torch.randn(rows, inner, generator=source), kind)
    tiled, lane_by_lane = (opened(isa).multiply(weights, x) for isa in ("amx", "avx512"))
    assert torch.equal(tiled, lane_by_lane)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS), rows=st.integers(1, 70), inner=st.integers(1, 200), tokens=st.integers(20, 100),
    has_bias=st.booleans(), seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_prompts_are_exact_or_have_both_operands_in_bfloat16(
    threads: Threads, kind: Kind, rows: int, inner: int, tokens: int, has_bias: bool, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    weights = packed.pack(torch.randn(rows, inner, generator=source), kind)
    if has_bias:
        weights = weights.with_bias(torch.randn(rows, generator=source))
    x = torch.randn(tokens, inner, generator=source)
    bias = 0 if weights.bias is None else weights.bias[:rows].double()
    exact = x.double() @ packed.dense(weights).double().T + bias
    found = threads.multiply(weights, x, is_prompt=True)
    if kind in ("float32", "bfloat16"):
        assert (found - exact).abs().max() <= 3e-6 * exact.abs().max() + 1e-6
    elif threads.library.infopt_isa() == b"amx" and tokens >= 32:
        rounded = x.bfloat16().double() @ packed.dense(weights).bfloat16().double().T + bias
        assert (found - rounded).abs().max() <= 3e-6 * rounded.abs().max() + 1e-6
    else:
        assert torch.equal(found, threads.multiply(weights, x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_in_a_prompt_is_not_lost(threads: Threads, kind: Kind) -> None:
    x = torch.ones(40, 64)
    x[33, 40] = torch.nan
    found = threads.multiply(packed.pack(torch.ones(20, 64), kind), x, is_prompt=True)
    assert found[33].isnan().all()
    assert found[[0, 32, 34]].isfinite().all()


@pytest.mark.parametrize("group", [32, 64, None])
def test_four_bits_with_zeros_and_wide_scales(threads: Threads, group: int | None) -> None:
    source = torch.Generator().manual_seed(1)
    q = torch.randint(-8, 8, (50, 192), generator=source).to(torch.int8)
    groups = 192 // (group or 192)
    scales, zeros = torch.rand(50, groups, generator=source) + 0.1, torch.randint(-8, 8, (50, groups), generator=source)
    weights = packed.pack_integers(q, scales, zeros, 4, group)
    assert weights.scales is not None
    assert weights.scales.dtype == torch.float32
    spread = 192 // groups
    dense = (q.float() - zeros.float().repeat_interleave(spread, 1)) * scales.repeat_interleave(spread, 1)
    assert torch.allclose(packed.dense(weights), dense, atol=1e-6)
    x = torch.randn(5, 192, generator=source)
    assert torch.allclose(threads.multiply(weights, x), packed.multiply(weights, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extremes(threads: Threads, kind: Kind, size: float) -> None:
    weights, x = packed.pack(torch.ones(16, 64), kind), torch.full((2, 64), size)
    x[1] = 0
    found = threads.multiply(weights, x)
    assert torch.allclose(found, packed.multiply(weights, x), rtol=1e-5)
    assert (found[1] == 0).all()


def test_the_lowest_bytes_do_not_overflow(threads: Threads) -> None:
    weights = packed.pack_integers(torch.full((16, 64), -128, dtype=torch.int8), torch.ones(16, 2), None, 8, 32)
    assert torch.equal(threads.multiply(weights, torch.full((1, 64), -1.0)), torch.full((1, 16), 128.0 * 64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_is_not_lost(threads: Threads, kind: Kind) -> None:
    x = torch.ones(3, 64)
    x[1, 40] = torch.nan
    found = threads.multiply(packed.pack(torch.ones(20, 64), kind), x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_is_what_was_given(kind: Kind) -> None:
    weight = torch.randn(37, 75)
    step = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1 / 127, "int4": 1 / 7}[kind]
    assert (packed.dense(packed.pack(weight, kind)) - weight).abs().max() <= step * weight.abs().max()


def test_gate_and_up_lie_side_by_side() -> None:
    gate, up = torch.arange(20.0)[:, None], 100 + torch.arange(20.0)[:, None]
    found = packed.paired(gate, up)[:, 0]
    assert found[:16].tolist() == gate[:16, 0].tolist()
    assert found[16:32].tolist() == up[:16, 0].tolist()
    assert found[32:].tolist() == [16, 17, 18, 19, *[0] * 12, 116, 117, 118, 119, *[0] * 12]


@pytest.mark.parametrize(("group", "bits", "has_zeros"), [(16, 4, False), (48, 4, False), (32, 8, True)])
def test_grids_that_the_kernels_do_not_have_are_refused(group: int, bits: int, has_zeros: bool) -> None:
    scales = torch.ones(16, 96 // group)
    with pytest.raises(ValueError, match=r"groups of|with zeros"):
        packed.pack_integers(torch.ones(16, 96, dtype=torch.int8), scales, scales if has_zeros else None, bits, group)
