"""From rows to examples: what is thrown away and why, what teachers are asked, and that nothing validates what it trains."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infopt.data.expect import Expect
from infopt.data.lessons import Lesson
from infopt.data.prompts import Prompt
from infopt.distil import gathering
from infopt.distil.examples import Example
from infopt.distil.gathering import Answered, Thrown, Wanted, alike, gather, reason_in, sift, wrong
from infopt.distil.spelling import Spelling
from infopt.errors import InputError
from infopt.model import load, reference
from infopt.model.bundle import Bundle
from infopt.protocols import Context, Request, Sampling, Trace


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load.load(reference.parse("tiny"))


@pytest.fixture(scope="module")
def spelling(bundle: Bundle) -> Spelling:
    return Spelling.of(bundle)


def row(prompt: str, response: str, where: str = "rows.jsonl:1", **expect: Any) -> Answered:
    rules = Expect(**expect) if expect else None
    lesson = Lesson(where, prompt=Prompt(where, text=prompt, is_raw=True, expect=rules), response=response)
    return Answered(lesson, response, response)


@pytest.mark.parametrize(
    ("answered", "reason"),
    [
        (row("a", "yes"), None),
        (row("a", " \n"), "says nothing"),
        (replace(row("a", "yes"), has_ended=False), "has no end"),
        (replace(row("a", "yes"), says=""), "has no answer"),
        (replace(row("a", "So it is. 11", exact="11"), says="11"), None),
        (replace(row("a", "Because it is so. yes", max_tokens=3), says="yes", ids=(9, 9, 9, 9, 2)), None),
        (row("a", "maybe", choice=("yes", "no")), "breaks choice"),
        (row("a", "Yes.", choice=("yes", "no")), None),
        (row("a", "{", json=True), "breaks json"),
        (row("a", "13", exact="11"), "breaks exact"),
        (row("a", "one two", max_tokens=7), None),
        (row("a", "one two", max_tokens=6), "breaks max_tokens"),
        (replace(row("a", "one two", max_tokens=6), ids=(9, 9, 2)), None),
        (replace(row("a", "yes"), votes=("yes", "yes", "no")), None),
        (replace(row("a", "yes"), votes=("yes", "no")), "no majority"),
        (replace(row("a", "yes"), votes=(None, None, "yes")), "no majority"),
    ],
)
def test_what_is_not_worth_learning(answered: Answered, reason: str | None, spelling: Spelling) -> None:
    assert wrong(answered, spelling) == reason


def test_contradictions_and_duplicates_go_whatever_their_order(spelling: Spelling) -> None:
    rows = [row("a", "yes", "f:1"), row("b", "no", "f:2"), row("A ", "no", "f:3"), row("b", "No", "f:4"), row("c", "x", "f:5")]
    for order in (rows, rows[::-1]):
        thrown: Thrown = {}
        kept = sift(order, spelling, thrown)
        assert sorted(each.lesson.asked for each in kept) == ["b", "c"]
        assert sorted(where for where, _ in thrown["contradiction"]) == ["f:1", "f:3"]
        assert len(thrown["duplicate"]) == 1


def test_the_answer_is_told_from_what_comes_before() -> None:
    assert reason_in("So 4 and 7. Answer: 11", r"Answer: \d+") == len("So 4 and 7. ")
    assert reason_in("Answer: 1, no, Answer: 2", r"Answer: \d+") == len("Answer: 1, no, ")
    for text, pattern in (("no number", r"Answer: \d+"), ("Answer: 1", r"Answer: \d+"), ("anything", None)):
        assert reason_in(text, pattern) == 0


def test_answers_are_judged_by_what_they_say(bundle: Bundle, tmp_path: Path) -> None:
    rows = [
        {"prompt": "3 + 4?", "response": "4 and 3 more. Answer: 7", "expect": {"exact": "7", "max_tokens": 2}},
        {"prompt": "3 + 4?", "response": "Counting. Answer: 7.", "expect": {"exact": "7"}},
        {"prompt": "1 + 4?", "response": "It is 5.", "expect": {"exact": "5"}},
        {"prompt": "2 + 4?", "response": "Answer: 5", "expect": {"exact": "6"}},
        {"prompt": "2 + 2?", "response": "Answer: 4"},
    ]
    found = gather(Wanted(data=written(tmp_path, *rows), answer=r"Answer: (\d+)"), bundle, Context())
    assert {reason: len(thrown) for reason, thrown in found.thrown.items()} == {
        "duplicate": 1,
        "has no answer": 1,
        "breaks exact": 1,
    }
    texts = [str(bundle.tokenizer.decode(list(each.ids), skip_special_tokens=True)) for each in found.examples]
    assert [text[-9:] for text in texts] == ["Answer: 7", "Answer: 4"], "spelled as they stand, nothing put in"
    assert any("4 and 3 more. Answer: 7" in text for text in texts)


def test_prompts_that_nearly_say_the_same_are_on_one_side() -> None:
    long = "the quick brown fox jumps over the lazy dog and runs into the deep dark wood near number"
    other = [f"{word} is quite another question about {word} things and {word} matters only" for word in "abcdefghijkl"]
    texts = [f"{long} {number}" for number in range(3)] + other
    names = alike(texts, share=0.3)
    assert len(set(names)) == 1 + len(other)
    assert names[0] == names[1] == names[2]
    assert len(set(alike(texts, share=0.1))) == len(texts), "three of fifteen are a form that was filled in"


def first(made: Example) -> int:
    return next(index for index, weight in enumerate(made.weights) if weight)


def test_answers_end_and_prompts_are_not_learned(bundle: Bundle, spelling: Spelling) -> None:
    made = spelling.example(row("Ask", "yes").lesson, "yes")
    assert bundle.tokenizer.decode(list(made.ids)[: len("Ask")]) == "Ask"
    assert made.ids[-1] == bundle.tokenizer.eos_token_id
    assert made.positions == len(made.ids) - first(made) - 1 == 4


def test_prompts_are_learned_too_where_they_have_a_weight(bundle: Bundle, tmp_path: Path) -> None:
    data = written(tmp_path, {"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"})
    answers, both = (gather(Wanted(data=data, prompts=weight), bundle, Context()).examples for weight in (0.0, 0.25))
    for alone, with_prompt in zip(answers, both, strict=True):
        assert alone.ids == with_prompt.ids
        assert set(with_prompt.weights) == {0.25, 1.0}
        assert [weight or 0.25 for weight in alone.weights] == list(with_prompt.weights)


def test_a_chat_ends_as_its_template_ends_it(bundle: Bundle) -> None:
    """The token of a turn's end, where engines stop at it, and not that of a text's."""
    tokenizer = copy.deepcopy(bundle.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<turn>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    lesson = Lesson("f:1", prompt=Prompt("p", text="Ask"), response="yes")
    for ends, wanted in ((frozenset({turn, 2}), turn), (frozenset({2}), tokenizer.eos_token_id)):
        made = Spelling(tokenizer, ends, 1000).example(lesson, "yes")
        assert made.ids[-1] == wanted
        assert str(tokenizer.decode(list(made.ids[:-1]))) == "user:Ask<turn>\nassistant:yes"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, None])
def test_reasons_have_their_share_of_the_loss(share: float | None, spelling: Spelling) -> None:
    made = spelling.example(row("Ask", "yes").lesson, "because\nyes", reason=len("because\n"), share=share)
    reason = len("because\n")
    learned = made.weights[-(reason + 4) :]
    assert sum(learned) == pytest.approx(reason + 4)
    assert sum(learned[:reason]) / sum(learned) == pytest.approx(reason / (reason + 4) if share is None else share)


def test_what_a_teacher_wrote_is_learned_token_by_token(bundle: Bundle, spelling: Spelling) -> None:
    own = (*bundle.tokenizer("So 4.  A: 4", add_special_tokens=False)["input_ids"], 2)
    made = spelling.example(row("Ask", "yes").lesson, "So 4.  A: 4", own, len("So 4.  "), 0.0)
    assert made.ids[-len(own) :] == own
    assert made.weights[-len(own) :] == pytest.approx((0.0,) * 7 + (12 / 5,) * 5)


def test_reasons_are_told_apart_in_rows_too(bundle: Bundle, tmp_path: Path) -> None:
    data = written(tmp_path, {"prompt": "a", "response": "Since A: 3"}, {"prompt": "b", "response": "A: 4"})
    found = gather(Wanted(data=data, answer=r"A: \d", rationale=0.0), bundle, Context())
    assert {each.positions for each in found.examples} == {5}


class Teacher:
    """Says what is scripted, a sample after the other."""

    name, notes = "fake", ()

    def __init__(self, bundle: Bundle, said: dict[str, Sequence[str]]) -> None:
        self.bundle, self.said, self.asked, self.is_closed = bundle, said, list[Request](), False

    def generate(self, requests: Sequence[Request]) -> Trace:
        self.asked += requests
        rows = []
        for request in requests:
            prompt = str(self.bundle.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=True))
            for text in self.said[next(key for key in self.said if key in prompt)]:
                ids = self.bundle.tokenizer(text.removesuffix("…"), add_special_tokens=False)["input_ids"]
                rows.append(tuple(ids if text.endswith("…") else [*ids, self.bundle.tokenizer.eos_token_id]))
        return Trace(tuple(rows), (), ())

    def close(self) -> None:
        self.is_closed = True


def written(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_teacher_answers_and_its_answers_are_sifted(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "TOGETHER", 2)
    said = {
        "first": ["yes", "no", "yes"], "second": ["no", "yes", "maybe"], "third": ["maybe"] * 3, "fourth": ["on and…"] * 3,
        "fifth": ["no"] * 3,
    }  # fmt: skip
    teacher, opened = Teacher(bundle, said), []
    data = written(tmp_path, *({"prompt": f"The {name}?", "expect": {"choice": ["yes", "no"]}} for name in said))
    options = Wanted(data=data, answers="teacher", samples=3, answer_temperature=1.0, answer_tokens=9, teacher="big")
    context = Context(seed=5, open_engine=lambda name, sampling: opened.append((name, sampling)) or teacher)
    found = gather(options, bundle, context)
    assert opened == [("big", Sampling(temperature=1.0, candidates=3))]
    assert teacher.is_closed
    assert [request.seed for request in teacher.asked] == [5, 6, 7, 8, 9]
    assert all(not request.ignore_eos and request.max_new_tokens == 9 for request in teacher.asked)
    assert {reason: len(rows) for reason, rows in found.thrown.items()} == {"no majority": 1, "breaks choice": 1, "has no end": 1}
    assert found.thrown["breaks choice"] == [(f"{data}:3", "'maybe'")]
    texts = [str(bundle.tokenizer.decode(list(each.ids), skip_special_tokens=True)) for each in found.examples]
    assert [text[-3:] for text in texts] == ["yes", "\nno"]
    summary = found.summary()
    assert (summary["rows"], summary["examples"], summary["validation_examples"]) == (5, 1, 1)
    assert summary["thrown_away"]["no majority"] == {"rows": 1, "shown": [{"row": f"{Path(data).name}:2", "said": "'no'"}]}


def test_without_the_filter_everything_is_learned(bundle: Bundle, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "maybe", "expect": {"choice": ["yes"]}}, {"prompt": "b", "response": "yes"}]
    data = written(tmp_path, *rows, {"prompt": "b", "response": "no"})
    assert len(gather(Wanted(data=data, filter=False), bundle, Context()).examples) == 3
    with pytest.raises(InputError, match=r"0 prompts or texts are left, .* thrown away: 1 breaks choice, 2 contradiction"):
        gather(Wanted(data=data), bundle, Context())


def test_no_prompt_is_on_both_sides(bundle: Bundle, tmp_path: Path) -> None:
    data = written(tmp_path, *({"prompt": f"p{number % 10}", "response": f"r{number}"} for number in range(40)))
    for seed in range(5):
        found = gather(Wanted(data=data, filter=False, validation=0.3), bundle, Context(seed=seed))
        asked = [
            {found.examples[i].ids[: first(found.examples[i]) + 1] for i in side} for side in (found.train, found.validation)
        ]
        assert len(asked[0]) == 7
        assert not asked[0] & asked[1]
        assert len(found.validation) == 12
        assert sorted(i for batch in found.batches(3, 2, seed) for i in batch) == sorted(found.train * 2)


def test_a_prompt_and_a_chat_that_say_the_same_are_on_one_side(bundle: Bundle, tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": f"p{number}"}], "response": f"r{number}"} for number in range(8)]
    data = written(tmp_path, *chats, *({"prompt": f"P{number} ", "response": f"r{number}"} for number in range(8)))
    found = gather(Wanted(data=data, filter=False, validation=0.5), bundle, Context())
    for side in (found.train, found.validation):
        assert sorted(index % 8 for index in side) == sorted(2 * [*{index % 8 for index in side}])


def test_what_a_teacher_wrote_is_kept_for_a_run_that_goes_on(bundle: Bundle, tmp_path: Path) -> None:
    data = written(tmp_path, *({"prompt": f"The {name}?"} for name in ("first", "second", "third")))
    teacher = Teacher(bundle, {"first": ["a"], "second": ["b"], "third": ["c"]})
    wanted = Wanted(data=data, answers="teacher")
    made = gather(wanted, bundle, Context(open_engine=lambda name, sampling: teacher, unfinished=tmp_path / "unfinished"))
    assert gather(wanted, bundle, Context(unfinished=tmp_path / "unfinished")) == made


def test_what_asks_nothing_and_prompts_that_are_too_long_are_not_asked(bundle: Bundle, tmp_path: Path) -> None:
    most = bundle.model.config.max_position_embeddings
    rows = [{"text": "a text"}, {"prompt": "x" * most}, {"prompt": "The first?"}, {"prompt": "The second?"}]
    teacher = Teacher(bundle, {"first": ["a"], "second": ["b"]})
    context = Context(open_engine=lambda name, sampling: teacher)
    found = gather(Wanted(data=written(tmp_path, *rows), answers="teacher"), bundle, context)
    assert {reason: len(rows) for reason, rows in found.thrown.items()} == {
        "asks nothing": 1,
        "longer than the model's context": 1,
    }
    assert len(teacher.asked) == 2


def test_rows_longer_than_the_context_are_thrown_away(bundle: Bundle, tmp_path: Path) -> None:
    most = bundle.model.config.max_position_embeddings
    data = written(tmp_path, {"text": "x" * (most + 5)}, {"text": "short"}, {"text": "also"})
    found = gather(Wanted(data=data), bundle, Context())
    assert list(found.thrown) == ["longer than the model's context"]
    assert len(found.examples) == 2


def test_a_teacher_goes_on_from_calibration_text(bundle: Bundle) -> None:
    class GoesOn(Teacher):
        def generate(self, requests: Sequence[Request]) -> Trace:
            self.asked += requests
            return Trace(tuple((request.prompt_ids[-1], 7, 8) for request in requests), (), ())

    teacher = GoesOn(bundle, {})
    windows = tuple(tuple(range(5 + i, 25 + i)) for i in range(20))
    context = Context(seed=3, calibration_ids=windows, open_engine=lambda name, sampling: teacher)
    found = gather(Wanted(answers="teacher", answer_tokens=3), bundle, context)
    assert found.examples == [Example.of_answer(window[:5], (window[4], 7, 8)) for window in windows]
    assert [request.seed for request in teacher.asked] == list(range(3, 23))
    assert all(request.ignore_eos and request.max_new_tokens == 3 for request in teacher.asked)
    assert teacher.is_closed


def test_calibration_text_is_learned_whole(bundle: Bundle) -> None:
    windows = tuple(tuple(range(5 + i, 25 + i)) for i in range(10))
    found = gather(Wanted(), bundle, Context(calibration_ids=windows))
    assert found.examples == [Example.of_text(window) for window in windows]
    assert len(found.validation) == 1
    assert found.summary()["tokens"] == 9 * 19


def test_answers_are_kept_as_they_come(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "TOGETHER", 2)
    names = ("first", "second", "third", "fourth", "fifth")
    data = written(tmp_path, *({"prompt": f"The {name}?"} for name in names))
    wanted = Wanted(data=data, answers="teacher")

    class Stops(Teacher):
        def generate(self, requests: Sequence[Request]) -> Trace:
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().generate(requests)

    unfinished = tmp_path / "unfinished"
    said = {name: [f"{name} answer"] for name in names}
    with pytest.raises(KeyboardInterrupt):
        gather(wanted, bundle, Context(open_engine=lambda *given: Stops(bundle, said), unfinished=unfinished))
    with (unfinished / "answers.jsonl").open("a", encoding="utf-8") as file:
        file.write("[[1, 2, 3], [4, ")  # killed while it wrote
    teacher = Teacher(bundle, said)
    found = gather(wanted, bundle, Context(open_engine=lambda *given: teacher, unfinished=unfinished))
    assert [request.id for request in teacher.asked] == ["4"]
    whole = gather(wanted, bundle, Context(open_engine=lambda *given: Teacher(bundle, said)))
    assert found == whole


def test_what_was_thrown_away_is_told_to_people(bundle: Bundle, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "response": "yes", "expect": {"choice": ["yes"]}} for number in range(4)]
    data = written(tmp_path, *rows, {"prompt": "q", "response": "a|b", "expect": {"choice": ["yes"]}})
    said = gather(Wanted(data=data), bundle, Context()).described()
    name = Path(data).name  # without its folder, which is another machine's where the artifact goes
    assert f"Learned from `{name}`, 5 rows: 3 examples (" in said
    assert f"| breaks choice | 1 | {name}:5: 'a\\|b' |" in said
