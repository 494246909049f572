"""KV scales: their values from the text, what is written, what readers make of it, and what they go with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stub_techniques import CALIBRATION, chosen

from infopt import arms, optimize, pipeline
from infopt.errors import InputError, LoadBackError, RecipeError
from infopt.layers import small_floats
from infopt.model import load, reference, save, shapes, tiny
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.protocols import Context
from infopt.settings import LoadOptions
from infopt.techniques.kv_cache import KvCache, KvCacheOptions

KINDS = pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])


def cached(bundle: Bundle) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, [windows, kv heads, tokens, head_dim], in a cache of transformers that forgets none."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        bundle.model(torch.tensor(CALIBRATION), use_cache=True, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@KINDS
@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize(("bits", "largest"), [(8, 448), (4, 7.5)])
def test_scales_are_the_largest_that_the_cache_held(
    kind: str, scales: str, bits: int, largest: float, make: Callable[..., Any], build: Callable[..., Any]
) -> None:
    before = cached(load.load(reference.parse(kind)))
    model = build(make("kv_cache", bits=bits, scales=scales), kind).model
    for layer, states in zip(model.model.layers, before, strict=True):
        for name, state in zip(("k_scale", "v_scale"), states, strict=True):
            expected = state.abs().amax((0, 2, 3)) / largest
            expected = expected.amax().view(1) if scales == "tensor" else expected.view(-1, 1, 1)
            assert torch.allclose(getattr(layer.self_attn, name), expected, rtol=1e-5)


def test_weights_and_answers_stay(
    make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    save.save(build(make("kv_cache")), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in tiny_bundle.model.named_parameters():
        assert torch.equal(stored.pop(name), weight)
    assert len(stored) == 4
    assert all(name.endswith((".self_attn.k_scale", ".self_attn.v_scale")) and t.shape == (1,) for name, t in stored.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = config["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"], scheme["symmetric"], scheme["dynamic"]) == (
        8, "float", "tensor", True, False,
    )  # fmt: skip
    assert config["config_groups"] == {}


@pytest.mark.parametrize("bits", [8, 4])
def test_plain_transformers_rounds_keys_and_values_as_recorded(
    bits: int, make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    technique = make("kv_cache", bits=bits, scales="head")
    bundle = build(technique)
    save.save(bundle, tmp_path / "out")
    made = logits(bundle)
    plain = logits(load.load(reference.parse(str(tmp_path / "out")), LoadPlan(is_plain=True)))
    assert (plain - made).abs().max() > 0
    assert torch.allclose(plain, emulated(bundle, bits, logits), atol=1e-4)
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    assert torch.equal(logits(again), made)


def emulated(bundle: Bundle, bits: int, logits: Callable[..., Any]) -> Any:
    """The definition: keys and values rounded where attention takes them."""
    from transformers.models.llama import modeling_llama

    def rounded(state: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if bits == 8:
            return small_floats.round_e4m3(state / scale) * scale
        return (state / scale).clamp(-8, 7).round() * scale

    exact: Any = modeling_llama.eager_attention_forward

    def attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: Any, **named: Any) -> Any:
        return exact(module, q, rounded(k, module.k_scale), rounded(v, module.v_scale), *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", attention)
        bundle.model.set_attn_implementation("eager")
        return logits(bundle)


@pytest.mark.parametrize("first", [{"rtn": {"group_size": 32}}, {"fp8": {}}, "int8"])
def test_it_follows_a_weight_step(first: Any, tmp_path: Path) -> None:
    recipe = chosen(first, {"kv_cache": {}}, calibration={"samples": 4, "tokens": 64})
    document = optimize.optimize("tiny", recipe, tmp_path / "out", LoadOptions(device="cpu"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] in (4, 8)
    assert document.load_back[-1].max_abs_logit_difference == pytest.approx(0, abs=1e-4)
    for engine in ("native", "transformers"):
        spec = arms.spec(str(tmp_path / "out"), None, [f"engine.name={engine}"])
        opened = pipeline.open_arm(spec, "cpu", LoadOptions(device="cpu"))
        assert bool(opened.notes) == (engine == "native")
    ids = torch.tensor([[5, 6, 7, 8]])
    out = opened.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_weights_before_it_are_checked_without_its_rounding(
    bits: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = chosen({"rtn": {"group_size": 32}}, {"kv_cache": {"bits": bits}}, calibration={"samples": 4, "tokens": 64})
    plain = optimize.optimize("tiny", recipe, tmp_path / "out", LoadOptions(device="cpu")).load_back[0]
    assert plain.tolerance == optimize.ROUNDING
    assert (plain.max_abs_logit_difference or 0) < optimize.ROUNDING < (plain.rounded_cache_logit_difference or 0)
    assert "where it rounds keys and values" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    opened = load.load

    def damaged(ref: Any, plan: LoadPlan | None = None, *more: Any) -> Bundle:
        bundle = opened(ref, plan, *more)
        if plan and plan.is_plain:
            bundle.model.get_submodule("model.norm").weight.data += 0.01
        return bundle

    monkeypatch.setattr(load, "load", damaged)
    with pytest.raises(LoadBackError):
        optimize.optimize("tiny", recipe, tmp_path / "other", LoadOptions(device="cpu"))


@pytest.mark.parametrize("kind", ["gpt_neox", "phi3", "mixtral", "opt"])
def test_families_whose_keys_cannot_be_seen_are_refused_before_any_work(kind: str, make: Callable[..., Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    own: dict[str, dict[str, Any]] = {"mixtral": {"num_local_experts": 4}, "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}}
    config = AutoConfig.for_model(kind, **{**tiny._SHARED, **own.get(kind, {})}, pad_token_id=0)
    if kind == "opt":
        del config.num_key_value_heads
    model = AutoModelForCausalLM.from_config(config)
    lines: list[str] = []
    with pytest.raises(InputError, match="KV scales need num_key_value_heads in its config") as caught:
        make("kv_cache").apply(Bundle(model, None, kind), Context(calibration_ids=CALIBRATION, progress=lines.append))  # type: ignore[arg-type]
    assert "llama" in (caught.value.hint or "")
    assert not lines


def test_it_comes_last(make: Callable[..., Any], build: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="recorded already") as caught:
        make("rtn").apply(build(make("kv_cache")), Context())
    assert caught.value.hint == "move kv_cache to the end of the recipe"


def test_formats_without_a_place_for_it_are_refused(make: Callable[..., Any], build: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="no place for KV scales"):
        make("kv_cache").apply(build(make("nf4")), Context(calibration_ids=CALIBRATION))


@pytest.mark.parametrize(
    ("bits", "dtype", "is_fitting"), [(8, "fp8", True), (8, "int4", False), (4, "int4", True), (4, "fp8", False)]
)
def test_a_cache_of_another_width_is_refused(bits: Any, dtype: str, is_fitting: bool) -> None:
    technique, size = KvCache(KvCacheOptions(bits=bits)), shapes.shapes(reference.parse("tiny"))
    technique.check(size, "steps[1].kv_cache")
    technique.cache_dtype = dtype
    if is_fitting:
        return technique.check(size, "steps[1].kv_cache")
    with pytest.raises(
        RecipeError, match=rf"^cache\.dtype: found {dtype}, with steps\[1\]\.kv_cache\.bits {bits}; allowed: auto or"
    ):
        technique.check(size, "steps[1].kv_cache")


def test_an_interrupted_run_goes_on_to_the_same_scales(make: Callable[..., Any], tmp_path: Path) -> None:
    def scales(bundle: Bundle) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in bundle.model.state_dict().items() if name.endswith("_scale")}

    lines: list[str] = []

    def stop(line: str) -> None:
        if line == "block 2/2":
            raise KeyboardInterrupt

    ref = reference.parse("tiny")
    whole = make("kv_cache").apply(load.load(ref), Context(calibration_ids=CALIBRATION))
    with pytest.raises(KeyboardInterrupt):
        make("kv_cache").apply(load.load(ref), Context(calibration_ids=CALIBRATION, unfinished=tmp_path / "u", progress=stop))
    context = Context(calibration_ids=CALIBRATION, unfinished=tmp_path / "u", progress=lines.append)
    resumed = make("kv_cache").apply(load.load(ref), context)
    assert lines[0].startswith("going on after block 1")
    expected = scales(whole)
    assert scales(resumed).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in scales(resumed).items())
