"""The GPU's steps give the logits of transformers' modules, here by the kernels' twins; the kernels themselves once, interpreted.

On a machine with a GPU the same tests run there, captured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest_runtime import SHAPES, VOCABULARY, off, wanted
from ptx import teach

from infopt.errors import InputError
from infopt.kernels.gpu import products
from infopt.kernels.gpu.choices import Table
from infopt.kernels.gpu.ops import TWINS, kernels
from infopt.kernels.gpu.weight import dense, float8, integers
from infopt.kernels.packed import rounded
from infopt.runtime import architecture, graph_step
from infopt.runtime.decoder import Unfit
from infopt.runtime.device_pages import FIRST
from infopt.runtime.device_weights import packed
from infopt.runtime.draft_length import DraftLength
from infopt.runtime.drafts import ModelDraft, PromptLookup
from infopt.runtime.graph_step import GraphStep
from infopt.runtime.loop import Ask, Loop, Sampling
from infopt.runtime.native_model import Settings, open_native
from infopt.runtime.pages import PAGE, Budget
from infopt.runtime.steps import Room, Run
from infopt.runtime.whole_step import WholeStep

Make = Callable[..., Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = [(11 * i * i + 5 * i) % VOCABULARY for i in range(300)]


def opened(model: Any, **settings: Any) -> GraphStep:
    """Of a copy: a step consumes its model."""
    made = {name: settings.pop(name) for name in ("weights", "head", "group") if name in settings}
    return GraphStep(packed(copy.deepcopy(model), device=DEVICE, **made), **settings)


def logits(step: GraphStep, sequence: Any, ids: list[int]) -> torch.Tensor:
    found = step.run([Run(sequence, ids, all_logits=True)]).logits
    assert found is not None
    return found.cpu()


def asks(count: int = 24, **named: Any) -> list[Ask]:
    return [Ask(tuple(IDS[start : start + size]), count, **named) for start, size in ((0, 5), (30, 40), (80, 70))]


@pytest.mark.parametrize("name", SHAPES)
def test_every_class_in_one_go_and_token_by_token(make: Make, name: str) -> None:
    model = make(name)
    expected = wanted(model, IDS[:150])
    for kv, most in (("float32", 1e-4), ("float16", 1e-2)):
        step = opened(model, kv=kv)
        sequence = step.open()
        found = [logits(step, sequence, part) for part in (IDS[:70], IDS[70:75], *([token] for token in IDS[75:150]))]
        assert off(torch.cat(found), expected) < most


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_classes_are_checked_on_a_small_model(make: Make, name: str) -> None:
    architecture.check(make(name), lambda small: GraphStep(packed(small, device=DEVICE)))


def test_the_kernels_are_the_twins(make: Make) -> None:
    model = make("qwen3", num_hidden_layers=1)
    sequences, found = [], []
    for ops in (TWINS, kernels(Table(), 8)):
        step = opened(model, kv="float32", ops=ops)
        sequences = [step.open(), step.open(), step.open()]
        runs = [Run(sequences[0], IDS[:20]), Run(sequences[1], IDS[5:8]), Run(sequences[2], IDS[9:10])]
        long = step.run([Run(step.open(), IDS[:70], all_logits=True)])  # by the library's products
        found.append([step.run(runs), step.run([Run(each, [7]) for each in sequences]), long])
    for twin, kernel in zip(*found, strict=True):
        assert off(kernel.logits, twin.logits.cpu()) < 1e-4
        assert kernel.tokens == twin.tokens
        assert kernel.margins == pytest.approx(twin.margins, abs=1e-3)


@pytest.mark.parametrize("weights", ["int4", "float8"])
def test_a_step_as_a_gpu_computes_it(make: Make, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, with the assembly that only GPUs have; norms go with the products around them."""
    if DEVICE == "cpu":
        teach(monkeypatch)
        monkeypatch.setattr(products, "_has_asm", lambda x: True)
    model = make("qwen3", num_hidden_layers=1).bfloat16()
    found = []
    for ops in (TWINS, kernels(Table(), 8)):
        step = opened(model, ops=ops, weights=weights)
        sequences = [step.open(), step.open()]
        step.run([Run(sequences[0], IDS[:7]), Run(sequences[1], IDS[5:8])])  # fewer than have float8 activations, too
        runs = ([Run(sequences[0], [7]), Run(sequences[1], [9, 8])], [Run(sequences[0], [3])])
        found.append([step.run(each).logits for each in runs])
    for twin, kernel in zip(*found, strict=True):
        assert off(kernel.cpu(), twin.cpu()) < 2e-2  # what rounding in another order makes of bfloat16


