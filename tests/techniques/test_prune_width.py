"""Width pruning: what stays, and with which weights, against plain torch in float64; what is left is a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_techniques import CALIBRATION, chosen

from infopt import arms, optimize, pipeline, techniques
from infopt.errors import InputError, RecipeError
from infopt.layers import narrowing
from infopt.model import checkpoint, load, reference, save, shapes, tiny
from infopt.model.bundle import Bundle
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.settings import LoadOptions

Make = Callable[..., Any]
CONTEXT = Context(calibration_ids=CALIBRATION)
IDS = torch.tensor(CALIBRATION)
SIZES = {key: value for key, value in tiny._SHARED.items() if key != "tie_word_embeddings"}
#: Kinds of models by name: transformers' model type and own settings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-tied": ("mistral", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "gpt2": ("gpt2", {}),
}
KINDS = ("tiny", "tiny-qwen2", "tiny-gemma3", "llama-biased", "mistral-tied", "qwen3")
CUTS: list[dict[str, Any]] = [
    {"mlp": 64},
    {"mlp": 0.3, "multiple": 2, "by": "activation"},
    {"mlp": None, "kv_heads": 1},
    {"kv_heads": 1, "compensate": False},
    {"mlp": None, "hidden": 32},
    {"mlp": 96, "kv_heads": 1, "hidden": 0.5},
]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`family(name)`: a reference to a tiny model, saved where it is none of `tiny`'s."""
    folder = tmp_path_factory.mktemp("families")

    def make(name: str) -> str:
        if name not in FAMILIES:
            return name
        if not (folder / name).exists():
            kind, own = FAMILIES[name]
            save.save(built(kind, **{**SIZES, **own}), folder / name)
        return str(folder / name)

    return make


def built(kind: str, **sizes: Any) -> Bundle:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return Bundle(model, tiny.tokenizer(), kind)


def opened(model: str) -> Bundle:
    return load.load(reference.parse(model))


def sizes(model: str) -> Shapes:
    return shapes.shapes(reference.parse(model))


def logits(bundle: Bundle) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = bundle.model(input_ids=IDS, use_cache=False).logits.float()
    return found


