"""Before and after on prompts: counts, divergence, repetition, and the engine's answers cleaned up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from infopt.data.expect import parse_expect
from infopt.data.prompts import Prompt
from infopt.errors import InputError
from infopt.protocols import Request, Trace
from infopt.quality.behaviour import Answer, compare_answers, first_divergence, repetition, run_prompts, top_two_margin
from infopt.sections import SamplingSection


class ScriptedEngine:
    """Answers each prompt with the given text and keeps the requests."""

    name = "scripted"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
        self._outputs = [tuple(tokenizer(text)["input_ids"]) for text in texts]
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> Trace:
        assert len(requests) == 1, "one prompt per batch"
        output = self._outputs[len(self.requests)][: requests[0].max_new_tokens]
        self.requests.append(requests[0])
        return Trace((output,), tuple(float(i) for i in range(len(output))), (1,) * len(output))

    def close(self) -> None: ...


def prompt(name: str, **expect: object) -> Prompt:
    return Prompt(name, text="Q", expect=parse_expect(expect, name) if expect else None)


def answer(name: str, text: str) -> Answer:
    return Answer(name, (1, 2, 3), tuple(text.encode()), text)


PROMPTS = [
    prompt("kept", contains="7"),
    prompt("broken", contains="7"),
    prompt("fixed", contains="7"),
    prompt("fail", contains="7"),
]
OLD = [answer("kept", "7"), answer("broken", "7"), answer("fixed", "b"), answer("fail", "b")]
NEW = [answer("kept", "77"), answer("broken", "I can't help with that."), answer("fixed", "7"), answer("fail", "b")]


def test_outcomes_are_counted_both_ways() -> None:
    result = compare_answers([*PROMPTS, prompt("free")], [*OLD, answer("free", "x")], [*NEW, answer("free", "x")])
    assert [outcome.status for outcome in result.outcomes] == ["kept", "broken", "fixed", "both_fail", None]
    assert (result.checked, result.same, result.mcnemar_p) == (4, 2, 1.0)
    assert (result.refusals_reference, result.refusals) == (0, 1)
    assert [failure.rule for failure in result.outcomes[2].failures_reference] == ["contains"]
    assert result.outcomes[2].failures == ()
    assert [(o.tokens_reference, o.tokens) for o in result.outcomes[:2]] == [(1, 2), (1, 23)]
    figures = result.figures()
    assert {key: value.value for key, value in figures.items()} == {
        "behaviour.pass_share": 0.5, "behaviour.broken_share": 0.25, "behaviour.same_share": 0.4,
    }  # fmt: skip
    assert [value.samples for value in figures.values()] == [4, 4, 5]
    assert all(value.low is not None and value.low < (value.value or 0) for value in figures.values())


def test_prompts_without_rules_have_no_pass_share() -> None:
    figures = compare_answers([prompt("free")], [answer("free", "x")], [answer("free", "y")]).figures()
    assert figures["behaviour.pass_share"].value is None
    assert figures["behaviour.pass_share"].reason == "no prompt has expect rules"
    assert figures["behaviour.same_share"].value == 0


def test_margin_is_asked_only_at_divergence() -> None:
    asked: list[tuple[object, ...]] = []

    def margin(prompt_ids: Sequence[int], output_ids: Sequence[int], position: int) -> float:
        asked.append((tuple(prompt_ids), tuple(output_ids), position))
        return 0.125

    rows = [prompt("same"), prompt("other")]
    old = [answer("same", "abc"), answer("other", "abc")]
    new = [answer("same", "abc"), answer("other", "abX")]
    result = compare_answers(rows, old, new, margin)
    assert asked == [((1, 2, 3), tuple(b"abc"), 2)]
    assert [(o.divergence, o.divergence_margin) for o in result.outcomes] == [(None, None), (2, 0.125)]


def test_top_two_margin_reads_the_logits_before_the_position() -> None:
    seen: list[list[int]] = []

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        logits = torch.zeros(1, ids.shape[1], 5)
        logits[0, -1] = torch.tensor([0.0, 3.0, 1.0, 2.5, -1.0])
        return logits

    assert top_two_margin(logits_of)((7, 8), (1, 2, 3), 2) == 0.5
    assert seen == [[7, 8, 1, 2]]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_first_divergence_is_the_length_of_the_common_start(one: list[int], two: list[int]) -> None:
    found = first_divergence(one, two)
    assert found == first_divergence(two, one)
    if found is None:
        assert one == two
    else:
        assert one[:found] == two[:found]
        assert one[found : found + 1] != two[found : found + 1]


def test_repetition() -> None:
    assert repetition([1, 2, 3]) is None
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 13) == 0.9  # ten 4-grams, one of them new
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    result = compare_answers([prompt("p")], [answer("p", "ab")], [answer("p", "a" * 13)])
    assert (result.repetition_reference, result.repetition) == (None, 0.9)


def test_run_prompts_cleans_answers_and_limits_tokens(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        Prompt("short", text="Hi", max_tokens=3),
        Prompt("default", text="Hi"),
        Prompt("rule", text="Hi", expect=parse_expect({"max_tokens": 20}, "f:1")),
    ]
    engine = ScriptedEngine(byte_tokenizer, ["Hello there", "Héllo</s></s>", "x" * 50])
    lines: list[str] = []
    answers = run_prompts(engine, rows, byte_tokenizer, default_max_tokens=12, progress=lines.append)
    assert [a.text for a in answers] == ["Hel", "Héllo", "x" * 21]
    assert [len(a.output_ids) for a in answers] == [3, 6, 21]
    assert answers[0].prompt_ids == tuple(byte_tokenizer("Hi")["input_ids"])
    assert [request.max_new_tokens for request in engine.requests] == [3, 12, 21]
    assert not any(request.ignore_eos for request in engine.requests)
    assert lines[0] == "behaviour: prompt 1 of 3"
    result = compare_answers(rows, answers, answers)
    assert [failure.rule for failure in result.outcomes[2].failures] == ["max_tokens"]


class SamplingEngine(ScriptedEngine):
    """Answers every prompt with all texts, each as likely as `levels` says."""

    levels: tuple[float, ...] | None = None

    def generate(self, requests: Sequence[Request]) -> Trace:
        return Trace(tuple(self._outputs), (0.0,), (1,), mean_logprobs=self.levels)


TEXTS = ["It is 7.", "it  is 7.", "7, I think", "Maybe 8", "no"]


@pytest.mark.parametrize(
    ("choose", "levels", "chosen"),
    [
        ({}, None, None), ({}, (-5.0, -4.0, -3.0, -2.0, -1.0), None),
        ({"choose": "majority"}, None, 0), ({"choose": "majority"}, (-5.0, -4.0, -3.0, -2.0, -1.0), 1),
        ({"choose": "majority", "answer": r"\d"}, (-5.0, -4.0, -3.0, -2.0, -1.0), 2),
        ({"choose": "mean_logprob"}, (-5.0, -4.0, -3.0, -2.0, -3.0), 3),
        ({"choose": "check"}, (-5.0, -4.0, -3.0, -2.0, -1.0), 2), ({"choose": "check"}, None, 0),
    ],
)  # fmt: skip
def test_the_chosen_row_is_the_answer_that_is_judged(
    byte_tokenizer: PreTrainedTokenizerFast, choose: dict[str, str], levels: tuple[float, ...] | None, chosen: int | None
) -> None:
    engine = SamplingEngine(byte_tokenizer, [f"{text}</s>" for text in TEXTS])
    engine.levels = levels
    sampling = SamplingSection.model_validate({"temperature": 1.0, "candidates": 5, **choose})
    (found,) = run_prompts(engine, [prompt("p", contains="7")], byte_tokenizer, sampling=sampling)
    assert [row.text for row in found.rows] == TEXTS
    assert [row.mean_logprob for row in found.rows] == list(levels or [None] * 5)
    assert (found.choice.index if found.choice else None) == chosen
    taken = found.rows[chosen or 0]
    assert (found.text, found.output_ids) == (taken.text, taken.output_ids)
    result = compare_answers([prompt("p", contains="7")], [found], [found])
    assert result.count("kept") == (chosen != 3)


def test_a_choice_without_what_it_needs_is_refused(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    engine = SamplingEngine(byte_tokenizer, TEXTS)
    for choose, said in (("mean_logprob", "no log-probabilities"), ("check", "no rules")):
        sampling = SamplingSection.model_validate({"temperature": 1.0, "candidates": 5, "choose": choose})
        with pytest.raises(InputError, match=said):
            run_prompts(engine, [prompt("p")], byte_tokenizer, sampling=sampling)


def test_other_prompts_are_refused() -> None:
    for old, new in (([], []), (OLD, NEW[:-1]), (OLD[::-1], NEW)):
        with pytest.raises(InputError, match="same prompts"):
            compare_answers(PROMPTS, old, new)
    with pytest.raises(InputError, match="same prompts"):
        compare_answers([], [], [])
    assert math.isfinite(compare_answers(PROMPTS, OLD, NEW).mcnemar_p)
