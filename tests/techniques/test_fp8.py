"""FP8: weights and activations on E4M3, stored as such, and reloaded by plain transformers bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.errors import InputError
from infopt.layers.activation_linear import ActivationLinear
from infopt.model import load, reference, save
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.protocols import Context


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    """Rows in float64: the largest becomes 448, everything the nearest of E4M3's numbers."""
    points = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scale = weight.double().abs().amax(1, keepdim=True) / 448
    index = ((weight.double() / scale).abs()[..., None] - points).abs().argmin(-1)
    return points[index] * weight.sign() * scale


def test_weights_are_the_nearest_of_e4m3(make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    before = tiny_bundle.model.model.layers[1].mlp.down_proj.weight
    after = build(make("fp8")).model.model.layers[1].mlp.down_proj.weight
    same = ((after - by_hand(before)).abs() < 1e-6).double().mean()
    assert same > 0.999  # float32 scales may tip what lies in the middle
    assert 0.01 < (after - before).norm() / before.norm() < 0.04


def test_activations_are_rounded_unless_told_otherwise(make: Callable[..., Any], build: Callable[..., Any]) -> None:
    both, weights = build(make("fp8")), build(make("fp8", activations="none"))
    assert isinstance(both.model.model.layers[0].mlp.up_proj, ActivationLinear)
    assert type(both.model.lm_head) is torch.nn.Linear
    assert type(weights.model.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activations", ["token", "none"])
def test_plain_transformers_computes_the_same(
    dtype: str, activations: str, make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    technique = make("fp8", activations=activations)
    bundle = build(technique, dtype=dtype)
    save.save(bundle, tmp_path / "out")
    plain = load.load(reference.parse(str(tmp_path / "out")), LoadPlan(is_plain=True))
    assert torch.equal(logits(plain), logits(bundle))
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    assert torch.equal(logits(again), logits(bundle))


@pytest.mark.parametrize("kind", ["tiny-qwen2", "tiny-gemma3"])
def test_other_architectures(
    kind: str, make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = build(make("fp8"), kind)
    save.save(bundle, tmp_path / "out")
    assert torch.equal(logits(load.load(reference.parse(str(tmp_path / "out")), LoadPlan(is_plain=True))), logits(bundle))


def test_the_config_is_what_engines_look_for(make: Callable[..., Any], build: Callable[..., Any], tmp_path: Path) -> None:
    save.save(build(make("fp8")), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized"
    (group,) = config["config_groups"].values()
    weights, inputs = group["weights"], group["input_activations"]
    assert (weights["type"], weights["num_bits"], weights["strategy"], weights["dynamic"]) == ("float", 8, "channel", False)
    assert (inputs["type"], inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == ("float", 8, "token", True)


def test_a_second_quantizer_is_refused(make: Callable[..., Any], build: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="quantized already"):
        make("rtn").apply(build(make("fp8")), Context())


def test_the_demo_model_keeps_its_language(
    make: Callable[..., Any], build: Callable[..., Any], demo_quality: Callable[[Bundle], float]
) -> None:
    assert 0.99 < demo_quality(build(make("fp8"), "demo", "float32")) < 1.05
