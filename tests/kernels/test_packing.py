"""The library packs what the twin packs, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.kernels import packed, packing
from infopt.kernels.packed import KINDS, Packed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same(found: Packed, wanted: Packed) -> None:
    assert (found.kind, found.rows, found.inner, found.group) == (wanted.kind, wanted.rows, wanted.inner, wanted.group)
    for ours, theirs in ((found.weights, wanted.weights), (found.scales, wanted.scales), (found.zeros, wanted.zeros)):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(1, 70), st.integers(1, 100), st.integers(0, 99),
    st.sampled_from([1e-30, 1.0, 3e3]),
)  # fmt: skip
def test_any_shape_and_dtype(kind: packed.Kind, dtype: torch.dtype, rows: int, inner: int, seed: int, size: float) -> None:
    weight = (torch.randn(rows, inner, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    weight[seed % rows] *= seed % 3  # now and then a row of zeros
    same(packing.pack([weight], kind), packed.pack(weight, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_below_one_another_and_in_pairs(kind: packed.Kind) -> None:
    parts = [torch.randn(rows, 96) for rows in (48, 16, 32)]
    same(packing.pack(parts, kind), packed.pack(torch.cat(parts), kind))
    gate, up = torch.randn(2, 64, 96)
    same(packing.pack([gate, up], kind, in_pairs=True), packed.pack(packed.paired(gate, up), kind))
    both = torch.cat([gate, up])
    same(packing.pack(list(both.chunk(2)), kind, in_pairs=True), packed.pack(packed.paired(gate, up), kind))


@pytest.mark.parametrize(("bits", "has_zeros"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize("group", [32, 96, None])
def test_integers(bits: int, has_zeros: bool, group: int | None) -> None:
    low, high, groups = -(1 << (bits - 1)), 1 << (bits - 1), 1 if group is None else 96 // group
    q = torch.randint(low, high, (40, 96), dtype=torch.int8)
    scales = torch.rand(40, groups) + 0.1
    zeros = torch.randint(low, high, (40, groups), dtype=torch.int8) if has_zeros else None
    for each in (scales, scales.bfloat16()):  # kept in float32, and in bfloat16
        same(packing.pack_integers([q], each, zeros, bits, group), packed.pack_integers(q, each, zeros, bits, group))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_nan_stays_with_its_group(kind: packed.Kind) -> None:
    weight = torch.randn(16, 64)
    weight[3, 40] = torch.nan
    found = packing.pack([weight], kind)
    assert found.scales is not None
    assert found.scales[0, 1, 3].isnan()
    assert int(found.scales.isnan().sum()) == 1


def test_what_it_does_not_take() -> None:
    assert packing.takes([torch.zeros(5, 7)])
    assert not packing.takes([torch.zeros(5, 7), torch.zeros(16, 7)]), "they would share a block"
    assert not packing.takes([torch.zeros(5, 7, dtype=torch.float64)])
    assert not packing.takes([torch.zeros(7, 5).T])


def test_a_grid_that_the_kernels_do_not_multiply_is_refused_as_the_twin_refuses_it() -> None:
    q = torch.zeros(16, 96, dtype=torch.int8)
    for groups, bits, group, zeros in ((3, 8, None, None), (2, 4, 48, None), (1, 8, None, torch.zeros(16, 1))):
        said = []
        for pack in (lambda *grid: packing.pack_integers([q], *grid), lambda *grid: packed.pack_integers(q, *grid)):
            with pytest.raises(ValueError, match=r"groups of|with zeros") as caught:
                pack(torch.ones(16, groups), zeros, bits, group)
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_subclasses_of_tensors_are_not_taken() -> None:
    class Own(torch.Tensor):
        pass

    assert not packing.takes([torch.zeros(4, 4).as_subclass(Own)])