def test_rows_of_unequal_length_do_not_see_each_other(make: Make) -> None:
    model = make("mistral, window")
    step = opened(model, kv="float32")
    texts = [IDS[:3], IDS[50:120], IDS[7:8], IDS[30:95], IDS[:17]]
    sequences = [step.open() for _ in texts]
    first = step.run([Run(s, text) for s, text in zip(sequences, texts, strict=True)])
    second = step.run([Run(s, [9]) for s in sequences])
    for index, text in enumerate(texts):
        expected = wanted(model, [*text, 9])
        assert first.logits is not None
        assert second.logits is not None
        assert off(first.logits[index], expected[-2]) < 1e-4
        assert off(second.logits[index], expected[-1]) < 1e-4


@pytest.mark.parametrize("weights", ["int8", "int4", "float8"])
def test_weights_are_rounded_as_asked(make: Make, weights: str) -> None:
    if weights == "float8" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no float8")
    model = make()
    step, plain = opened(model, weights=weights, kv="float32"), opened(model)
    for module in model.model.modules():  # the same numbers in transformers' modules
        if isinstance(module, torch.nn.Linear):
            bits = 8 if weights == "int8" else 4
            made = float8(module.weight) if weights == "float8" else integers(*rounded(module.weight, bits, 32), None, bits, 32)
            module.weight.data = dense(made)
    assert f"weights {weights}, head float32" in step.about
    assert off(logits(step, step.open(), IDS[:40]), wanted(model, IDS[:40])) < 1e-4
    assert step.read_bytes < plain.read_bytes / 2


class Replaying(GraphStep):
    """Leaves logits where the next step writes its own, as graphs do."""

    def _compute(self, call: Any, tokens: int) -> None:
        where = call.logits
        super()._compute(call, tokens)
        if len(where):
            call.logits = where.copy_(call.logits)


def test_logits_outlive_the_next_step(make: Make) -> None:
    step = Replaying(packed(copy.deepcopy(make()), device=DEVICE), kv="float32")
    sequence = step.open()
    found = [step.run([Run(sequence, [token])]).logits for token in IDS[:4]]
    assert off(torch.cat([each for each in found if each is not None]), wanted(make(), IDS[:4])) < 1e-4


def test_a_prompt_goes_in_parts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = make(), IDS[:50]
    monkeypatch.setattr(graph_step, "CHUNK", 16)
    step = opened(model, kv="float32")
    assert off(logits(step, step.open(), whole), wanted(model, whole)) < 1e-4
    last = step.run([Run(step.open(), whole)])
    assert last.logits is not None
    assert len(last.tokens) == len(last.logits) == 1
    assert off(last.logits[0].cpu(), wanted(model, whole)[-1]) < 1e-4


def test_it_says_what_the_cpu_says(make: Make) -> None:
    model = make()
    there, here = Loop(WholeStep(copy.deepcopy(model), threads=1, kv="float32")), opened(model, kv="float32")
    expected = [answer.ids for answer in there.run(asks())]
    assert [answer.ids for answer in Loop(here).run(asks())] == expected
    drawn = Sampling(temperature=0.9, top_p=0.9, candidates=2)
    expected = [answer.ids for answer in there.run(asks(sampling=drawn, seed=3))]
    assert [answer.ids for answer in Loop(here).run(asks(sampling=drawn, seed=3))] == expected


class Counting(GraphStep):
    """Counts steps that were launched, and those that had to be asked for."""

    launched = asked = 0

    def _launch(self, call: Any) -> None:
        self.launched += 1
        super()._launch(call)

    def _fill(self, *given: Any) -> None:
        self.asked += 1
        super()._fill(*given)


def test_steps_launched_ahead_give_the_same_text(make: Make) -> None:
    model = make()
    plain, ahead = opened(model), Counting(packed(copy.deepcopy(model), device=DEVICE))
    plain.goes_ahead, ahead.goes_ahead = False, True
    expected = [answer.ids for answer in Loop(plain).run(asks(150))]  # through pages, and more of them than there are at first
    assert [answer.ids for answer in Loop(ahead).run(asks(150))] == expected
    assert ahead.asked <= 3  # the prompts', and the first step after them
    assert ahead.launched <= 152  # and nothing is launched behind the end
    assert len(ahead.pages.layers[0].keys) <= FIRST


def test_what_was_launched_ahead_and_is_not_asked_for_does_no_harm(make: Make) -> None:
    model = make()
    step = opened(model, kv="float32")
    step.goes_ahead = True
    sequence = step.open()
    step.run([Run(sequence, IDS[:20])], want_logits=False)
    step.run([Run(sequence, IDS[20:21], goes_on=True)], want_logits=False)
    beside = step.fork(sequence)
    for each, token in ((sequence, 3), (beside, 5)):  # neither is what the model said
        expected = wanted(model, [*IDS[:21], token, 8])
        step.run([Run(each, [token], goes_on=True)], want_logits=False)
        assert off(logits(step, each, [8])[0], expected[-1]) < 1e-4
    step.cut(sequence, 10)
    assert off(logits(step, sequence, IDS[10:12]), wanted(model, IDS[:12])[-2:]) < 1e-4


