"""The grid's arithmetic, and packing against plain torch and against what a reload makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.errors import InputError, RecipeError
from infopt.layers import grid, packing
from infopt.layers.grid import Grid
from infopt.protocols import Shapes


def shapes(hidden: int = 576, inner: int = 1536, *, tied: bool = True) -> Shapes:
    linear = {
        "model.layers.0.self_attn.q_proj": (hidden, hidden),
        "model.layers.0.mlp.up_proj": (inner, hidden),
        "model.layers.0.mlp.down_proj": (hidden, inner),
    }
    return Shapes("X", 1, hidden, 9, 3, 64, 1000, 512, linear, (1000, hidden), tied, 1000 * hidden, 10)


def test_ignore_takes_globs_over_names_and_last_parts() -> None:
    assert grid.is_ignored("model.layers.0.mlp.up_proj", ["up_proj"])
    assert grid.is_ignored("model.layers.0.mlp.up_proj", ["*.0.mlp.*"])
    assert not grid.is_ignored("model.layers.0.mlp.up_proj", ["mlp", "proj", "model.layers.0"])


def test_an_untied_head_can_be_chosen_and_a_tied_one_cannot() -> None:
    assert "lm_head" in grid.chosen(shapes(tied=False), [])
    assert "lm_head" not in grid.chosen(shapes(tied=False), ["lm_head"])
    assert "lm_head" not in grid.chosen(shapes(), [])
    grid.check_ignore(shapes(tied=False), [], "steps[0].rtn")
    with pytest.raises(RecipeError, match=r"^steps\[0\]\.rtn\.ignore: .* shares its weight") as caught:
        grid.check_ignore(shapes(), [], "steps[0].rtn")
    assert caught.value.hint == "add lm_head to ignore"


def test_a_pattern_that_names_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"ignore\[1\]: unknown module 'down_porj'; did you mean 'down_proj'\?"):
        grid.check_ignore(shapes(), ["lm_head", "down_porj"], "steps[0].rtn")


def test_an_impossible_group_size_names_the_possible_ones() -> None:
    layers = grid.chosen(shapes(), ["lm_head"])
    for size in (None, 16, 32, 64, 96, 192, 8, 24):
        grid.check_groups(layers, size, "steps[0].rtn.group_size")
    with pytest.raises(RecipeError) as caught:
        grid.check_groups(layers, 128, "steps[0].rtn.group_size")
    assert str(caught.value) == (
        "steps[0].rtn.group_size: found 128, which does not divide the 576 inputs of model.layers.0.self_attn.q_proj; "
        "allowed: 16, 32, 48, 64, 96, 192 or null (one scale per row)"
    )
    grid.check_groups({}, 7, "x")
    with pytest.raises(RecipeError, match=r"allowed: null \(one scale per row\)$"):
        grid.check_groups({"a": (8, 7)}, 4, "x")


def by_hand(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Round to nearest in float64, one group at a time."""
    out = torch.empty_like(weight, dtype=torch.float64)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            values = weight[row, start : start + group].double()
            scale = values.abs().max() / ((high - low) / 2)
            out[row, start : start + group] = (values / scale).round().clamp(low, high) * scale
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, None])
def test_packing_rounds_to_nearest(bits: int, group: int | None) -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    _, dense = packing.pack(weight, Grid(bits, group))
    expected = by_hand(weight, bits, group or 48)
    # A value half way between two points may go either way in float32: all but such are equal.
    assert ((dense - expected).abs() < 1e-6).float().mean() > 0.98
    assert (dense - expected).abs().max() < 2.2 * weight.abs().max() / (2**bits - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([4, 8]), st.integers(0, 10**6), st.floats(1e-6, 1e4))
def test_no_weight_moves_by_more_than_half_a_step(rows: int, groups: int, bits: int, seed: int, size: float) -> None:
    weight = torch.randn(rows, groups * 8, generator=torch.Generator().manual_seed(seed)) * size
    packed, dense = packing.pack(weight, Grid(bits, 8))
    step = packed["weight_scale"].repeat_interleave(8, dim=1)
    assert ((dense - weight).abs() <= step * 0.501).all()
    assert packed["weight_packed"].dtype == torch.int32
    assert packed["weight_shape"].tolist() == [rows, groups * 8]


def test_points_of_the_grid_stay_where_they_are() -> None:
    q = torch.randint(-7, 8, (4, 32), generator=torch.Generator().manual_seed(2)).float()
    q[:, 0] = -7.5  # sets the scale to exactly one
    _, dense = packing.pack(q, Grid(4, 32))
    assert torch.equal(dense[:, 1:], q[:, 1:])


@pytest.mark.parametrize("shape", [(11, 36), (64, 64), (17, 8)])
@pytest.mark.parametrize("grid_", [Grid(4, 4), Grid(8), Grid(8, 4, scale_dtype="bfloat16")])
def test_stored_bytes_are_those_of_the_tensors(grid_: Grid, shape: tuple[int, int]) -> None:
    packed, _ = packing.pack(torch.randn(shape), grid_)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    assert grid_.stored_bytes(shape, model_bytes=4) == stored


def test_scales_are_rounded_before_weights_are() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    packed, dense = packing.pack(weight, Grid(4, 64, scale_dtype="bfloat16"))
    scale = packed["weight_scale"]
    assert scale.dtype == torch.bfloat16
    q = dense / scale.float()
    assert torch.allclose(q, q.round(), atol=1e-5)
    assert ((q.round().clamp(-8, 7)) == (weight / scale.float()).round().clamp(-8, 7)).all()


def test_a_scale_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"scale does not fit torch\.float16") as caught:
        packing.pack(torch.full((2, 8), 1e7), Grid(4, 8, scale_dtype="float16"))
    assert caught.value.hint == "set scale_dtype: float32"


def test_a_zero_group_stays_zero() -> None:
    weight = torch.zeros(2, 16)
    weight[0, :8] = 1
    _, dense = packing.pack(weight, Grid(4, 8))
    assert dense[1].abs().max() == 0
    assert dense[0, 8:].abs().max() == 0
