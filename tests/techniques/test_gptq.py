"""GPTQ against its definition in float64, and on real text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_techniques import CALIBRATION

from infopt.errors import InputError, RecipeError
from infopt.layers import packing
from infopt.layers.grid import Grid
from infopt.model import load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.protocols import Context
from infopt.techniques.gptq import inverse_factor, round_columns


def problem(rows: int, inner: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, correlated inputs, and their Hessian."""
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=made) * torch.rand(inner, generator=made).pow(2)
    x = torch.randn(4 * inner, inner, generator=made) @ mix.T
    return torch.randn(rows, inner, generator=made), x, 2 * x.T @ x / len(x)


def loss(weight: torch.Tensor, rounded: torch.Tensor, x: torch.Tensor) -> float:
    return float(((weight - rounded).double() @ x.double().T).square().mean())


def by_definition(weight: torch.Tensor, hessian: torch.Tensor, rule: Grid, damping: float, order: list[int]) -> torch.Tensor:
    """OBQ in a fixed order (GPTQ, equation 2 and 3): the inverse of the Hessian of what is left is taken anew each step."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    scales = packing.spread(packing.fit(weight, rule), rule, weight.shape[1])
    left = list(order)
    for column in order:
        inverse = torch.linalg.inv(h[left][:, left])
        q = packing.nearest(w[:, [column]].float(), scales.columns(slice(column, column + 1)), rule).double()
        update = (w[:, [column]] - q) / inverse[0, 0] * inverse[:1]
        w[:, left] -= update
        w[:, [column]] = q
        left.remove(column)
    return w.float()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_is_optimal_brain_quantization_in_a_fixed_order(act_order: bool, symmetric: bool) -> None:
    weight, _, hessian = problem(6, 160)  # more than one block of columns
    # One group spans the row, so that both orders use the same scales.
    rule = Grid(4, None, symmetric=symmetric)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(160))
    expected = by_definition(weight, hessian, rule, 0.01, order)
    ours, _ = round_columns(weight.clone(), hessian.clone(), rule, torch.float32, act_order, 0.01, clip=False)
    # A sum that lands on the edge of two steps may fall to either side; that is one weight in thousands.
    assert (ours - expected).abs().gt(1e-4).float().mean() < 0.02


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([2, 3, 4]),
    st.sampled_from([16, 32, 96, None]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_never_loses_to_rounding_by_much_and_stays_on_the_grid(
    bits: int, group_size: int | None, symmetric: bool, act_order: bool, clip: bool, seed: int
) -> None:
    weight, x, hessian = problem(16, 96, seed)
    rule = Grid(bits, group_size, symmetric=symmetric)
    rounded, scales = round_columns(weight.clone(), hessian.clone(), rule, torch.float32, act_order, 0.01, clip)
    nearest = packing.nearest(weight.clone(), packing.spread(packing.fit(weight, rule), rule, 96), rule)
    assert loss(weight, rounded, x) < loss(weight, nearest, x)
    _, dense = packing.store(rounded, scales, rule)
    torch.testing.assert_close(dense, rounded)


def test_inputs_that_are_never_seen_are_rounded_as_they_are() -> None:
    weight, _, hessian = problem(4, 64)
    hessian[10] = hessian[:, 10] = 0
    rule = Grid(4, 32)
    ours, _ = round_columns(weight.clone(), hessian, rule, torch.float32, True, 0.01, clip=False)
    nearest = packing.nearest(weight.clone(), packing.spread(packing.fit(weight, rule), rule, 64), rule)
    assert torch.equal(ours[:, 10], nearest[:, 10])


def test_ranges_are_cut_where_that_costs_least() -> None:
    weight, _, hessian = problem(6, 64)
    weight[2, 40] = 2 * weight.abs().max()  # alone in its group, and hardly ever seen
    importance = hessian.diagonal().clone()
    importance[40] = 1e-6
    rule = Grid(3, 32)
    scales = packing.fit_cut(weight, importance, rule)
    costs = []
    for cut in packing.CUTS:
        tried = packing.spread(packing.fit(weight, rule, shrink=cut), rule, 64)
        costs.append((packing.nearest(weight, tried, rule) - weight).square().mul(importance).view(6, 2, 32).sum(-1))
    found = (packing.nearest(weight, packing.spread(scales, rule, 64), rule) - weight).square().mul(importance)
    torch.testing.assert_close(found.view(6, 2, 32).sum(-1), torch.stack(costs).amin(0))
    assert scales.scale[2, 1] == packing.fit(weight, rule, shrink=min(packing.CUTS)).scale[2, 1]


def test_the_factor_is_that_of_the_inverse() -> None:
    _, _, hessian = problem(1, 48)
    damped = hessian.double() + 0.05 * hessian.diagonal().double().mean() * torch.eye(48)
    upper = inverse_factor(hessian.clone(), 0.05).double()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(48, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert torch.equal(upper, upper.triu())


def test_a_hessian_without_an_inverse_is_told() -> None:
    with pytest.raises(InputError, match=r"the inputs of layers\.0\.up_proj are too much alike") as caught:
        inverse_factor(-torch.eye(4) + 0.5, 1e-9, "layers.0.up_proj")
    assert "raise damping" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inputs_that_are_not_finite_are_told(value: float, dtype: torch.dtype) -> None:
    weight, _, hessian = problem(4, 64)
    hessian[3, 5] = value
    with pytest.raises(InputError, match=r"the inputs of layers\.0\.up_proj are not all finite") as caught:
        round_columns(weight, hessian, Grid(4, 32), dtype, True, 0.01, True, "layers.0.up_proj")
    assert ("bfloat16" in caught.value.hint) is (dtype == torch.float16)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("silent", [1, 8, 64])
def test_silent_inputs_have_no_say_in_how_others_are_rounded(silent: int, scale: float) -> None:
    weight, x, hessian = problem(16, 64)
    rule = Grid(4, 64)
    expected, _ = round_columns(weight.clone(), hessian * scale**2, rule, torch.float32, True, 0.01, clip=False)
    wider = torch.zeros(64 + silent, 64 + silent)
    wider[:64, :64] = hessian * scale**2
    ours = inverse_factor(wider.clone(), 0.01)
    torch.testing.assert_close(ours[:64, :64], inverse_factor(hessian * scale**2, 0.01), rtol=1e-3, atol=1e-5 / scale)
    assert torch.equal(ours[:64, 64:], torch.zeros(64, silent))
    unheard, _ = round_columns(weight.clone(), torch.zeros(64, 64), rule, torch.float32, True, 0.01, clip=False)
    assert loss(weight, expected, x) < loss(weight, unheard, x)
    assert torch.equal(unheard, packing.rounded(weight, packing.fit(weight, rule), rule))


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("options", [{}, {"act_order": False, "bits": 3}, {"true_sequential": False, "group_size": None}])
def test_every_architecture_loads_back(
    kind: str,
    options: dict[str, Any],
    make: Callable[..., Any],
    build: Callable[..., Any],
    logits: Callable[..., Any],
    tmp_path: Path,
) -> None:
    bundle = build(make("gptq", **{"group_size": 32, **options}), kind)
    assert len(bundle.packed) == sum(1 for name in shapes.shapes(reference.parse(kind)).linear)
    save.save(bundle, tmp_path / "out")
    plain = load.load(reference.parse(str(tmp_path / "out")))
    torch.testing.assert_close(logits(plain), logits(bundle), rtol=0, atol=1e-5)


def test_keeps_the_output_closer_than_rounding_does(
    make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    ids = torch.tensor(CALIBRATION)

    def error(bundle: Bundle) -> float:
        with torch.inference_mode():
            return float((bundle.model(input_ids=ids).logits - tiny_bundle.model(input_ids=ids).logits).square().mean())

    plain = error(build(make("rtn", bits=4, group_size=64)))
    assert error(build(make("gptq"))) < 0.8 * plain
    assert error(build(make("gptq", true_sequential=False))) < 0.8 * plain


def test_refuses_groups_that_do_not_divide_and_a_second_quantization(make: Callable[..., Any], tiny_bundle: Bundle) -> None:
    with pytest.raises(RecipeError, match="found 48, which does not divide the 64 inputs"):
        make("gptq", group_size=48).check(shapes.shapes(reference.parse("tiny")), "steps[0].gptq")
    context = Context(calibration_ids=CALIBRATION)
    once = make("gptq", group_size=32).apply(tiny_bundle, context)
    with pytest.raises(InputError, match="quantized already"):
        make("gptq", group_size=32).apply(replace(once), context)


def test_a_short_text_is_enough_with_damping(make: Callable[..., Any], tiny_bundle: Bundle) -> None:
    """Fewer tokens than inputs: the Hessian alone has no inverse, the damped one has."""
    bundle = make("gptq").apply(tiny_bundle, Context(calibration_ids=(CALIBRATION[0][:16],)))
    assert all(torch.isfinite(p).all() for p in bundle.model.parameters())


def test_refuses_a_head_of_its_own(make: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match="lm_head lies beside the decoder blocks"):
        make("gptq", ignore=[], group_size=32).check(shapes.shapes(reference.parse("tiny-qwen2")), "steps[0].gptq")


def test_eight_bits_with_activations_load_back(
    make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    technique = make("gptq", bits=8, group_size=None, activations="token")
    technique.check(shapes.shapes(reference.parse("tiny")), "steps[0].gptq")
    bundle = build(technique)
    save.save(bundle, tmp_path / "out")
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    torch.testing.assert_close(logits(again), logits(bundle), rtol=0, atol=1e-5)
    with pytest.raises(RecipeError, match="found 4; allowed with activations: token is 8"):
        make("gptq", activations="token", group_size=None).check(shapes.shapes(reference.parse("tiny")), "steps[0].gptq")
