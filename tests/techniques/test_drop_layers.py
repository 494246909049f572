"""Depth pruning: the scores against plain torch, the choice against all others, and what is left of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stub_techniques import CALIBRATION, chosen

from infopt import pipeline
from infopt.calibrate.calls import decoder_blocks
from infopt.calibrate.influence import block_influence, evenly, greedy, in_order, left_out
from infopt.calibrate.sensitivity import Probe
from infopt.errors import InputError, RecipeError
from infopt.layers import depth
from infopt.model import load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.settings import LoadOptions

Make = Callable[..., Any]
Build = Callable[..., Any]
IDS = torch.tensor(CALIBRATION[:2])


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six blocks, of which one does next to nothing, one little, and one turns everything."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from infopt.model import tiny

    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "deep"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
        for block, strength in zip(model.model.layers, (8, 3, 0.01, 5, 1, 6), strict=True):
            block.self_attn.o_proj.weight.mul_(strength)
            block.mlp.down_proj.weight.mul_(strength)
    save.save(Bundle(model, tiny.tokenizer(), "deep"), folder)
    return str(folder)


def opened(model: str) -> Bundle:
    return load.load(reference.parse(model))


def logits(bundle: Bundle) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = bundle.model(input_ids=IDS).logits.flatten(0, 1).float()
    return found


def divergence_of(model: str, gone: set[int]) -> float:
    """KLD of the model without some blocks, by transformers alone."""
    whole, part = opened(model), opened(model)
    _, blocks = decoder_blocks(part.model)
    kept = [block for index, block in enumerate(blocks) if index not in gone]
    part.model.model.layers = torch.nn.ModuleList(kept)
    part.model.config.num_hidden_layers = len(kept)
    for number, block in enumerate(kept):
        block.self_attn.layer_idx = number
    wanted, found = (logits(each).log_softmax(-1) for each in (whole, part))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def probed(model: str) -> Probe:
    return Probe.of(opened(model), CALIBRATION[:2], torch.device("cpu"))


def test_each_block_left_out_costs_what_transformers_says(deep: str) -> None:
    costs = left_out(probed(deep), ())
    assert costs == pytest.approx({index: divergence_of(deep, {index}) for index in range(6)}, rel=1e-3, abs=1e-6)
    assert min(costs, key=costs.__getitem__) == 2


def test_what_is_gone_already_counts(deep: str) -> None:
    costs = left_out(probed(deep), {2, 4})
    assert costs == pytest.approx({index: divergence_of(deep, {2, 4, index}) for index in (0, 1, 3, 5)}, rel=1e-3)


def test_influence_is_the_angle_between_what_enters_and_what_leaves(deep: str) -> None:
    bundle = opened(deep)
    seen: list[torch.Tensor] = []
    for block in decoder_blocks(bundle.model)[1]:
        block.register_forward_hook(lambda module, given, out: seen.extend((given[0], out[0] if isinstance(out, tuple) else out)))
    logits(bundle)
    wanted = [
        1 - float(torch.nn.functional.cosine_similarity(before.flatten(0, -2), after.flatten(0, -2), dim=-1).mean())
        for before, after in zip(seen[::2], seen[1::2], strict=True)
    ]
    assert block_influence(probed(deep)) == pytest.approx(wanted, abs=1e-6)


def test_greedy_takes_the_best_at_each_turn_and_says_what_it_costs(deep: str) -> None:
    gone = greedy(probed(deep), 2)
    assert gone[0][0] == 2
    for number in (1, 2):
        assert gone[number - 1][1] == pytest.approx(
            divergence_of(deep, {index for index, _ in gone[:number]}), rel=1e-3, abs=1e-6
        )
    fixed = gone[0][0]
    assert gone[1][1] == pytest.approx(min(divergence_of(deep, {fixed, i}) for i in range(6) if i != fixed), rel=1e-3)
    assert dict(in_order(probed(deep), [index for index, _ in gone])) == pytest.approx(dict(gone))


def test_measured_choices_are_no_worse_than_random_ones(deep: str) -> None:
    best = greedy(probed(deep), 2)[-1][1]
    others = [divergence_of(deep, set(pair)) for pair in combinations(range(6), 2)]
    assert best <= sorted(others)[1] + 1e-6  # of 15 pairs


@pytest.mark.parametrize("by", ["greedy", "kld", "influence", "even", "random"])
def test_the_artifact_is_a_shallower_model(by: str, deep: str, make: Make, build: Build, tmp_path: Path) -> None:
    bundle = build(make("drop_layers", count=2, by=by), deep)
    found = json.loads(bundle.files["depth.json"])
    gone = [row["block"] for row in found["gone"]]
    assert found["by"] == by
    assert len(set(gone)) == 2
    assert len(found["influence"]) == 6
    ElementTree.fromstring(bundle.files["depth.svg"])
    made = logits(bundle)
    wanted = logits(opened(deep)).log_softmax(-1)
    assert float((wanted.exp() * (wanted - made.log_softmax(-1))).sum(-1).mean()) == pytest.approx(
        divergence_of(deep, set(gone)), rel=1e-3
    )
    save.save(bundle, tmp_path / "saved")
    plain = opened(str(tmp_path / "saved"))
    assert plain.model.config.num_hidden_layers == 4
    assert (logits(plain) - made).abs().max() < 1e-5
    ids = torch.tensor([[5, 6, 7]])
    with_cache, without = (
        plain.model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_blocks_can_be_named(deep: str, make: Make, build: Build) -> None:
    bundle = build(make("drop_layers", layers=(4, 1)), deep)
    assert [row["block"] for row in json.loads(bundle.files["depth.json"])["gone"]] == [4, 1]
    kept = [block.mlp.gate_proj.weight for block in decoder_blocks(bundle.model)[1]]
    whole = [block.mlp.gate_proj.weight for block in decoder_blocks(opened(deep).model)[1]]
    assert all(torch.equal(a, whole[i]) for a, i in zip(kept, (0, 2, 3, 5), strict=True))
    assert [block.self_attn.layer_idx for block in decoder_blocks(bundle.model)[1]] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])
def test_every_architecture_loads_back_and_has_the_shapes_that_were_said(
    kind: str, make: Make, build: Build, tmp_path: Path
) -> None:
    technique = make("drop_layers", layers=(0,))
    bundle = build(technique, kind)
    made = logits(bundle)
    save.save(bundle, tmp_path / "saved")
    assert (logits(opened(str(tmp_path / "saved"))) - made).abs().max() < 1e-5
    said = technique.reshape(shapes.shapes(reference.parse(kind)))
    assert said == shapes.shapes(reference.parse(str(tmp_path / "saved")))


@given(st.integers(1, 60), st.data())
def test_what_is_left_is_even(blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, blocks - 1))
    gone = evenly(blocks, count)
    left = [index for index in range(blocks) if index not in gone]
    assert len(gone) == count
    assert left[0] == 0
    steps = {after - before for before, after in pairwise(left)}
    assert not steps or max(steps) - min(steps) <= 1
    assert len(left) == 1 or left[-1] == blocks - 1


@given(st.integers(2, 40), st.data())
def test_names_are_counted_anew(layers: int, data: st.DataObject) -> None:
    dropped = data.draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))
    linear = {f"model.layers.{i}.mlp.up_proj": (i + 1, 8) for i in range(layers)} | {"model.in_proj": (8, 8)}
    found = depth.without(Shapes("A", layers, 8, 2, 1, 4, 30, 64, linear, None, True, 240, 8 + 16 * layers), dropped)
    kept = [i for i in range(layers) if i not in dropped]
    assert found.layers == len(kept)
    assert found.linear == {f"model.layers.{n}.mlp.up_proj": (i + 1, 8) for n, i in enumerate(kept)} | {"model.in_proj": (8, 8)}
    assert found.other == 8 + 16 * len(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 2}, "found 2 blocks to go; allowed: 0 … 1, the model has 2"),
        ({"layers": [0, 1]}, "found 2 blocks to go; allowed: 0 … 1"),
        ({"layers": [2]}, "found 2; allowed: 0 … 1, the model's blocks"),
        ({"layers": [0, 0]}, "names a block twice"),
        ({"count": -1}, "allowed: a whole number ≥ 0"),
    ],
)
def test_what_leaves_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match="drop_layers") as refused:
        pipeline.build_techniques(chosen({"drop_layers": options}), shapes.shapes(reference.parse("tiny")))
    assert message in str(refused.value)


def test_the_next_step_is_checked_against_what_is_left() -> None:
    size = shapes.shapes(reference.parse("tiny"))
    with pytest.raises(RecipeError, match=r"steps\[1\].drop_layers.count: found 1 blocks to go; allowed: 0 … 0"):
        pipeline.build_techniques(chosen({"drop_layers": {"count": 1}}, {"drop_layers": {"count": 1}}), size)


def test_models_that_name_blocks_by_number_are_refused(make: Make) -> None:
    bundle = opened("tiny")
    bundle.model.config.num_kv_shared_layers = 1
    with pytest.raises(InputError, match="names blocks by number"):
        make("drop_layers").apply(bundle, Context(calibration_ids=CALIBRATION))


def test_quantized_models_and_missing_text_are_refused(make: Make, build: Build) -> None:
    with pytest.raises(InputError, match="quantized already"):
        make("drop_layers").apply(build(make("rtn", group_size=32)), Context(calibration_ids=CALIBRATION))
    with pytest.raises(InputError, match="judged on text"):
        make("drop_layers").apply(opened("tiny"), Context())


def test_a_step_that_quantizes_may_follow(make: Make, build: Build, tmp_path: Path) -> None:
    from infopt import optimize

    steps = chosen(
        {"drop_layers": {"count": 1}}, {"rtn": {"bits": 4, "group_size": 32}}, calibration={"samples": 2, "tokens": 64}
    )
    document = optimize.optimize("tiny", steps, tmp_path / "out", LoadOptions())
    assert [step.name for step in document.steps] == ["drop_layers", "rtn"]
    assert document.steps[0].quality is not None
    assert document.steps[0].weights_bytes is not None
    assert document.bytes_after < document.steps[0].weights_bytes < document.bytes_before
    assert (tmp_path / "out" / "depth.svg").is_file()


def test_greedy_is_predicted_to_take_longer(make: Make) -> None:
    size = shapes.shapes(reference.parse("tiny"))
    machine, before = Machine("cpu", 1e10, {"float32": 1e11}), Prediction(4 * size.parameters, 0, None)
    seconds = {}
    for by in ("greedy", "influence"):
        technique = make("drop_layers", count=1, by=by)
        technique.calibration_tokens = 4096
        seconds[by] = technique.predict(size, before, machine).seconds
    assert seconds["greedy"] > seconds["influence"]
