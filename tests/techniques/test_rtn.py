"""Round to nearest on real architectures: what is rounded, what is left alone, and that it loads in plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.errors import InputError, RecipeError
from infopt.layers.activation_linear import ActivationLinear
from infopt.model import load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.protocols import Context
from infopt.techniques.rtn import Rtn, RtnOptions


def weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in bundle.model.named_parameters()}


def test_rounds_linear_layers_and_nothing_else(make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    before, after = weights(tiny_bundle), weights(build(make("rtn", ignore=["lm_head", "q_proj", "*.1.mlp.*"])))
    for name, weight in before.items():
        is_chosen = "_proj" in name and "q_proj" not in name and ".1.mlp." not in name
        assert torch.equal(weight, after[name]) is not is_chosen, name
        groups = weight.view(weight.shape[0], -1, 64) if is_chosen else weight[None]
        step = groups.abs().amax(-1, keepdim=True) / 7.5
        assert ((after[name].view_as(groups) - groups).abs() <= step * 0.51).all()


def test_fewer_bits_and_larger_groups_are_coarser(
    make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    before = weights(tiny_bundle)

    def error(**options: Any) -> float:
        after = weights(build(make("rtn", **options)))
        return sum(float((after[name] - before[name]).square().sum()) for name in before)

    assert error(bits=8) < error(bits=4, group_size=16) < error(bits=4) < error(bits=4, group_size=None)


@pytest.mark.parametrize("kind", ["tiny-qwen2", "tiny-gemma3"])
def test_other_architectures_load_back_identically(
    kind: str, make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    technique = make("rtn", group_size=32)
    technique.check(shapes.shapes(reference.parse(kind)), "steps[0].rtn")
    bundle = build(technique, kind)
    save.save(bundle, tmp_path / "out")
    assert torch.equal(logits(load.load(reference.parse(str(tmp_path / "out")))), logits(bundle))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale_dtype", ["auto", "float32", "bfloat16", "float16"])
def test_every_dtype_loads_back_identically(
    dtype: str, scale_dtype: str, make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = build(make("rtn", scale_dtype=scale_dtype), dtype=dtype)
    save.save(bundle, tmp_path / "out")
    plain = load.load(reference.parse(str(tmp_path / "out")))
    assert plain.model.dtype == getattr(torch, dtype)
    assert torch.equal(logits(plain), logits(bundle))


def test_an_untied_head_can_be_quantized(
    make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = build(make("rtn", ignore=[]), "tiny-qwen2")
    assert "lm_head" in bundle.packed
    save.save(bundle, tmp_path / "out")
    assert torch.equal(logits(load.load(reference.parse(str(tmp_path / "out")))), logits(bundle))


def test_the_config_names_what_is_left_alone(make: Callable[..., Any], build: Callable[..., Any], tmp_path: Path) -> None:
    bundle = build(make("rtn", ignore=["lm_head", "*.1.self_attn.*"]))
    save.save(bundle, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert set(config["ignore"]) == {"lm_head", *(f"model.layers.1.self_attn.{part}_proj" for part in "qkvo")}
    (group,) = config["config_groups"].values()
    assert group["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "group_size": 64, "strategy": "group", "dynamic": False,
    }  # fmt: skip
    assert group["input_activations"] is None


def test_reopening_leaves_plain_layers(make: Callable[..., Any], build: Callable[..., Any], tmp_path: Path) -> None:
    technique = make("rtn")
    save.save(build(technique), tmp_path / "out")
    bundle = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    layer = bundle.model.model.layers[0].mlp.up_proj
    assert type(layer) is torch.nn.Linear
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert "forward" not in vars(layer)
    assert not layer.weight.requires_grad
    assert bundle.resident_bytes() == build(make("rtn", ignore=["*"])).resident_bytes()


def test_impossible_options_are_refused_before_weights_are_read() -> None:
    size = shapes.shapes(reference.parse("tiny"))
    with pytest.raises(RecipeError, match=r"^steps\[2\]\.rtn\.group_size: found 48, .*allowed: 16, 32, 64 or null"):
        Rtn(RtnOptions(group_size=48)).check(size, "steps[2].rtn")
    with pytest.raises(RecipeError, match=r"^steps\[2\]\.rtn\.ignore: this model's lm_head shares its weight"):
        Rtn(RtnOptions(ignore=())).check(size, "steps[2].rtn")
    with pytest.raises(RecipeError, match="did you mean 'up_proj'"):
        Rtn(RtnOptions(ignore=("lm_head", "up_pro"))).check(size, "steps[2].rtn")
    Rtn(RtnOptions(group_size=48, ignore=("*",))).check(size, "steps[2].rtn")


def test_a_second_quantizer_is_refused(make: Callable[..., Any], build: Callable[..., Any], tmp_path: Path) -> None:
    bundle = build(make("rtn"))
    with pytest.raises(InputError, match="quantized already"):
        make("int8").apply(bundle, Context())
    save.save(bundle, tmp_path / "out")
    with pytest.raises(InputError, match="quantized already"):
        make("rtn").apply(load.load(reference.parse(str(tmp_path / "out"))), Context())


@pytest.mark.parametrize("name", ["rtn", "int8"])
def test_a_mixture_of_experts_is_refused(name: str, make: Callable[..., Any], build: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="mixture of experts cannot be packed"):
        build(make(name), "tiny-moe")


def test_progress_names_each_layer(make: Callable[..., Any], tiny_bundle: Bundle) -> None:
    lines: list[str] = []
    make("rtn").apply(tiny_bundle, Context(progress=lines.append))
    assert lines[0] == "rtn 1/14 model.layers.0.self_attn.q_proj"
    assert len(lines) == 14


def test_the_demo_model_keeps_its_language(
    make: Callable[..., Any], build: Callable[..., Any], demo_quality: Callable[[Bundle], float]
) -> None:
    assert 1.0 < demo_quality(build(make("rtn"), "demo", "float32")) < 1.6
    assert 0.99 < demo_quality(build(make("rtn", bits=8), "demo", "float32")) < 1.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width_loads_back_identically(
    bits: int, symmetric: bool, dtype: str,
    make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    technique = make("rtn", bits=bits, symmetric=symmetric, group_size=32)
    bundle = build(technique, dtype=dtype)
    save.save(bundle, tmp_path / "out")
    assert torch.equal(logits(load.load(reference.parse(str(tmp_path / "out")))), logits(bundle))
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    assert type(again.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(logits(again), logits(bundle))


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activations", ["token", "token_asymmetric"])
def test_w8a8_is_what_plain_transformers_computes(
    activations: str, kind: str, dtype: str,
    make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    technique = make("rtn", bits=8, group_size=None, activations=activations)
    bundle = build(technique, kind, dtype)
    save.save(bundle, tmp_path / "out")
    plain = load.load(reference.parse(str(tmp_path / "out")), LoadPlan(is_plain=True))
    assert torch.equal(logits(plain), logits(bundle))
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    assert isinstance(again.model.model.layers[0].mlp.up_proj, ActivationLinear)
    assert torch.equal(logits(again), logits(bundle))
    weights_only = build(make("rtn", bits=8, group_size=None), kind, dtype)
    assert not torch.equal(logits(weights_only), logits(bundle))


@pytest.mark.parametrize("activations", ["token", "token_asymmetric"])
def test_w8a8_is_the_format_of_int8_kernels(
    activations: str, make: Callable[..., Any], build: Callable[..., Any], tmp_path: Path
) -> None:
    save.save(build(make("rtn", bits=8, group_size=None, activations=activations)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    (group,) = config["config_groups"].values()
    assert (group["weights"]["strategy"], group["weights"]["num_bits"]) == ("channel", 8)
    inputs = group["input_activations"]
    assert (inputs["type"], inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == ("int", 8, "token", True)
    assert inputs["symmetric"] is (activations == "token")
    assert group["weights"]["symmetric"] is True


def test_activations_that_no_engine_multiplies_are_refused() -> None:
    size = shapes.shapes(reference.parse("tiny"))
    for options, message in (
        ({"bits": 3, "group_size": None}, r"rtn\.bits: found 3; allowed with activations: token is 8"),
        ({"bits": 8}, r"rtn\.group_size: found 64; allowed with activations: token is null"),
        ({"bits": 8, "group_size": None, "symmetric": False}, r"rtn\.symmetric: found false"),
    ):
        with pytest.raises(RecipeError, match=message):
            Rtn(RtnOptions(activations="token", **options)).check(size, "steps[0].rtn")
    with pytest.raises(RecipeError, match=r"rtn\.bits: found 4; allowed with activations: token_asymmetric is 8"):
        Rtn(RtnOptions(activations="token_asymmetric", group_size=None)).check(size, "steps[0].rtn")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_bring_weights_closer(
    bits: int, make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    before = weights(tiny_bundle)

    def error(symmetric: bool) -> float:
        after = weights(build(make("rtn", bits=bits, symmetric=symmetric, group_size=16)))
        return sum(float((after[name] - before[name]).square().sum()) for name in before)

    assert error(False) < error(True)
