"""A budget instead of ratios: the candidates are the frontier, their KLD is transformers' own, and the best one is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from pydantic import ValidationError
from stub_techniques import CALIBRATION, chosen

from infopt import optimize, pipeline, techniques, units
from infopt.calibrate.calls import decoder_blocks
from infopt.errors import InputError, RecipeError
from infopt.layers import frontier, width
from infopt.layers.frontier import Cut
from infopt.model import checkpoint, load, reference, save, shapes, tiny
from infopt.model.bundle import Bundle
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.settings import LoadOptions
from infopt.techniques.shrink import Shrink, ShrinkOptions

Make = Callable[..., Any]
CONTEXT = Context(calibration_ids=CALIBRATION)
HELD_OUT, REST = CALIBRATION[:2], CALIBRATION[2:]
KINDS = ("tiny", "tiny-qwen2", "tiny-gemma3")
MACHINE = Machine("cpu", read_bytes_per_s=2e9, flops={"float32": 1e11})


def opened(model: str) -> Bundle:
    return load.load(reference.parse(model))


def sizes(model: str) -> Shapes:
    return shapes.shapes(reference.parse(model))


def logits(model: Any, ids: Any = HELD_OUT) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor(ids), use_cache=False).logits.flatten(0, 1).double()
    return found


def divergence(model: Any, whole: str) -> float:
    wanted, found = logits(opened(whole).model).log_softmax(-1), logits(model).log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four blocks of three KV heads, of different strength."""
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(
        "qwen3", vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=16, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "deep"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = auto.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for block, strength in zip(model.model.layers, (8, 3, 1, 5), strict=True):
            block.self_attn.o_proj.weight.mul_(strength)
            block.mlp.down_proj.weight.mul_(strength * 4)
    save.save(Bundle(model, tiny.tokenizer(), "deep"), folder)
    return str(folder)


def read(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bundle.files["shrink.json"])
    return found


def cut_of(row: dict[str, Any]) -> Cut:
    return Cut(row["gone"], row["kv_heads"], row["mlp"])


# --- The choice -------------------------------------------------------------------------------------------------------


def score(model: Any, name: str, size: int) -> torch.Tensor:
    """What each group of `size` inputs of a layer contributes, by plain hooks on the text that may be seen."""
    seen: list[Any] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda _, x, y: seen.append(x[0].flatten(0, -2).double()))
    logits(model, REST)
    hook.remove()
    weight: Any = layer.weight.double()
    x, weight = seen[0].unflatten(-1, (-1, size)), weight.unflatten(1, (-1, size))
    return torch.stack([(x[:, group] @ weight[:, group].T).norm() for group in range(x.shape[1])])