def seen(model: Any, name: str, *, output: bool = False) -> torch.Tensor:
    """What enters (or leaves) a module on the calibration text, float64 [windows, tokens, features], by plain hooks."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, x, y: found.append(y if output else x[0]))
    with torch.inference_mode():
        model(input_ids=IDS, use_cache=False)
    hook.remove()
    return found[0].double()


# --- The choice and the weights, by definition ------------------------------------------------------------------------


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.topk(count).indices.sort().values


def by_definition(model: Any, name: str, size: int, count: int, options: dict[str, Any]) -> torch.Tensor:
    """Which columns of a layer stay; all others become zero, and these are refitted."""
    layer = model.get_submodule(name)
    x, weight = seen(model, name), layer.weight.double()
    groups = x.unflatten(-1, (-1, size))
    if options["by"] == "activation":
        scores = groups.norm(dim=-1).mean(1).norm(dim=0)
    else:
        parts = weight.unflatten(1, (-1, size))
        scores = torch.stack([(groups[:, :, g] @ parts[:, g].T).norm() for g in range(groups.shape[2])])
    kept = (best(scores, count)[:, None] * size + torch.arange(size)).flatten()
    gone = torch.tensor([column for column in range(x.shape[-1]) if column not in kept.tolist()], dtype=torch.long)
    x, fitted = x.flatten(0, 1), weight[:, kept]
    if options["compensate"]:
        inner = x[:, kept].T @ x[:, kept]
        damped = inner + options["damping"] * inner.diagonal().mean() * torch.eye(len(inner))
        fitted = fitted + weight[:, gone] @ x[:, gone].T @ x[:, kept] @ torch.linalg.inv(damped)
    layer.weight.data = torch.zeros_like(layer.weight).index_copy(1, kept, fitted.float())
    return kept


@pytest.mark.parametrize("by", ["contribution", "activation"])
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])
def test_channels_and_heads_are_those_of_the_definition_block_by_block(kind: str, by: str, compensate: bool, make: Make) -> None:
    options = {"by": by, "compensate": compensate, "damping": 0.02}
    wanted = opened(kind)
    channels, heads = [], []
    for number in range(len(wanted.model.model.layers)):
        heads.append(by_definition(wanted.model, f"model.layers.{number}.self_attn.o_proj", 32, 1, options))
        channels.append(by_definition(wanted.model, f"model.layers.{number}.mlp.down_proj", 1, 64, options))
    found = make("prune_width", mlp=64, kv_heads=1, **options).apply(opened(kind), CONTEXT)
    original = opened(kind).model.model.layers
    for block, before, kept, group in zip(found.model.model.layers, original, channels, heads, strict=True):
        assert torch.equal(block.mlp.gate_proj.weight, before.mlp.gate_proj.weight[kept])
        assert torch.equal(block.mlp.up_proj.weight, before.mlp.up_proj.weight[kept])
        assert torch.equal(block.self_attn.q_proj.weight, before.self_attn.q_proj.weight[group])
        assert torch.equal(block.self_attn.v_proj.weight, before.self_attn.v_proj.weight[group[::2] // 2])
    assert torch.allclose(logits(found), logits(wanted), atol=2e-3)


def hidden_by_definition(model: Any, count: int, by: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The dimensions that stay, and for each norm the mean of the ratio of root mean squares."""
    stages = {
        f"model.layers.{number}.{norm}": [f"model.layers.{number}.{layer}" for layer in layers]
        for number in range(len(model.model.layers))
        for norm, layers in {
            "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        }.items()
    } | {"model.norm": ["lm_head"]}
    total = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for norm, layers in stages.items():
        y = seen(model, norm, output=True)
        if by == "activation":
            total += y.abs().mean(1).norm(dim=0)
        else:
            weight = torch.cat([model.get_submodule(layer).weight.double() for layer in layers])
            energy = y.flatten(0, 1).square().sum(0) * weight.square().sum(0)
            total += energy / energy.sum()
    kept = best(total, count)
    ratios = {}
    for norm in stages:
        x, module = seen(model, norm).flatten(0, 1), model.get_submodule(norm)
        weight, eps = module.weight.double()[kept], module.variance_epsilon
        y, alone = (x[:, kept] * weight / (part.square().mean(-1, keepdim=True) + eps).sqrt() for part in (x, x[:, kept]))
        ratios[norm] = torch.linalg.lstsq(alone.flatten()[:, None], y.flatten()[:, None]).solution[0, 0]
    return kept, ratios


@pytest.mark.parametrize("by", ["contribution", "activation"])
@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "llama-biased"])
def test_hidden_dimensions_are_one_choice_and_norms_take_the_ratio(
    kind: str, by: str, make: Make, family: Callable[[str], str]
) -> None:
    wanted = opened(family(kind)).model.state_dict()
    kept, ratios = hidden_by_definition(opened(family(kind)).model, 32, by)
    technique = make("prune_width", mlp=None, hidden=32, by=by, compensate=False)
    found = technique.apply(opened(family(kind)), CONTEXT).model.state_dict()
    for name, tensor in wanted.items():
        parent, _, what = name.rpartition(".")
        if parent in ratios:
            expected = tensor[kept] * ratios[parent].float()
        elif parent.endswith(("o_proj", "down_proj")):
            expected = tensor[kept]
        else:
            expected = tensor if what == "bias" else tensor[:, kept]
        assert torch.allclose(found[name], expected, rtol=1e-4), name


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2"])
def test_what_reads_hidden_states_gives_the_least_squares_of_what_it_gave(kind: str, make: Make) -> None:
    whole = opened(kind).model
    kept, ratios = hidden_by_definition(whole, 32, "contribution")
    found = make("prune_width", mlp=None, hidden=32, damping=1e-7).apply(opened(kind), CONTEXT).model
    pairs = [("model.layers.1.input_layernorm", "model.layers.1.self_attn.v_proj"), ("model.norm", "lm_head")]
    for norm, layer in pairs:
        x, weight = seen(whole, norm).flatten(0, 1), whole.get_submodule(layer).weight.double()
        y = seen(whole, norm, output=True).flatten(0, 1)
        w = whole.get_parameter(f"{norm}.weight").double()[kept]
        alone = x[:, kept] / (x[:, kept].square().mean(-1, keepdim=True) + 1e-6).sqrt() * w * ratios[norm]
        fitted = torch.linalg.lstsq(alone, y @ weight.T).solution.T
        tied = kind == "tiny" and layer == "lm_head"  # shared with the embedding, which is not to change
        expected = weight[:, kept] if tied else fitted
        assert (found.get_submodule(layer).weight - expected).norm() < 1e-3 * expected.norm(), layer


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("cut", [{"mlp": 32}, {"mlp": None, "kv_heads": 1}])
def test_compensation_lowers_the_error_of_a_blocks_output(kind: str, cut: dict[str, Any], make: Make) -> None:
    exact = seen(opened(kind).model, "model.layers.0", output=True)

    def error(**options: Any) -> float:
        bundle = make("prune_width", **cut, **options).apply(opened(kind), CONTEXT)
        return float((seen(bundle.model, "model.layers.0", output=True) - exact).norm())

    assert error() < 0.95 * error(compensate=False)


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2"])
def test_compensation_keeps_more_of_what_a_model_says_without_hidden_dimensions(kind: str, make: Make) -> None:
    exact = logits(opened(kind)).log_softmax(-1)

    def kld(**options: Any) -> float:
        found = logits(make("prune_width", mlp=None, hidden=32, **options).apply(opened(kind), CONTEXT)).log_softmax(-1)
        return float((exact.exp() * (exact - found)).sum(-1).mean())

    assert kld() < 0.95 * kld(compensate=False)


