"""NVFP4: two levels of scales, shared where engines fuse; calibrated inputs; reloads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_techniques import CALIBRATION

from infopt import techniques
from infopt.errors import InputError
from infopt.layers.activation_linear import ActivationLinear
from infopt.model import load, reference, save
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.protocols import Context


def test_each_level_of_scales_does_its_part(make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    bundle = build(make("nvfp4"))
    attention = tiny_bundle.model.model.layers[0].self_attn
    largest = max(float(getattr(attention, f"{part}_proj").weight.abs().max()) for part in "qkvo")
    stored = [bundle.packed[f"model.layers.0.self_attn.{part}_proj"] for part in "qkvo"]
    for tensors in stored:
        assert tensors["weight_global_scale"].item() == pytest.approx(448 * 6 / largest)
        assert tensors["weight_scale"].dtype == torch.float8_e4m3fn
    assert max(float(tensors["weight_scale"].float().max()) for tensors in stored) == 448
    before = attention.q_proj.weight
    after = bundle.model.model.layers[0].self_attn.q_proj.weight
    assert 0.05 < (after - before).norm() / before.norm() < 0.12


def test_it_is_closer_than_mxfp4(make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    before = dict(tiny_bundle.model.named_parameters())
    error = {}
    for name in ("nvfp4", "mxfp4"):
        after = build(make(name)).model.named_parameters()
        error[name] = sum(float((p - before[key]).square().sum()) for key, p in after)
    assert error["nvfp4"] < 0.8 * error["mxfp4"]


@pytest.mark.parametrize("activations", ["none", "group"])
def test_plain_transformers_computes_the_same_in_bfloat16(
    activations: str, make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    technique = make("nvfp4", activations=activations)
    bundle = build(technique, dtype="bfloat16")
    save.save(bundle, tmp_path / "out")
    plain = load.load(reference.parse(str(tmp_path / "out")), LoadPlan(is_plain=True))
    assert torch.equal(logits(plain), logits(bundle))
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    assert isinstance(again.model.model.layers[0].mlp.up_proj, ActivationLinear) is (activations == "group")
    assert torch.equal(logits(again), logits(bundle))


def test_input_scales_come_from_the_text(make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    seen: list[torch.Tensor] = []
    layer = tiny_bundle.model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].abs().max()))
    tiny_bundle.model(torch.tensor(CALIBRATION))
    packed = build(make("nvfp4", activations="group")).packed["model.layers.0.self_attn.q_proj"]
    assert packed["input_global_scale"].item() == pytest.approx(448 * 6 / float(max(seen)), rel=1e-5)


def test_the_config_is_what_engines_look_for(make: Callable[..., Any], build: Callable[..., Any], tmp_path: Path) -> None:
    save.save(build(make("nvfp4", activations="group")), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "nvfp4-pack-quantized"
    (group,) = config["config_groups"].values()
    for part, dynamic in (("weights", False), ("input_activations", "local")):
        found = group[part]
        assert (found["type"], found["num_bits"], found["group_size"], found["dynamic"]) == ("float", 4, 16, dynamic)
        assert (found["strategy"], found["scale_dtype"]) == ("tensor_group", "torch.float8_e4m3fn")


def test_only_activations_need_text(make: Callable[..., Any], tiny_bundle: Bundle) -> None:
    kind = techniques.find("nvfp4")
    assert not kind(kind.Options()).needs.calibration
    assert kind(kind.Options(activations="group")).needs.calibration
    with pytest.raises(InputError, match="needs text"):
        make("nvfp4", activations="group").apply(tiny_bundle, Context())