def by_definition(model: str, blocks: list[int], cut: Cut) -> float:
    """KLD of a candidate, made by transformers and plain torch alone."""
    whole: Any = opened(model).model
    part: Any = opened(model).model
    space = narrow_of(model)
    for number in range(len(decoder_blocks(whole)[1])):
        for name, size, count in (
            (f"model.layers.{number}.self_attn.o_proj", space.head_dim * space.queries, cut.kv_heads),
            (f"model.layers.{number}.mlp.down_proj", 1, cut.mlp),
        ):
            kept = score(whole, name, size).topk(count).indices
            layer = part.get_submodule(name)
            layer.weight.data *= torch.zeros(layer.in_features // size).index_fill(0, kept, 1).repeat_interleave(size)
    kept_blocks = [index for index in range(part.config.num_hidden_layers) if index not in blocks]
    part.model.layers = torch.nn.ModuleList(part.model.layers[index] for index in kept_blocks)
    if getattr(part.config, "layer_types", None):
        part.config.layer_types = [part.config.layer_types[index] for index in kept_blocks]
    part.config.num_hidden_layers = len(kept_blocks)
    return divergence(part, model)


def narrow_of(model: str) -> width.Width:
    return width.of(sizes(model), "s")


@pytest.mark.parametrize(("kind", "share"), [("tiny", 0.62), ("tiny-qwen2", 0.6), ("tiny-gemma3", 0.6), ("deep", 0.6)])
def test_every_candidate_costs_what_plain_torch_says_and_the_best_one_is_made(
    kind: str, share: float, make: Make, deep: str
) -> None:
    model = deep if kind == "deep" else kind
    bundle = make("shrink", parameters=share).apply(opened(model), CONTEXT)
    found, limit = read(bundle), int(share * sizes(model).parameters)
    order = sorted(found["left_out"], key=found["left_out"].__getitem__)
    order = [int(index) for index in order]
    space = frontier.space(sizes(model), "s", layers=True, heads=True, channels=True, multiple=32)
    assert [cut_of(row) for row in found["candidates"]] == space.frontier(limit)
    for row in found["candidates"]:
        cut = cut_of(row)
        assert row["kld"] == pytest.approx(by_definition(model, order[: cut.gone], cut), rel=2e-3, abs=1e-6)
        assert row["parameters"] == space.parameters(cut) <= limit
    best = min(found["candidates"], key=lambda row: row["kld"])
    assert found["chosen"] == {**best, "blocks": order[: best["gone"]]}
    config = bundle.model.config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size) == (
        sizes(model).layers - best["gone"], best["kv_heads"], best["mlp"],
    )  # fmt: skip
    assert found["made_kld"] == pytest.approx(divergence(bundle.model, model), rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_what_was_zeroed_to_measure(kind: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shrink, "_make", lambda self, bundle, *rest: bundle)
    monkeypatch.setattr("infopt.calibrate.cuts.cut_kld", lambda probe, gone: 0.0)
    bundle = make("shrink").apply(opened(kind), CONTEXT)
    assert torch.equal(logits(bundle.model), logits(opened(kind).model))


def test_it_is_the_steps_that_it_names(make: Make, deep: str) -> None:
    bundle = make("shrink", parameters=0.6).apply(opened(deep), CONTEXT)
    one = read(bundle)["chosen"]
    drop = make("drop_layers", layers=one["blocks"])
    prune = make("prune_width", mlp=one["mlp"], kv_heads=one["kv_heads"])
    wanted = prune.apply(drop.apply(opened(deep), CONTEXT), replace(CONTEXT, calibration_ids=REST))
    assert one["gone"] == len(one["blocks"]) > 0
    assert bundle.model.state_dict().keys() == wanted.model.state_dict().keys()
    assert torch.allclose(logits(bundle.model), logits(wanted.model), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": False, "channels": False},
        {"layers": False, "heads": False},
        {"layers": False, "channels": False},
        {"layers": False},
        {"multiple": 8},
    ],
    ids=str,
)
def test_only_what_may_go_goes(options: dict[str, Any], make: Make, deep: str) -> None:
    bundle = make("shrink", parameters=0.8, **options).apply(opened(deep), CONTEXT)
    config, whole = bundle.model.config, sizes(deep)
    assert options.get("layers", True) or config.num_hidden_layers == whole.layers
    assert options.get("heads", True) or config.num_key_value_heads == whole.kv_heads
    assert options.get("channels", True) or config.intermediate_size == 96
    assert config.intermediate_size % options.get("multiple", 32) == 0
    assert sum(part.numel() for part in bundle.model.parameters()) <= 0.8 * whole.parameters
    ElementTree.fromstring(bundle.files["shrink.svg"])


def test_blocks_of_any_kind_can_go_alone(make: Make) -> None:
    technique, before = make("shrink", parameters=0.8, heads=False, channels=False), sizes("tiny-moe")
    technique.check(before, "s")
    bundle = technique.apply(opened("tiny-moe"), CONTEXT)
    assert bundle.model.config.num_hidden_layers == before.layers - 1
    assert "kv_heads" not in read(bundle)["chosen"]


