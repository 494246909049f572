"""The draft that was fastest on the prompts at hand is taken, and the line that says so has both speed-ups."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from conftest_runtime import VOCABULARY, DoubleStep, tiny

from infopt.engines.native import NativeEngine
from infopt.errors import InputError
from infopt.protocols import Request
from infopt.runtime import draft_choice
from infopt.runtime.draft_length import DraftLength
from infopt.runtime.drafts import Draft, ModelDraft, Wanted
from infopt.runtime.loop import Ask, Loop
from infopt.runtime.native_model import NativeModel, Settings, open_native
from infopt.runtime.steps import Output, Room, Run

FLOAT = Settings(2, "float32", "float32", "float32")
PROMPT = tuple((5 * i * i + 3) % VOCABULARY for i in range(20))


class Clock:
    """Moves with what a step computes: a second, and `each` for every further token."""

    def __init__(self, inner: DoubleStep, each: float) -> None:
        self.inner, self.each, self.time = inner, each, 0.0
        self.name, self.vocabulary, self.context = inner.name, inner.vocabulary, inner.context

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, runs: Sequence[Run], want_logits: bool = True) -> Output:
        self.time += 1 + self.each * (sum(len(run.ids) for run in runs) - 1)
        return self.inner.run(runs, want_logits)

    def now(self) -> float:
        return self.time


class Known:
    """Drafts what the model will say, or the wrong thing."""

    is_free = True

    def __init__(self, text: Sequence[int], wrong: int = 0) -> None:
        self.text, self.wrong = list(text), wrong

    def open(self) -> None: ...

    def require(self, rooms: Sequence[Room], beside: float = 0) -> None: ...

    def catch_up(self, wanted: Sequence[Wanted]) -> None: ...

    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        return [self._draft(len(each.ids), each.most) for each in wanted]

    def _draft(self, length: int, most: int) -> Draft:
        tokens = tuple((token + self.wrong) % VOCABULARY for token in self.text[length : length + most])
        return Draft(tokens, (None,) * len(tokens))

    def close(self, state: None) -> None: ...


@pytest.fixture(scope="module")
def text(double: DoubleStep) -> list[int]:
    return [*PROMPT, *Loop(double).run([Ask(PROMPT, 60)])[0].ids]


def chosen(*arguments: Any) -> tuple[draft_choice.Tried, str]:
    found = draft_choice.choose(*arguments)
    assert found
    return found


def test_one_token_is_nothing_to_try_on(double: DoubleStep, text: list[int]) -> None:
    assert draft_choice.choose(double, {"right": Known(text)}, 6, [Ask(PROMPT, 1)]) is None


def test_the_fastest_is_taken(double: DoubleStep, text: list[int]) -> None:
    step = Clock(double, each=0.05)
    best, said = chosen(step, {"wrong": Known(text, wrong=1), "right": Known(text)}, 6, [Ask(PROMPT, 60)], step.now)
    assert isinstance(best.drafter, Known)
    assert best.drafter.wrong == 0
    found = re.match(
        r"draft right: the fastest on 1 of the prompts: .*right (\S+)× plain decoding \(predicted (\S+)×; (\S+) tokens", said
    )
    assert found, said
    measured, predicted, tokens = map(float, found.groups())
    assert 3 < measured < tokens <= 7
    assert predicted == pytest.approx(measured, rel=0.15), "seconds of steps explain the speed-up"
    assert best.length.choose(0) > 3, "what was learnt is kept"


def test_none_is_taken_where_none_pays(double: DoubleStep, text: list[int]) -> None:
    step = Clock(double, each=0.05)
    best, said = chosen(step, {"wrong": Known(text, wrong=1)}, 6, [Ask(PROMPT, 40)], step.now)
    assert best.drafter is None
    assert said.startswith("no draft: on 1 of the prompts none was faster: wrong 0.")


def test_a_dear_draft_is_not_taken_however_right(double: DoubleStep) -> None:
    """The model itself as draft: every token right, and each costs what it saves."""
    step = Clock(double, each=0.05)
    best, _ = chosen(step, {"itself": ModelDraft(step)}, 6, [Ask(PROMPT, 40)], step.now)
    assert best.drafter is None


@pytest.fixture
def opened() -> Callable[..., NativeModel]:
    return lambda: open_native(tiny(), FLOAT)


@pytest.mark.parametrize("draft", ["self", "auto", "other"])
@pytest.mark.parametrize("batch", [1, 3])
def test_text_stays_that_of_plain_decoding(opened: Callable[..., NativeModel], draft: str, batch: int) -> None:
    requests = [Request(str(row), tuple((7 * i + row) % VOCABULARY for i in range(9 + row)), 24) for row in range(batch)]
    wanted = NativeEngine(opened()).generate(requests).output_ids
    model = opened()
    model.drafts["other"] = open_native(tiny(num_hidden_layers=1), Settings(2)).step
    engine = NativeEngine(model, draft=draft, among=("prompt_lookup", "self", "other"), draft_layers=1)
    for _ in range(2):  # auto chooses in the first call
        found = engine.generate(requests)
        assert found.output_ids == wanted
    assert (len(engine.notes) == 1) == (draft == "auto"), "the choice is told"
    if draft != "auto":
        assert found.accepted_at
        assert found.accepted_at[0][0] >= found.accepted_at[0][1]
        assert found.accepted == sum(kept for _, kept in found.accepted_at)


def test_early_layers_share_weights_and_threads(opened: Callable[..., NativeModel]) -> None:
    step = opened().step
    early = step.first_layers(1)  # type: ignore[union-attr]
    assert early.layer_count == 1
    assert early.read_bytes < step.read_bytes
    for count in (0, 3, 99):
        with pytest.raises(InputError, match=f"{count} early layers; allowed: 1 … 2"):
            step.first_layers(count)  # type: ignore[union-attr]


def test_a_draft_takes_turns_on_the_threads_of_its_model_and_may_outlive_it(opened: Callable[..., NativeModel]) -> None:
    model = opened()
    draft = open_native(tiny(num_hidden_layers=1), replace(FLOAT, beside=model.step)).step
    alone = open_native(tiny(num_hidden_layers=1), FLOAT).step
    ids = [(7 * i) % VOCABULARY for i in range(20)]
    found = [step.run([Run(step.open(), ids)]).tokens for step in (draft, alone)]
    model.step.close_engine()  # type: ignore[union-attr]
    found.append(draft.run([Run(draft.open(), ids)]).tokens)
    assert found[0] == found[1] == found[2]


def test_memory_for_drafts_is_asked_for_beforehand(opened: Callable[..., NativeModel]) -> None:
    model = opened()
    model.drafts["other"] = open_native(tiny(num_hidden_layers=1), replace(FLOAT, most_kv_bytes=1000)).step
    with pytest.raises(InputError, match="keys and values of 1 × 33 tokens take"):
        NativeEngine(model, draft="other").generate([Request("0", tuple(range(9)), 24)])


def test_swapped_layers_have_no_early_part() -> None:
    model = open_native(tiny(), Settings(2, "float32", "float32", "float32", "swapped"))
    with pytest.raises(InputError, match="draft: self needs whole steps"):
        NativeEngine(model, draft="self")


def test_auto_leaves_out_what_the_model_has_no_layers_for(opened: Callable[..., NativeModel]) -> None:
    engine = NativeEngine(opened(), draft="auto", among=("prompt_lookup", "self"), draft_layers=6)
    assert engine.notes == ("draft self was not tried: 6 early layers; allowed: 1 … 2",)
    request = Request("0", PROMPT, 1)
    assert len(engine.generate([request]).output_ids[0]) == 1
    assert len(engine.notes) == 1, "a single token decides nothing"
    engine.generate([Request("0", PROMPT, 12)])
    assert "prompt_lookup" in engine.notes[-1]


def test_reading_a_long_prompt_is_no_cost_of_a_drafted_token(double: DoubleStep) -> None:
    target, draft = Clock(double, each=0.05), Clock(double, each=1.0)
    draft.time = 0.0
    length = DraftLength(4, is_fixed=True)
    prompt = tuple(range(100))
    Loop(target, ModelDraft(draft), length, lambda: target.time + draft.time).run([Ask(prompt, 9)])
    assert length.draft_s <= 2.0, "a second for each token, and one for what was accepted before"


def test_auto_leaves_out_drafts_that_memory_is_short_for(opened: Callable[..., NativeModel]) -> None:
    model = opened()
    model.drafts["other"] = open_native(tiny(num_hidden_layers=1), replace(FLOAT, most_kv_bytes=1000)).step
    engine = NativeEngine(model, draft="auto", among=("prompt_lookup", "other"))
    found = engine.generate([Request("0", PROMPT, 24)])
    assert found.output_ids == NativeEngine(opened()).generate([Request("0", PROMPT, 24)]).output_ids
    assert "other was not tried: keys and values of 1 × 44 tokens take" in engine.notes[-1]


def test_drafting_models_count_among_the_weights(opened: Callable[..., NativeModel]) -> None:
    model = opened()
    alone = model.resident_bytes
    model.drafts["other"] = open_native(tiny(num_hidden_layers=1), FLOAT).step
    assert model.resident_bytes == alone + model.drafts["other"].weights_bytes
