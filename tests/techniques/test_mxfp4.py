"""MXFP4: powers of two per 32, activations too, and reloads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.errors import RecipeError
from infopt.layers.activation_linear import ActivationLinear
from infopt.model import load, reference, save
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.protocols import Shapes
from infopt.techniques.mxfp4 import Mxfp4, Mxfp4Options

POINTS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def test_weights_are_small_floats_times_powers_of_two(
    make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    before = tiny_bundle.model.model.layers[0].mlp.up_proj.weight.double().view(-1, 32)
    after = build(make("mxfp4")).model.model.layers[0].mlp.up_proj.weight.double().view(-1, 32)
    exponent = torch.floor(torch.log2(before.abs().amax(1, keepdim=True) / 1.75 * 2)) - 2  # so that the largest is below 7
    scaled = before / 2**exponent
    expected = POINTS[(scaled.abs()[..., None] - POINTS).abs().argmin(-1)] * scaled.sign() * 2**exponent
    assert torch.equal(after, expected)


@pytest.mark.parametrize("activations", ["none", "group"])
def test_plain_transformers_computes_the_same_in_bfloat16(
    activations: str, make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    technique = make("mxfp4", activations=activations)
    bundle = build(technique, dtype="bfloat16")
    is_swapped = isinstance(bundle.model.model.layers[0].mlp.up_proj, ActivationLinear)
    assert is_swapped is (activations == "group")
    save.save(bundle, tmp_path / "out")
    plain = load.load(reference.parse(str(tmp_path / "out")), LoadPlan(is_plain=True))
    assert torch.equal(logits(plain), logits(bundle))
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    assert torch.equal(logits(again), logits(bundle))


def test_the_config_is_what_engines_look_for(make: Callable[..., Any], build: Callable[..., Any], tmp_path: Path) -> None:
    save.save(build(make("mxfp4", activations="group")), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mxfp4-pack-quantized"
    (group,) = config["config_groups"].values()
    for part, dynamic in (("weights", False), ("input_activations", True)):
        found = group[part]
        assert (found["type"], found["num_bits"], found["group_size"], found["dynamic"]) == ("float", 4, 32, dynamic)
        assert found["scale_dtype"] == "torch.uint8"


def test_rounding_activations_costs_more(
    make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    exact = logits(tiny_bundle)
    weights, both = ((logits(build(make("mxfp4", activations=a))) - exact).norm() for a in ("none", "group"))
    assert weights < both


def test_inputs_that_do_not_divide_are_refused() -> None:
    linear = {"model.layers.0.mlp.down_proj": (64, 80)}
    size = Shapes("X", 1, 64, 4, 2, 16, 100, 64, linear, (100, 64), True, 6400, 10)
    with pytest.raises(RecipeError, match=r"^steps\[0\]\.mxfp4: mxfp4 has one scale per 32 inputs") as caught:
        Mxfp4(Mxfp4Options()).check(size, "steps[0].mxfp4")
    assert caught.value.hint == "add down_proj to ignore, or use rtn, whose group_size is free"
    Mxfp4(Mxfp4Options(ignore=("lm_head", "down_proj"))).check(size, "steps[0].mxfp4")
