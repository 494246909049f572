"""What is stored, read by our own decoder in plain torch, against what stays in memory; every format, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infopt.errors import InputError, RecipeError
from infopt.layers import grid, packing, rounding
from infopt.layers.grid import Grid
from infopt.model import packed_shapes

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FLOATS = [Grid(8, kind="fp8"), Grid(4, 32, kind="mxfp4"), Grid(4, 16, kind="nvfp4")]


def integers(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """[rows, words] int32 → [rows, count]: little-endian runs of `bits`, offset by half their range."""
    rows = []
    for row in words.tolist():
        whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        if packed_shapes.packing_of(len(row), count, bits) == "padded":
            each = 32 // bits
            places = [32 * (i // each) + bits * (i % each) for i in range(count)]
        else:
            places = [bits * i for i in range(count)]
        rows.append([((whole >> place) & (2**bits - 1)) - 2 ** (bits - 1) for place in places])
    return torch.tensor(rows)


def decoded(packed: dict[str, torch.Tensor], rule: Grid, shape: tuple[int, int]) -> torch.Tensor:
    """The weight that the stored tensors stand for, float32."""
    out, inner = shape
    if rule.kind in ("mxfp4", "nvfp4"):
        codes = torch.stack([packed["weight_packed"] & 15, packed["weight_packed"] >> 4], -1).flatten(1).long()
        values = E2M1[codes & 7] * (1 - 2 * (codes >> 3))
        scale = packed["weight_scale"]
        real = torch.exp2(scale.float() - 127) if rule.kind == "mxfp4" else scale.float() / packed["weight_global_scale"]
        return (values * real.repeat_interleave(rule.group_size or inner, 1)).bfloat16().float()
    scale = packed["weight_scale"].float().repeat_interleave(rule.group_size or inner, 1)
    if rule.format != "pack-quantized":
        return packed["weight"].float() * scale
    q = integers(packed["weight_packed"], rule.bits, inner)
    if not rule.symmetric:
        zero = integers(packed["weight_zero_point"].T, rule.bits, out).T
        q = q - zero.repeat_interleave(rule.group_size or inner, 1)
    assert packed["weight_shape"].tolist() == [out, inner]
    return q * scale


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 3), st.sampled_from([8, 16, None]), st.sampled_from([2, 3, 4, 8]), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
def test_integers_round_trip(rows: int, groups: int, group: int | None, bits: int, symmetric: bool, seed: int) -> None:
    rule, shape = Grid(bits, group, symmetric=symmetric), (rows, groups * (group or 24))
    assume(symmetric or bits != 4 or groups == 1 or not group)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    scales = packing.fit(weight, rule)
    packed, dense = packing.store(weight, scales, rule)
    assert torch.equal(decoded(packed, rule, shape), dense)
    assert torch.equal(packing.nearest(weight, packing.spread(scales, rule, shape[1]), rule), dense)
    assert sum(tensor.nbytes for tensor in packed.values()) == rule.stored_bytes(shape, 4)
    step = packing.spread(scales, rule, shape[1]).scale
    assert ((dense - weight).abs() <= step * (0.501 if symmetric else 1.001)).all()


@pytest.mark.parametrize("rule", FLOATS, ids=lambda rule: rule.kind)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6), st.floats(1e-3, 10))
def test_floats_round_trip(rule: Grid, rows: int, groups: int, seed: int, size: float) -> None:
    shape = (rows, 32 * groups)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    packed, dense = packing.pack(weight, rule)
    assert torch.equal(decoded(packed, rule, shape), dense)
    assert sum(tensor.nbytes for tensor in packed.values()) == rule.stored_bytes(shape, 4)
    points = packing.nearest(weight, packing.spread(packing.fit(weight, rule), rule, shape[1]), rule)
    assert torch.allclose(points, dense, rtol=2**-8)


def test_asymmetric_in_float64_by_hand() -> None:
    # Range −1 … 2 on 2 bits: scale 1, zero −1 (the point of −1 is q = −2); 0.4 → 0, 0.6 → 1.
    packed, dense = packing.pack(torch.tensor([[-1.0, 2.0, 0.4, 0.6]]), Grid(2, 4, symmetric=False))
    assert dense.tolist() == [[-1.0, 2.0, 0.0, 1.0]]
    assert packed["weight_scale"].item() == 1
    assert integers(packed["weight_packed"], 2, 4).tolist() == [[-2, 1, -1, 0]]


@pytest.mark.parametrize("rows", [9, 17])
def test_four_bit_zero_points_of_several_groups(rows: int) -> None:
    rule = Grid(4, 8, symmetric=False)
    packed, dense = packing.pack(torch.randn(rows, 24, generator=torch.Generator().manual_seed(0)), rule)
    assert torch.equal(decoded(packed, rule, (rows, 24)), dense)
    with pytest.raises(InputError, match="a layer of 8 outputs cannot have 4-bit zero points"):
        packing.pack(torch.randn(8, 24), rule)


def test_zero_points_help_a_skewed_weight() -> None:
    weight = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    error = [float((packing.pack(weight, Grid(3, 32, symmetric=flag))[1] - weight).norm()) for flag in (True, False)]
    assert error[1] < 0.6 * error[0]


def test_int8_with_activations_is_stored_as_bytes() -> None:
    rule = Grid(8, activations="token")
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    packed, dense = packing.pack(weight, rule)
    assert {name: tensor.dtype for name, tensor in packed.items()} == {"weight": torch.int8, "weight_scale": torch.float32}
    assert torch.equal(dense, packing.pack(weight, Grid(8))[1])
    assert sum(tensor.nbytes for tensor in packed.values()) == rule.stored_bytes((5, 24), 4)


def test_mxfp4_by_hand() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([12.0, -5.1, 2.4, 0.49, 0.51, -0.6])
    packed, dense = packing.pack(weight, Grid(4, 32, kind="mxfp4"))
    assert packed["weight_scale"].item() == 128  # 12 = 6 · 2, and 2 = 2^(128 − 127)
    assert dense[0, :6].tolist() == [12.0, -6.0, 2.0, 0.0, 1.0, -1.0]
    assert packed["weight_packed"][0, 0].item() == 0xD7  # −3 is 1101, 6 is 0111


def test_nvfp4_shares_one_scale_among_layers_that_run_as_one_matrix() -> None:
    layers = {name: torch.nn.Linear(16, 4, bias=False) for name in ("a.q_proj", "a.k_proj", "m.up_proj")}
    for scale, layer in enumerate(layers.values(), 1):
        layer.weight.data.fill_(float(scale))
    overall = rounding.shared_scales(layers)
    assert overall["a.q_proj"] == overall["a.k_proj"] == 448 * 6 / 2
    assert overall["m.up_proj"] == 448 * 6 / 3
    packed, dense = packing.pack(layers["a.q_proj"].weight, Grid(4, 16, kind="nvfp4"), overall["a.q_proj"])
    assert packed["weight_global_scale"].item() == 1344
    assert torch.equal(dense, torch.ones(4, 16))


def test_groups_come_apart_and_together() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    for rule in (Grid(4, 16), Grid(3, 16, symmetric=False), Grid(4, 16, kind="nvfp4")):
        scales = packing.fit(weight, rule)
        each = scales.by_group()
        assert [tuple(part.scale.shape) for part in each] == [(1, 6)] * 4
        for before, after in zip(scales, packing.Scales.of_groups(each), strict=True):
            assert (before is None and after is None) or torch.equal(before, after)
        assert torch.equal(scales.rows(slice(1, 3)).scale, scales.scale[1:3])
        assert scales.columns(slice(0, 2)).overall is scales.overall


def test_one_config_may_hold_several_formats() -> None:
    found = packing.config({"a": Grid(4, 32), "b": Grid(8, kind="fp8"), "c": Grid(4, 32)}, ["lm_head"])
    assert found["format"] == "mixed-precision"
    groups = {tuple(group["targets"]): group["format"] for group in found["config_groups"].values()}
    assert groups == {("a", "c"): "pack-quantized", ("b",): "float-quantized"}
    assert packing.config({"a": Grid(4, 32), "b": Grid(8, 32)}, [])["format"] == "pack-quantized"


def test_integer_activations_that_no_engine_multiplies_are_refused() -> None:
    grid.check_activations(Grid(8, activations="token"), "steps[0].rtn")
    grid.check_activations(Grid(3, 64, symmetric=False), "steps[0].rtn")
    for rule, option in (
        (Grid(3, activations="token"), "bits: found 3; allowed with activations: token is 8"),
        (Grid(8, 64, activations="token"), "group_size: found 64; allowed with activations: token is null"),
        (Grid(8, symmetric=False, activations="token"), "symmetric: found false; allowed with activations: token is true"),
    ):
        with pytest.raises(RecipeError) as caught:
            grid.check_activations(rule, "steps[0].rtn")
        assert str(caught.value) == f"steps[0].rtn.{option}"
        assert (caught.value.hint or "").endswith("or activations: none")


def test_fixed_groups_that_do_not_divide_are_refused() -> None:
    layers = {"model.layers.0.mlp.up_proj": (64, 96), "model.layers.0.mlp.down_proj": (64, 48)}
    grid.check_fixed_groups(layers, "nvfp4", "steps[0].nvfp4")
    with pytest.raises(RecipeError, match=r"mxfp4 has one scale per 32 inputs, .* 48 inputs of model\.layers\.0\.mlp\.down_proj"):
        grid.check_fixed_groups(layers, "mxfp4", "steps[0].mxfp4")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_of_zero_points_are_counted(bits: int) -> None:
    plain, zeros = Grid(bits, 32), Grid(bits, 32, symmetric=False)
    assert zeros.stored_bytes((50, 64), 2) - plain.stored_bytes((50, 64), 2) == 4 * math.ceil(50 * bits / 32) * 2
