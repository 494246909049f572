"""int8 weights in memory, in the file, and back; and what they cost in quality."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.errors import RecipeError
from infopt.layers.int8_linear import Int8Linear
from infopt.model import load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.techniques.int8 import Int8, Int8Options

MODES = pytest.mark.parametrize("activations", ["none", "group"])


@MODES
@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reopened_layers_are_those_that_were_made(
    activations: str, kind: str, dtype: str,
    make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    technique = make("int8", activations=activations)
    bundle = build(technique, kind, dtype)
    save.save(bundle, tmp_path / "out")
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    close = {"rtol": 0, "atol": 1e-5 if dtype == "float32" and activations == "none" else 0.1}  # alignment changes sums
    torch.testing.assert_close(logits(again), logits(bundle), **close)
    made, found = bundle.model.model.layers[1].self_attn.q_proj, again.model.model.layers[1].self_attn.q_proj
    assert isinstance(made, Int8Linear)
    assert isinstance(found, Int8Linear)
    assert torch.equal(found.weight, made.weight)
    assert torch.equal(found.weight_scale, made.weight_scale)
    assert found.activation_group == made.activation_group == (64 if activations == "group" else None)
    assert again.resident_bytes() == bundle.resident_bytes()
    step = torch.tensor([[7]])
    with torch.inference_mode():  # one row goes through the fast product on both
        torch.testing.assert_close(again.model(step).logits, bundle.model(step).logits, **close)


def test_weights_are_the_nearest_of_255_steps(make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    before = tiny_bundle.model.model.layers[0].mlp.up_proj.weight
    layer = build(make("int8")).model.model.layers[0].mlp.up_proj
    scale = before.abs().amax(1, keepdim=True) / 127.5
    torch.testing.assert_close(layer.weight_scale, scale, rtol=2**-8, atol=0)
    assert torch.equal(layer.weight_scale, layer.weight_scale.bfloat16().float())
    assert torch.equal(layer.weight.float(), (before / layer.weight_scale).round().clamp(-128, 127))


def test_held_and_stored_in_a_quarter(make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    bundle = build(make("int8"))
    linear = sum(m.weight.numel() for m in tiny_bundle.model.modules() if isinstance(m, torch.nn.Linear)) - 320 * 64
    rows = sum(m.out_features for m in bundle.model.modules() if isinstance(m, Int8Linear))
    # 4 → 1 byte a weight, and a float32 and a bfloat16 scale a row
    assert tiny_bundle.resident_bytes() - bundle.resident_bytes() == 3 * linear - 6 * rows
    assert bundle.model.lm_head.weight is bundle.model.model.embed_tokens.weight


@MODES
def test_the_file_is_weight_only_for_every_engine(
    activations: str, make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = build(make("int8", activations=activations))
    save.save(bundle, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["format"] == "pack-quantized"
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (8, "channel")
    assert group["input_activations"] is None
    plain = logits(load.load(reference.parse(str(tmp_path / "out"))))
    difference = (plain - logits(bundle)).abs().max()
    assert difference < 1e-4 if activations == "none" else 1e-3 < difference < 1


def test_options_are_checked_against_the_shapes() -> None:
    size = shapes.shapes(reference.parse("tiny"))
    with pytest.raises(RecipeError, match=r"^steps\[0\]\.int8\.activation_group: found 96, .*allowed: 16, 32, 64 or null"):
        Int8(Int8Options(activations="group", activation_group=96)).check(size, "steps[0].int8")
    Int8(Int8Options(activation_group=96)).check(size, "steps[0].int8")  # not used
    with pytest.raises(RecipeError, match="shares its weight"):
        Int8(Int8Options(ignore=())).check(size, "steps[0].int8")


@MODES
def test_the_demo_model_keeps_its_language(
    activations: str, make: Callable[..., Any], build: Callable[..., Any], demo_quality: Callable[[Bundle], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bundle = build(make("int8", activations=activations), "demo", "float32")
    assert 0.99 < demo_quality(bundle) < 1.015
    for module in bundle.model.modules():
        if isinstance(module, Int8Linear) and module.few_rows:
            monkeypatch.setattr(module, "few_rows", 1 << 20)  # what a decode step computes, for all tokens at once
    assert 0.99 < demo_quality(bundle) < 1.015