def test_an_interrupted_run_goes_on_to_the_same_weights(make: Make, deep: str, tmp_path: Path) -> None:
    technique = make("shrink", parameters=0.6)
    whole = technique.apply(opened(deep), CONTEXT).model.state_dict()

    def stop(line: str) -> None:
        if line.startswith("block 2/"):  # of the walk that cuts
            raise KeyboardInterrupt

    kept = replace(CONTEXT, unfinished=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        technique.apply(opened(deep), replace(kept, progress=stop))
    lines: list[str] = []
    again = technique.apply(opened(deep), replace(kept, progress=lines.append)).model.state_dict()
    assert any(line.startswith("going on after block 1 of") for line in lines)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


# --- Budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2"])
@pytest.mark.parametrize(
    "budget", [{"parameters": 0.7}, {"parameters": 75_000}, {"bytes": "300kB"}, {"bytes": 300_000}, {"tpot_ms": 0.15}], ids=str
)
def test_a_budget_is_kept_and_plain_transformers_loads_what_was_made(
    kind: str, budget: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    technique, before = make("shrink", **budget), sizes(kind)
    technique.element_bytes, technique.machine = lambda: 4.0, lambda: MACHINE
    technique.calibration_tokens = 512
    technique.check(before, "s")
    loaded = Prediction(4 * before.parameters, 4 * before.parameters, None)
    predicted, reshaped = technique.predict(before, loaded, MACHINE), technique.reshape(before)
    assert predicted.weights_bytes == 4 * reshaped.parameters
    bundle = technique.apply(opened(kind), CONTEXT)
    save.save(bundle, tmp_path / "made")
    stored = checkpoint.tensor_bytes(tmp_path / "made")
    after = sizes(str(tmp_path / "made"))
    assert stored == 4 * read(bundle)["chosen"]["parameters"] == 4 * after.parameters <= predicted.weights_bytes
    if "bytes" in budget:
        assert stored <= 300_000
    elif "tpot_ms" in budget:
        touched = stored - (0 if after.is_head_tied else 4 * after.embedding)
        assert touched / 2e9 * 1e3 <= 0.15
        assert read(bundle)["read_bytes_per_s"] == 2e9
    else:
        value = budget["parameters"]
        assert after.parameters <= (value if value > 1 else value * before.parameters)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert torch.allclose(logits(plain), logits(bundle.model), atol=1e-5)


def test_a_run_measures_the_machine_and_the_next_step_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infopt.host.measured", lambda device, threads: MACHINE)
    steps = {"shrink": {"tpot_ms": 0.15, "layers": False}}, {"rtn": {"bits": 8, "group_size": 32}}
    made = chosen(*steps, calibration={"samples": 8, "tokens": 32})
    rows = pipeline.predict(made, sizes("tiny"), Prediction(4 * 94528, 4 * 94528, None), MACHINE)
    document = optimize.optimize("tiny", made, tmp_path / "out", LoadOptions(device="cpu"))
    assert document.load_back[0].refusal is None
    assert json.loads((tmp_path / "out" / "shrink.json").read_text())["chosen"]["parameters"] * 4 <= 300_000
    assert rows[-1][1].weights_bytes == pytest.approx(document.bytes_after, rel=0.1)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": 0.5, "bytes": "1MB"}, "found parameters and bytes; allowed: one budget"),
        ({"bytes": "1MB", "tpot_ms": 3.0}, "found bytes and tpot_ms; allowed: one budget"),
        ({"layers": False, "heads": False, "channels": False}, "all false; allowed: one of them true at least"),
        ({"bytes": "a lot"}, "not a size: 'a lot'; allowed: a number with B"),
        ({"parameters": 1.0}, "less than 1"),
        ({"tpot_ms": 0.0}, "greater than 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ShrinkOptions(**options)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"parameters": 0.1}, r"s\.parameters: found 0\.1, which is 9,452 parameters; allowed: 3\d,\d\d\d, the smallest that "
         r"layers and heads and channels can make it, … 94,527", r"parameters: \d+"),
        ({"parameters": 94_528}, r"s\.parameters: found 94528, .*and the model's 94,528 meet it already", None),
        ({"bytes": "20kB"}, r"s\.bytes: found 20kB, which is 5,000 parameters; allowed", r"bytes: \d+"),
        ({"bytes": "1MB"}, r"s\.bytes: found 1MB, .*the model's 94,528 meet it", None),
        ({"tpot_ms": 0.01}, r"s\.tpot_ms: found 0\.01, which is 5,000 parameters; allowed", r"tpot_ms: 0\.\d+"),
        ({"tpot_ms": 1.0}, r"s\.tpot_ms: found 1\.0, .*the model's 94,528 meet it", None),
    ],
)  # fmt: skip
def test_budgets_out_of_reach_are_refused_with_what_is_in_reach(
    options: dict[str, Any], message: str, hint: str | None, make: Make
) -> None:
    technique = make("shrink", **options)
    technique.element_bytes, technique.machine = lambda: 4.0, lambda: MACHINE
    with pytest.raises(RecipeError, match=message) as caught:
        technique.check(sizes("tiny"), "s")
    with pytest.raises(RecipeError, match=message.replace(r"s\.", r"shrink\.")):
        technique.apply(opened("tiny"), CONTEXT)
    if hint is None:
        assert caught.value.hint is None
        return
    name, _, value = (caught.value.hint or "").partition(": ")
    again = make("shrink", **{name: float(value) if "." in value else int(value)})
    again.element_bytes, again.machine = technique.element_bytes, technique.machine
    again.check(sizes("tiny"), "s")


