"""AWQ against its definition in float64, on planted outliers, and on real text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stub_techniques import CALIBRATION

from infopt.calibrate.smoothing import Fold
from infopt.errors import InputError, RecipeError
from infopt.layers.grid import Grid
from infopt.model import load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.protocols import Context
from infopt.techniques import awq
from infopt.techniques.awq import best_cut, best_scale, cost, refined, to_nearest

FREE = Fold("norm", (), torch.arange(64))


def problem(seed: int = 0, outlier: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [24, 64], inputs [200, 64] whose channel 5 is `outlier` times as large, and their Hessian."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 64, generator=made) @ (torch.eye(64) + torch.randn(64, 64, generator=made) / 16)
    x *= torch.rand(64, generator=made) + 0.5
    x[:, 5] *= outlier
    return torch.randn(24, 64, generator=made), x, 2 * x.T @ x / len(x)


def round_plainly(weight: torch.Tensor, size: int, shrink: float = 1.0) -> torch.Tensor:
    """4 bits, symmetric, float64: largest magnitude ↦ 7.5, integers −8 … 7."""
    groups = weight.view(len(weight), -1, size)
    step = groups.abs().amax(-1, keepdim=True) * shrink / 7.5
    return ((groups / step).round().clamp(-8, 7) * step).view(weight.shape)


def loss(x: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """‖x·Δᵀ‖² ÷ tokens, per row of Δ."""
    return (x.double() @ error.double().T).square().mean(0)


@pytest.mark.parametrize("seed", range(4))
def test_the_scale_is_the_best_of_either_form_on_the_tokens_themselves(seed: int) -> None:
    weight, x, hessian = problem(seed, outlier=4.0)
    losses, tried = [], []
    groups = weight.double().abs().view(24, 2, 32)
    near = (groups / groups.amax(-1, keepdim=True)).mean(0).flatten()
    for index in range(40):
        point = index % 20
        scale = x.double().abs().mean(0) ** (point / 20) / (1 if index < 20 else near ** (1 - point / 20))
        tried.append(scale / (scale.max() * scale.min()).sqrt())
        losses.append(float(loss(x, round_plainly(weight.double() * tried[-1], 32) / tried[-1] - weight).sum()))
    ours = best_scale(weight, hessian, x.abs().mean(0), FREE, Grid(4, 32), 20, False).double()
    chosen = [index for index, scale in enumerate(tried) if torch.allclose(ours, scale, rtol=1e-5, atol=1e-5)]
    assert len(chosen) == 1
    assert losses[chosen[0]] < 1.01 * min(losses)  # a weight between two steps may fall to either side in float32


@pytest.mark.parametrize("bits", [3, 4])
def test_a_planted_outlier_is_scaled_up_and_costs_less(bits: int) -> None:
    weight, x, hessian = problem(outlier=30.0)
    rule = Grid(bits, 32)
    scale = best_scale(weight, hessian, x.abs().mean(0), FREE, rule, 20, False)
    assert scale.argmax() == 5
    assert (
        loss(x, to_nearest(weight * scale, rule) / scale - weight).sum() < 0.6 * loss(x, to_nearest(weight, rule) - weight).sum()
    )


def test_a_column_that_nothing_reads_scales_nothing_else() -> None:
    weight, x, hessian = problem(outlier=8.0)
    with_it = best_scale(weight, hessian, x.abs().mean(0), FREE, Grid(4, 32), 20, False)
    weight[:, 40] = 0
    without = best_scale(weight, hessian, x.abs().mean(0), FREE, Grid(4, 32), 20, False)
    assert 0.2 < without.min() / with_it.min() < 5
    assert 0.2 < without.max() / with_it.max() < 5


def test_inputs_that_share_a_source_get_one_scale() -> None:
    weight, x, hessian = problem(outlier=8.0)
    fold = Fold("v_proj", (), torch.arange(16).repeat(4))
    scale = best_scale(weight, hessian, x.abs().mean(0), fold, Grid(4, 32), 20, False).view(4, 16)
    assert all(torch.equal(part, scale[0]) for part in scale)
    assert not torch.equal(scale, torch.ones_like(scale))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.sampled_from([16, 32, None]), st.booleans(), st.integers(0, 1000))
def test_clipping_never_costs_a_group_more(bits: int, group_size: int | None, symmetric: bool, seed: int) -> None:
    weight, x, hessian = problem(seed)
    rule = Grid(bits, group_size, symmetric=symmetric)
    size = group_size or 64
    shrink = best_cut(weight, hessian, rule)
    again = refined(shrink, weight, hessian, rule)
    assert all(cut in torch.tensor(awq.CUTS) for cut in shrink.flatten())
    clipped, plain = to_nearest(weight, rule, shrink) - weight, to_nearest(weight, rule) - weight
    least = cost(to_nearest(weight, rule, again) - weight, hessian)
    assert least <= cost(clipped, hessian) * (1 + 1e-4), "the others' errors in view"
    for start in range(0, 64, size):
        part = slice(start, start + size)
        assert (loss(x[:, part], clipped[:, part]) <= loss(x[:, part], plain[:, part]) * (1 + 1e-4)).all()


def test_clipping_is_that_of_the_tokens_themselves() -> None:
    weight, x, hessian = problem(1)
    expected = torch.empty(24, 2)
    for group in range(2):
        part = slice(32 * group, 32 * group + 32)
        w = weight[:, part].double()
        losses = torch.stack([loss(x[:, part], round_plainly(w, 32, cut) - w) for cut in awq.CUTS])
        expected[:, group] = torch.tensor(awq.CUTS)[losses.argmin(0)]
    assert (best_cut(weight, hessian, Grid(4, 32)) == expected).float().mean() > 0.95  # near ties fall to either side
    assert len(expected.unique()) > 2


def test_a_large_weight_that_meets_nothing_is_cut() -> None:
    weight, x, _ = problem()
    weight[:, 7] = 6.0
    x[:, 7] = 0
    assert (best_cut(weight, 2 * x.T @ x / len(x), Grid(4, 32))[:, 0] < 0.8).all()


def test_without_scales_and_cuts_it_is_rounding(make: Callable[..., Any], build: Callable[..., Any]) -> None:
    ours, plain = build(make("awq", points=1, clip=False)), build(make("rtn"))
    assert ours.packed.keys() == plain.packed.keys()
    for name, tensors in plain.packed.items():
        assert all(torch.equal(ours.packed[name][part], tensor) for part, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("options", [{}, {"bits": 3, "group_size": None}, {"symmetric": False}])
def test_every_architecture_loads_back(
    kind: str,
    options: dict[str, Any],
    make: Callable[..., Any],
    build: Callable[..., Any],
    logits: Callable[..., Any],
    tmp_path: Path,
) -> None:
    technique = make("awq", **{"group_size": 32, **options})
    bundle = build(technique, kind)
    assert len(bundle.packed) == len(shapes.shapes(reference.parse(kind)).linear)
    save.save(bundle, tmp_path / "out")
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    torch.testing.assert_close(logits(again), logits(bundle), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])
def test_keeps_the_output_closer_than_rounding_does(kind: str, make: Callable[..., Any], build: Callable[..., Any]) -> None:
    """Channels of a random model are all alike, so a few are planted that are not."""

    def error(name: str, **options: Any) -> float:
        before, bundle = (load.load(reference.parse(kind)) for _ in range(2))
        for model in (before.model, bundle.model):
            plant(model)
        bundle = make(name, **options).apply(bundle, Context(calibration_ids=CALIBRATION))
        ids = torch.tensor(CALIBRATION)
        with torch.inference_mode():
            return float((bundle.model(input_ids=ids).logits - before.model(input_ids=ids).logits).square().mean())

    plain = error("rtn")
    assert error("awq", clip=False) < 0.9 * plain
    assert error("awq") < 0.8 * plain


def plant(model: Any) -> None:
    """Makes a few channels of each norm 20 times as large, and what reads them a quarter as large: they now dominate."""
    for layer in model.model.layers:
        second = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        attention = layer.self_attn
        readers = ((attention.q_proj, attention.k_proj, attention.v_proj), (layer.mlp.gate_proj, layer.mlp.up_proj))
        for norm, linears in zip((layer.input_layernorm, second), readers, strict=True):
            offset = float(type(norm).__name__.startswith("Gemma"))
            norm.weight.data[[3, 40]] = (norm.weight.data[[3, 40]] + offset) * 20 - offset
            for linear in linears:
                linear.weight.data[:, [3, 40]] /= 20


def test_layers_left_alone_still_answer_as_before(make: Callable[..., Any], tiny_bundle: Bundle) -> None:
    first = tiny_bundle.model.get_submodule("model.layers.0")
    seen: list[torch.Tensor] = []
    keys: Any = first.get_submodule("self_attn.k_proj")
    hook = keys.register_forward_hook(lambda module, given, out: seen.append(out))
    ids = torch.tensor(CALIBRATION[:2])
    before = keys.weight.clone()
    with torch.inference_mode():
        tiny_bundle.model(input_ids=ids)
        bundle = make("awq", ignore=["k_proj", "lm_head"]).apply(tiny_bundle, Context(calibration_ids=CALIBRATION))
        seen = seen[:1]
        bundle.model(input_ids=ids)
    hook.remove()
    assert not any("k_proj" in name for name in bundle.packed)
    assert not torch.equal(keys.weight, before)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_bits(make: Callable[..., Any], build: Callable[..., Any], tmp_path: Path) -> None:
    whole = build(make("awq"), "tiny-gemma3")

    def stop(line: str) -> None:
        if "block 2/" in line:
            raise KeyboardInterrupt

    for progress in (stop, lambda line: None):
        context = Context(calibration_ids=CALIBRATION, unfinished=tmp_path / "own", progress=progress)
        try:
            bundle = make("awq").apply(load.load(reference.parse("tiny-gemma3")), context)
        except KeyboardInterrupt:
            continue
    for (name, ours), theirs in zip(bundle.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(torch.equal(bundle.packed[name]["weight_packed"], parts["weight_packed"]) for name, parts in whole.packed.items())


def test_bad_options_and_a_second_quantization_are_refused(make: Callable[..., Any], tiny_bundle: Bundle) -> None:
    for options in ({"bits": 5}, {"points": 0}, {"group_size": 4}, {"clip": "yes"}):
        with pytest.raises(ValidationError):
            make("awq", **options)
    with pytest.raises(RecipeError, match="found 48, which does not divide the 64 inputs"):
        make("awq", group_size=48).check(shapes.shapes(reference.parse("tiny")), "steps[0].awq")
    with pytest.raises(InputError, match="needs text"):
        make("awq").apply(tiny_bundle, Context())
    context = Context(calibration_ids=CALIBRATION)
    once = make("awq").apply(tiny_bundle, context)
    with pytest.raises(InputError, match="quantized already"):
        make("awq").apply(once, context)
