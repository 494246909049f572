"""Models that are built in other ways: layers of other classes, layers beside the decoder blocks, sizes that divide nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_techniques import CALIBRATION, chosen

from infopt import optimize, techniques
from infopt.errors import InputError, RecipeError
from infopt.layers import packing
from infopt.model import load, reference, save, shapes, tiny
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.protocols import Context, Shapes
from infopt.settings import LoadOptions

Family = Callable[..., Path]
SIZES = {key: value for key, value in tiny._SHARED.items() if key != "head_dim"}
#: transformers' model type → own settings. Of OPT as of its 350m: embeddings narrower than the hidden states.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "dropout": 0.0},
    "llama": {"hidden_size": 72, "intermediate_size": 104, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24},
}


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """`family(model type)`: a tiny model of it, saved."""

    def make(kind: str) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind]}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        save.save(Bundle(model, tiny.tokenizer(), kind), tmp_path / kind)
        return tmp_path / kind

    return make


def sizes(folder: Path) -> Shapes:
    return shapes.shapes(reference.parse(str(folder)))


def checked(name: str, size: Shapes, **options: Any) -> None:
    kind = techniques.find(name)
    kind(kind.Options(**options)).check(size, f"steps[0].{name}")


ROUNDING = ("rtn", "gptq", "awq", "smoothquant", "nvfp4", "mixed", "qat", "qlora", "autoround", "llmcompressor", "int8", "quanto")


@pytest.mark.parametrize("name", ROUNDING)
def test_a_model_without_linear_layers_is_refused_before_it_is_read(name: str, family: Family) -> None:
    with pytest.raises(RecipeError, match=rf"^steps\[0\]\.{name}: GPT2LMHeadModel has no linear layers") as caught:
        checked(name, sizes(family("gpt2")))
    assert "nf4" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["nf4", "bnb_int8"])
def test_what_a_library_finds_nothing_to_quantize_in_is_refused(name: str, family: Family, make: Callable[..., Any]) -> None:
    plan = make(name).plan(LoadPlan())
    quantized = load.load(reference.parse(str(family("gpt2"))), plan).model.transformer.h[0].mlp.c_fc
    assert type(quantized).__module__.startswith("bitsandbytes")
    with pytest.raises(InputError, match="FalconForCausalLM has no layers that this step can round"):
        load.load(reference.parse(str(family("falcon"))), plan)


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "smoothquant", "nvfp4", "mixed", "qat", "qlora", "int8"])
def test_layers_of_a_class_of_their_own_are_refused_not_skipped(name: str, family: Family, make: Callable[..., Any]) -> None:
    bundle = load.load(reference.parse(str(family("falcon"))))
    with pytest.raises(InputError, match="FalconForCausalLM has no linear layers that can be packed: FalconLinear"):
        make(name).apply(bundle, Context(calibration_ids=CALIBRATION))
    assert packing.linears(bundle, ["*"]) == {}


@pytest.mark.parametrize("name", ["gptq", "awq", "smoothquant", "mixed", "autoround", "nvfp4"])
def test_layers_beside_the_blocks_are_refused_where_only_blocks_are_gone_through(name: str, family: Family) -> None:
    size = sizes(family("opt"))
    options = {"activations": "group"} if name == "nvfp4" else {} if name == "smoothquant" else {"group_size": 32}
    with pytest.raises(RecipeError, match=r"ignore: model\.decoder\.project_out lies beside the decoder blocks") as caught:
        checked(name, size, **options)
    assert caught.value.hint == "add project_out, project_in to ignore"
    checked(name, size, ignore=["lm_head", "project_in", "project_out"], **options)


@pytest.mark.parametrize("name", ["rtn", "nvfp4", "qat"])
def test_they_are_rounded_where_all_layers_are(name: str, family: Family, make: Callable[..., Any], build: Any) -> None:
    folder = family("opt")
    technique = make(name, **({"group_size": 32} if name != "nvfp4" else {}))
    technique.check(sizes(folder), "s")
    assert set(build(technique, folder).packed) == set(sizes(folder).linear)


def test_what_calibration_walks_through_is_all_that_was_promised(family: Family, make: Callable[..., Any], build: Any) -> None:
    folder = family("opt")
    ignore = ["lm_head", "project_in", "project_out"]
    bundle = build(make("gptq", group_size=32, ignore=ignore), folder)
    assert set(bundle.packed) == {name for name in sizes(folder).linear if ".layers." in name}


@pytest.mark.parametrize("name", ["nf4", "qlora"])
def test_sizes_that_a_cpu_kernel_cannot_take_are_refused(
    name: str, family: Family, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bitsandbytes import functional

    technique, folder = make(name), family("llama")
    size = sizes(folder)
    for has_kernel, device in ((False, "cpu"), (True, "cuda"), (True, "auto")):
        monkeypatch.setattr(functional, "has_avx512bf16", lambda has=has_kernel: has)
        technique.device = device
        technique.check(size, "s")
    technique.device = "cpu"
    with pytest.raises(RecipeError, match=r"^s: bitsandbytes' kernel for this CPU .*q_proj has 72 and 72") as caught:
        technique.check(size, "s")
    assert "rtn" in (caught.value.hint or "")
    technique.check(shapes.shapes(reference.parse("tiny")), "s")
    with pytest.raises(RecipeError, match="kernel for this CPU"):
        optimize.optimize(str(folder), chosen(name), tmp_path / "out", LoadOptions(device="cpu"))
