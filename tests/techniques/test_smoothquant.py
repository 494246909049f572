"""SmoothQuant: a float transform that changes nothing, and lets 8-bit activations through where outliers stood in the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stub_techniques import CALIBRATION, chosen

from infopt import optimize
from infopt.errors import InputError, RecipeError
from infopt.model import load, reference, shapes
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.protocols import Context
from infopt.settings import LoadOptions
from infopt.techniques import smoothquant

Make = Callable[..., Any]
KINDS = ("tiny", "tiny-qwen2", "tiny-gemma3")
CONTEXT = Context(calibration_ids=CALIBRATION)
IDS = torch.tensor(CALIBRATION)
W8A8 = {"bits": 8, "group_size": None, "activations": "token"}


def answers(bundle: Bundle) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = bundle.model(input_ids=IDS).logits
    return found


def with_outliers(kind: str = "tiny") -> Bundle:
    """The same function, with a few input channels 50 times as large and their weights as much smaller."""
    bundle = load.load(reference.parse(kind))
    for layer in bundle.model.get_decoder().layers:
        second = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        attention = layer.self_attn
        readers = ((attention.q_proj, attention.k_proj, attention.v_proj), (layer.mlp.gate_proj, layer.mlp.up_proj))
        for norm, linears in zip((layer.input_layernorm, second), readers, strict=True):
            offset = float(type(norm).__name__.startswith("Gemma"))
            norm.weight.data[[3, 40]] = (norm.weight.data[[3, 40]] + offset) * 50 - offset
            for linear in linears:
                linear.weight.data[:, [3, 40]] /= 50
    return bundle


def test_the_scale_is_the_papers() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(50, 8) * torch.rand(8), torch.randn(6, 8)
    for strength in (0.0, 0.5, 0.8, 1.0):
        expected = [
            float(x.double()[:, j].abs().max()) ** strength / float(weight.double()[:, j].abs().max()) ** (1 - strength)
            for j in range(8)
        ]
        ours = smoothquant.scale(x.abs().amax(0), weight, strength)
        torch.testing.assert_close(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    x[:, 2], weight[:, 3] = 0, 0
    assert smoothquant.scale(x.abs().amax(0), weight, 0.5).isfinite().all()
    assert smoothquant.scale(x.abs().amax(0), weight, 0.5)[2] == 1


def with_a_silent_channel() -> Bundle:
    """In float16: nothing ever writes to channel 5 of the hidden states."""
    bundle = load.load(reference.parse("tiny-qwen2"), LoadPlan(dtype="float16"))
    bundle.model.get_input_embeddings().weight.data[:, 5] = 0
    for layer in bundle.model.get_decoder().layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.data[5] = 0
    return bundle


@pytest.mark.parametrize(
    ("name", "options"), [("smoothquant", {"strength": 1.0}), ("smoothquant", {}), ("awq", {"clip": False, "points": 4})]
)
def test_a_silent_channel_does_not_blow_up_the_norm_before_it(name: str, options: dict[str, Any], make: Make) -> None:
    bundle = make(name, **options).apply(with_a_silent_channel(), CONTEXT)
    assert answers(bundle).isfinite().all()
    for layer in bundle.model.get_decoder().layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            assert 0.1 < norm.weight[5] < 10


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(1, 100))
def test_auto_costs_least_of_all_it_tries(seed: int, outlier: float) -> None:
    made = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(64, 32, generator=made), torch.randn(16, 32, generator=made)
    x[:, 4] *= outlier

    def loss(scale: torch.Tensor) -> float:
        """W8A8 in float64, written out: ±127.5 steps, −128 … 127."""
        given, read = x.double() / scale, weight.double() * scale
        token, row = given.abs().amax(1, keepdim=True) / 127.5, read.abs().amax(1, keepdim=True) / 127.5
        rounded = ((given / token).round().clamp(-128, 127) * token, (read / row).round().clamp(-128, 127) * row)
        return float((rounded[0] @ rounded[1].T - x.double() @ weight.double().T).square().sum())

    tried = [torch.ones(32), *(smoothquant.scale(x.abs().amax(0), weight, step / 4) for step in range(5))]
    best = smoothquant.cheapest(weight, x, tried)
    # A row's largest magnitude lies between two steps: in float32 it may fall to either side.
    assert loss(best) <= 1.25 * min(map(loss, tried))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, "auto"])
def test_changes_no_logit_beyond_float_rounding(kind: str, strength: float | str, make: Make) -> None:
    bundle = with_outliers(kind)
    before, norms = answers(bundle), [p.clone() for name, p in bundle.model.named_parameters() if "input_layernorm" in name]
    bundle = make("smoothquant", strength=strength).apply(bundle, CONTEXT)
    torch.testing.assert_close(answers(bundle), before, rtol=0, atol=1e-4)
    after = [p for name, p in bundle.model.named_parameters() if "input_layernorm" in name]
    assert not any(torch.equal(a, b) for a, b in zip(after, norms, strict=True))
    assert not bundle.packed
    assert bundle.save_config is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.5, "auto"])
def test_outliers_no_longer_spoil_8_bit_activations(kind: str, strength: float | str, make: Make) -> None:
    exact = answers(with_outliers(kind))
    plain = make("rtn", **W8A8).apply(with_outliers(kind), CONTEXT)
    smoothed = make("rtn", **W8A8).apply(make("smoothquant", strength=strength).apply(with_outliers(kind), CONTEXT), CONTEXT)
    without = make("rtn", **W8A8).apply(load.load(reference.parse(kind)), CONTEXT)
    errors = [float((answers(bundle) - exact).square().mean()) for bundle in (plain, smoothed, without)]
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 1.5 * errors[2], "as if the outliers had never been there"


def test_the_largest_inputs_are_evened_out(make: Make) -> None:
    def spread(bundle: Bundle) -> float:
        """Largest channel ÷ median channel of what the first attention reads."""
        seen: list[torch.Tensor] = []
        layer = bundle.model.get_submodule("model.layers.0.self_attn.q_proj")
        hook = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].abs().flatten(0, 1).amax(0)))
        answers(bundle)
        hook.remove()
        return float(seen[0].max() / seen[0].median())

    before = spread(with_outliers())
    assert before > 20
    half, whole = (spread(make("smoothquant", strength=s).apply(with_outliers(), CONTEXT)) for s in (0.5, 1.0))
    assert whole < half < before / 5
    assert whole < 1.01, "all of it is in the weights"


@pytest.mark.parametrize("second", [{"rtn": W8A8}, {"gptq": {"group_size": 32}}])
def test_is_a_step_before_one_that_rounds(second: dict[str, Any], tmp_path: Path) -> None:
    own = chosen("smoothquant", second, calibration={"samples": 8, "tokens": 64})
    document = optimize.optimize("tiny", own, tmp_path / "out", LoadOptions(device="cpu"))
    assert [step.name for step in document.steps] == ["smoothquant", *second]
    assert document.bytes_after < 0.6 * document.bytes_before


def test_an_interrupted_run_goes_on_to_the_same_bits(make: Make, tmp_path: Path) -> None:
    whole = make("smoothquant").apply(with_outliers("tiny-gemma3"), CONTEXT)

    def stop(line: str) -> None:
        if "block 3/" in line:
            raise KeyboardInterrupt

    for progress in (stop, lambda line: None):
        context = Context(calibration_ids=CALIBRATION, unfinished=tmp_path / "own", progress=progress)
        try:
            bundle = make("smoothquant").apply(with_outliers("tiny-gemma3"), context)
        except KeyboardInterrupt:
            continue
    for (name, ours), theirs in zip(bundle.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_bad_options_and_a_quantized_model_are_refused(make: Make, tiny_bundle: Bundle) -> None:
    for strength in (1.5, -0.1, "half", None):
        with pytest.raises(ValidationError):
            make("smoothquant", strength=strength)
    with pytest.raises(RecipeError, match="ignore"):
        make("smoothquant", ignore=["c_proj", "lm_head"]).check(shapes.shapes(reference.parse("tiny")), "steps[0].smoothquant")
    with pytest.raises(InputError, match="needs text"):
        make("smoothquant").apply(tiny_bundle, Context())
    with pytest.raises(InputError, match="quantized already"):
        make("smoothquant").apply(make("rtn").apply(tiny_bundle, CONTEXT), CONTEXT)