# --- What is left -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_loads_what_was_made(
    kind: str, cut: dict[str, Any], make: Make, family: Callable[[str], str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    technique, before = make("prune_width", **cut), sizes(family(kind))
    if kind == "tiny-gemma3" and "hidden" in cut:
        with pytest.raises(RecipeError, match="Gemma3ForCausalLM scales its embeddings"):
            technique.check(before, "s")
        with pytest.raises(InputError, match="cannot be taken out"):
            technique.apply(opened(kind), CONTEXT)
        return
    technique.check(before, "s")
    made = technique.apply(opened(family(kind)), CONTEXT)
    save.save(made, tmp_path / "made")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    assert torch.allclose(logits(replace(made, model=plain)), logits(made), atol=1e-5)
    assert all(vars(module).get("in_features") == vars(plain.get_submodule(name)).get("in_features")
               for name, module in made.model.named_modules())  # fmt: skip
    after = technique.reshape(before)
    assert after == sizes(str(tmp_path / "made"))
    config = checkpoint.read_config(tmp_path / "made")
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (
        after.hidden, 2 * after.kv_heads, after.kv_heads, 16,
    )  # fmt: skip
    machine = Machine("cpu", read_bytes_per_s=2e10, flops={"float32": 1e11})
    loaded = Prediction(4 * before.parameters, 4 * before.parameters, None)
    technique.calibration_tokens = IDS.numel()
    predicted = technique.predict(before, loaded, machine)
    assert predicted.weights_bytes == checkpoint.tensor_bytes(tmp_path / "made") < loaded.weights_bytes
    assert 0 < (predicted.seconds or 0) < 1


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_sizes_that_a_check_lets_through_can_be_cut(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    kv_heads, queries, head_dim = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([8, 24])),
    )
    mlp, hidden = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 40))
    bundle = built(
        "mistral", vocab_size=320, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=1, head_dim=head_dim,
        num_attention_heads=kv_heads * queries, num_key_value_heads=kv_heads, tie_word_embeddings=data.draw(st.booleans()),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("any")
    save.save(bundle, folder / "whole")
    kind = techniques.find("prune_width")
    options = {
        "mlp": data.draw(st.one_of(st.none(), st.integers(1, mlp), st.floats(0.01, 1))),
        "kv_heads": data.draw(st.one_of(st.none(), st.integers(1, kv_heads))),
        "hidden": data.draw(st.one_of(st.none(), st.integers(1, hidden), st.floats(0.01, 1))),
        "multiple": data.draw(st.sampled_from([1, 2, 8, 32])),
        "by": data.draw(st.sampled_from(["contribution", "activation"])),
    }
    technique = kind(kind.Options(**options))
    try:
        technique.check(sizes(str(folder / "whole")), "s")
    except RecipeError:  # which are refused, the tests below say
        return
    made = technique.apply(bundle, CONTEXT)
    save.save(made, folder / "made")
    after = technique.reshape(sizes(str(folder / "whole")))
    assert after == sizes(str(folder / "made"))
    assert after.kv_heads == made.model.config.num_key_value_heads
    assert torch.allclose(logits(opened(str(folder / "made"))), logits(made), atol=1e-4)


@pytest.mark.parametrize("count", [1, 31, 128])
def test_the_size_stays_where_fewer_columns_than_that_say_anything(count: int, make: Make) -> None:
    bundle = opened("tiny")
    down = bundle.model.model.layers[0].mlp.down_proj
    down.weight[:, 5:] = 0
    exact, found = logits(bundle), make("prune_width", mlp=count, multiple=1).apply(bundle, CONTEXT)
    assert down.in_features == count
    if count == 128:
        assert torch.equal(logits(found), exact)


def test_an_interrupted_run_goes_on_to_the_same_weights(make: Make, tmp_path: Path) -> None:
    technique = make("prune_width", kv_heads=1, hidden=32)
    whole = technique.apply(opened("tiny"), CONTEXT).model.state_dict()
    walked = []

    def stop(line: str) -> None:
        walked.append(line)
        if walked.count("block 2/2") == 3:  # twice for the hidden dimensions, and now for the rest
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        technique.apply(opened("tiny"), replace(CONTEXT, unfinished=tmp_path / "kept", progress=stop))
    lines: list[str] = []
    again = technique.apply(opened("tiny"), replace(CONTEXT, unfinished=tmp_path / "kept", progress=lines.append))
    assert "going on after block 1 of 2" in lines
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.model.state_dict().items())