def test_what_is_not_known_yet_is_checked_when_it_runs(make: Make) -> None:
    technique = make("shrink", bytes="20kB")
    technique.check(sizes("tiny"), "s")
    assert technique.reshape(sizes("tiny")) == sizes("tiny")
    with pytest.raises(RecipeError, match="found 20kB"):
        technique.apply(opened("tiny"), CONTEXT)


@pytest.mark.parametrize("machine", [None, lambda: Machine("cpu", read_bytes_per_s=None)])
def test_without_a_read_rate_time_is_no_budget(machine: Any, make: Make) -> None:
    technique = make("shrink", tpot_ms=0.15)
    technique.machine, technique.element_bytes = machine, lambda: 4.0
    with pytest.raises(RecipeError, match="found tpot_ms, but no read rate was measured") as caught:
        technique.apply(opened("tiny"), CONTEXT)
    assert "bytes: 300MB" in (caught.value.hint or "")
    if machine:
        with pytest.raises(RecipeError, match=r"s\.tpot_ms: found"):
            technique.check(sizes("tiny"), "s")


def test_mixtures_keep_their_widths(make: Make) -> None:
    with pytest.raises(RecipeError, match="a mixture's experts") as caught:
        make("shrink").check(sizes("tiny-moe"), "s")
    assert caught.value.hint == "heads: false and channels: false let blocks alone go"


def test_text_and_weights_that_can_be_cut_are_needed(make: Make, tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="what goes is chosen on text"):
        make("shrink").apply(tiny_bundle, Context())
    rounded = make("rtn", bits=8, group_size=None).apply(tiny_bundle, CONTEXT)
    with pytest.raises(InputError, match="quantized already"):
        make("shrink").apply(rounded, CONTEXT)


def test_one_window_serves_for_everything(make: Make) -> None:
    lines: list[str] = []
    bundle = make("shrink").apply(opened("tiny"), Context(calibration_ids=CALIBRATION[:1], progress=lines.append))
    assert read(bundle)["tokens"] == 64
    assert sum(line.startswith("candidate ") for line in lines) == len(read(bundle)["candidates"])
    assert techniques.find("shrink").neutral is None
    assert units.significant(read(bundle)["chosen"]["kld"]) in "\n".join(lines)