def test_other_steps_in_between_let_go_of_what_was_launched_ahead(make: Make) -> None:
    """Drafts that are verified, prompts, rows that left: what stands in the cache at the same length is another text then."""
    model = make()
    step = opened(model, kv="float32")
    step.goes_ahead = True
    rows = [step.open() for _ in range(3)]
    step.run([Run(row, IDS[:20]) for row in rows], want_logits=False)
    said = step.run([Run(row, [5], goes_on=True) for row in rows], want_logits=False).tokens
    step.run([Run(row, [6, 7], all_logits=True) for row in rows[:2]], want_logits=False)  # a draft of two rows, refused
    for row in rows[:2]:
        step.cut(row, 20)
    step.run([Run(row, [9]) for row in rows[:2]], want_logits=False)
    found = step.run([Run(row, [token]) for row, token in zip(rows, said, strict=True)], want_logits=False).tokens
    texts = [[*IDS[:20], 9, said[0]], [*IDS[:20], 9, said[1]], [*IDS[:20], 5, said[2]]]
    assert found == [int(wanted(model, text)[-1].argmax()) for text in texts]
    step.run([Run(rows[0], [found[0]], goes_on=True)], want_logits=False)
    step.cut(rows[0], 0)
    step.run([Run(rows[0], IDS[50:72])], want_logits=False)  # as long as the other was
    again = step.run([Run(rows[0], [4])], want_logits=False).tokens
    assert again == [int(wanted(model, [*IDS[50:72], 4])[-1].argmax())]


def test_more_rows_than_a_graph_has(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_step, "ROWS", (1, 2))
    model = make()
    step = opened(model, kv="float32")
    rows = [step.open() for _ in range(5)]
    found = step.run([Run(row, IDS[n : n + 3]) for n, row in enumerate(rows)])
    assert found.logits is not None
    for n, each in enumerate(found.logits):
        assert off(each, wanted(model, IDS[n : n + 3])[-1]) < 1e-4


def test_pages_are_given_back_and_a_row_that_left_is_not_written_to(make: Make) -> None:
    model = make()
    step = opened(model, kv="float32")
    first, second, third = step.open(), step.open(), step.open()
    runs = [Run(first, IDS[:70]), Run(second, IDS[:30]), Run(third, IDS[:5])]
    step.run(runs)
    step.run([Run(each, [1]) for each in (first, second, third)])
    step.close(second)
    taken = step.open()
    step.run([Run(taken, IDS[40:100])])  # in the pages of the second
    for _ in range(3):
        step.run([Run(first, [2]), Run(third, [2])])  # three rows are a graph's, of which the last is nobody's
    assert off(logits(step, taken, [4])[0], wanted(model, [*IDS[40:100], 4])[-1]) < 1e-4


def test_drafts_do_not_change_the_text(make: Make) -> None:
    model = make()
    step = opened(model, kv="float32")
    expected = [answer.ids for answer in Loop(step).run(asks(40))]
    for drafter in (PromptLookup(), ModelDraft(step.first_layers(2))):
        for length in (DraftLength(most=4, is_fixed=True), DraftLength(most=8)):
            assert [answer.ids for answer in Loop(step, drafter, length).run(asks(40))] == expected
    with pytest.raises(InputError, match="allowed: 1 … 2"):
        step.first_layers(3)


def test_too_much_is_refused_before_anything_is_computed(make: Make) -> None:
    step = opened(make(), budget=Budget(300_000))
    with pytest.raises(InputError, match=r"8 × 400 tokens take .* MB; .* kB are left"):
        step.require([Room(400, 8)])
    with pytest.raises(InputError, match="the model's context allows 512"):
        step.run([Run(step.open(), IDS * 2, all_logits=True)])


def test_room_is_made_at_once(make: Make) -> None:
    step = opened(make())
    step.require([Room(400, 8)])
    assert len(step.pages.layers[0].keys) == 8 * -(-400 // PAGE) + 1  # and nobody's page


def test_a_nan_names_its_layer(make: Make) -> None:
    model = make()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    step = opened(model)
    with pytest.raises(InputError, match="not finite; layer 2 is where"):
        step.run([Run(step.open(), IDS[:4])])
    model = make("llama, biases, own head")
    model.lm_head.weight.data[7] = torch.nan
    step = opened(model)
    with pytest.raises(InputError, match="the output head"):
        step.run([Run(step.open(), IDS[:4])])


def test_other_devices_and_kinds_are_refused_with_the_reason(make: Make) -> None:
    for settings, said in (
        (Settings(1, device="mps"), "on CPUs and on CUDA GPUs, not on mps"),
        (Settings(1, weights="float8"), "float8 is multiplied by GPUs alone"),
        (Settings(1, device="cuda", way="swapped"), "swapped is of CPUs alone"),
    ):
        with pytest.raises(Unfit, match=said):
            open_native(make(), settings)


def test_weights_are_given_back(make: Make) -> None:
    model = make()
    packed(model, device=DEVICE)
    assert not sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" not in name)