def test_an_artifact_runs_on_either_engine_and_can_be_rounded(tmp_path: Path) -> None:
    steps = {"prune_width": {"mlp": 64, "kv_heads": 1, "hidden": 32}}, {"rtn": {"bits": 8, "group_size": 32}}
    made = chosen(*steps, calibration={"samples": 8, "tokens": 32})
    document = optimize.optimize("tiny", made, tmp_path / "out", LoadOptions(device="cpu"))
    assert document.load_back[0].refusal is None
    for engine in ("native", "transformers"):
        spec = arms.spec(str(tmp_path / "out"), None, [f"engine.name={engine}"])
        bundle = pipeline.open_arm(spec, "cpu", LoadOptions(device="cpu"))
        assert hasattr(bundle.model, "step") is (engine == "native"), bundle.notes


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "lacks"), [("tiny-moe", "no gate_proj in block 0; a mixture's experts"), ("phi3", "no q_proj")])
def test_mixtures_and_fused_layers_are_refused(name: str, lacks: str, family: Callable[[str], str]) -> None:
    kind = techniques.find("prune_width")
    with pytest.raises(RecipeError, match=lacks):
        kind(kind.Options()).check(sizes(family(name)), "s")


def test_layers_that_are_no_linear_ones_are_refused(family: Callable[[str], str]) -> None:
    kind = techniques.find("prune_width")
    with pytest.raises(RecipeError, match="GPT2LMHeadModel has no q_proj in block 0"):
        kind(kind.Options()).check(sizes(family("gpt2")), "s")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("olmo2", {"mlp": None, "kv_heads": 1}, r"cannot be cut to .*q_norm\.weight would be \[64\], and is \[32\]"),
        ("olmo2", {"hidden": 32}, "does not read what an RMSNorm makes"),
        ("cohere", {"hidden": 32}, "does more with its hidden states than"),
    ],
)
def test_norms_that_would_be_wrong_are_refused_before_anything_is_cut(
    name: str, options: dict[str, Any], message: str, make: Make, family: Callable[[str], str]
) -> None:
    bundle = opened(family(name))
    before = logits(bundle)
    with pytest.raises(InputError, match=message):
        make("prune_width", **options).apply(bundle, CONTEXT)
    assert torch.equal(logits(bundle), before)
    assert narrowing.measure(bundle.model).mlp == 128
    make("prune_width").apply(bundle, CONTEXT)


def test_a_quantized_model_is_not_cut(make: Make, tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="quantized already"):
        make("prune_width").apply(make("rtn", bits=8, group_size=None).apply(tiny_bundle, CONTEXT), CONTEXT)


@pytest.mark.parametrize("options", [{}, {"mlp": None, "hidden": 32}])
def test_without_text_nothing_is_cut(options: dict[str, Any], make: Make, tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="a calibrated step needs text"):
        make("prune_width", **options).apply(tiny_bundle, Context())
