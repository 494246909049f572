"""`audit.check`: every rule fires on what it is about, with its line, and on nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from infopt.data import audit, calibration, rows
from infopt.data.row_tokens import count
from infopt.errors import InputError
from infopt.findings import RULES, Audit
from infopt.sections import Calibration

WORDS = [first + second for first in ("ba", "ke", "lu", "mo", "ni") for second in ("dor", "fel", "gan", "hix", "jup", "mat")]


def prose(seed: int, count: int = 30) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) + str(chosen.randrange(50)) for _ in range(count))


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def told(found: Audit) -> list[tuple[int | None, str]]:
    return [(finding.line, finding.rule) for finding in found.findings]


def check(path: Path, *lines: Any, against: Sequence[Path] = (), **named: Any) -> Audit:
    return audit.check([write(path, *lines)], [str(each) for each in against], **named)


TEXT = {"text": prose(0)}
CHAT = {"prompt": prose(1), "response": prose(2)}
MESSAGES = {"messages": [{"role": "user", "content": prose(3)}, {"role": "assistant", "content": prose(4)}]}
CHOICE = {"question": prose(5), "choices": ["grass", "bunnies"], "answer": 1}
CHECK = {"prompt": prose(6), "expect": {"contains": "x"}}


@pytest.mark.parametrize(
    ("first", "line", "rule", "message"),
    [
        (TEXT, "{", "json", "broken JSON (Expecting property name enclosed in double quotes, column 2)"),
        (TEXT, "[" * 100_000, "json", "broken JSON"),
        (TEXT, "[1]", "json", "found a list"),
        (TEXT, '{"text": 1' + "0" * 5000 + "}", "json", "a number with too many digits"),
        (TEXT, '{"text": NaN}', "json", "NaN is not JSON"),
        (TEXT, '{"text": "a", "text": "b"}', "json", "the key 'text' is given twice"),
        (TEXT, '{"text": "a \\ud800 b"}', "encoding", "half a surrogate pair"),
        (TEXT, {"txt": "a"}, "fields", "found txt; a row has text;"),
        (TEXT, {"text": 3}, "fields", "text is a number (3)"),
        (TEXT, {"text": " \n"}, "empty", "text is blank"),
        (TEXT, CHOICE, "format", "a row of choices; most rows of this file are texts"),
        (CHAT, {"prompt": "a", "response": ""}, "empty", "response is blank"),
        (CHAT, {"prompt": "a"}, "fields", "'response' is missing"),
        (CHAT, {"response": "a"}, "fields", "'prompt' is missing"),
        (MESSAGES, {"messages": []}, "fields", "messages is empty; a list of messages is wanted"),
        (MESSAGES, {"messages": MESSAGES["messages"][:1]}, "fields", "the last message is the user's, so nothing is answered"),
        (MESSAGES, {"messages": [{"role": "usr", "content": "a"}] * 2}, "fields", "did you mean 'user'"),
        (MESSAGES, {"messages": [{"role": "user", "content": " "}]}, "empty", "messages[0].content is blank"),
        (CHOICE, {**CHOICE, "answer": 2}, "fields", "answer is a number (2); an index from 0 to 1"),
        (CHOICE, {**CHOICE, "awnser": 2}, "fields", "unknown key 'awnser'; did you mean 'answer'?"),
        (CHOICE, {**CHOICE, "question": ""}, "empty", "question is blank"),
        ({**CHOICE, "id": "a"}, {**CHOICE, "id": "a"}, "fields", "the id 'a' was used at line 1"),
        (CHECK, {**CHECK, "expect": {"contain": "x"}}, "fields", "expect: unknown key 'contain'"),
        (CHECK, {"prompt": "a", "response": "b"}, "fields", "unknown key 'response'"),
        (TEXT, TEXT, "duplicate", "says the same as line 1"),
        (TEXT, {"text": TEXT["text"].replace(" ", "\n")}, "duplicate", "says the same as line 1"),
        ({"text": "Good Morning"}, {"text": "“good morning!”"}, "duplicate", "says the same as line 1"),
        ({"prompt": "Is it?", "response": "Yes"}, {"prompt": "is it ?", "response": "yes."}, "duplicate", "same as line 1"),
        (CHOICE, {**CHOICE, "choices": ["bunnies", "grass"], "answer": 0}, "duplicate", "says the same as line 1"),
        (CHAT, {"messages": [{"role": "user", "content": CHAT["prompt"]}, {"role": "assistant", "content": CHAT["response"]}]},
         "duplicate", "says the same as line 1"),
        (TEXT, {"text": f"{TEXT['text']} more"}, "near-duplicate", "says nearly the same as line 1"),
        (CHOICE, {**CHOICE, "answer": 0}, "contradiction",
         "the same input as line 1 with another answer: 'grass' here, 'bunnies' there"),
        ({"prompt": "a", "response": "yes"}, {"prompt": "a", "response": "no"}, "several-answers", "with another answer"),
        ({**TEXT, "label": "pos"}, {**TEXT, "label": "neg"}, "contradiction", "'neg' here, 'pos' there"),
        ({**TEXT, "label": 1}, {**TEXT, "label": 0}, "contradiction", "'0' here, '1' there"),
        ({**TEXT, "label": True}, {**TEXT, "label": True}, "duplicate", "says the same as line 1"),
        (CHAT, {**CHAT, "response": prose(9)}, "several-answers", "the same input as line 1 with another answer"),
        ({"prompt": "a", "expect": {"exact": "1"}}, {"prompt": "a", "expect": {"exact": "2"}}, "contradiction", "'2' here"),
        ({"prompt": "a", "expect": {"refusal": True}}, {"prompt": "a", "expect": {"refusal": False}},
         "contradiction", "'answers' here"),
        (TEXT, {"text": "wrong \ufffd here"}, "mojibake", "U+FFFD 1 times"),
    ],
)  # fmt: skip
def test_a_row_that_is_wrong(tmp_path: Path, first: Any, line: Any, rule: str, message: str) -> None:
    found = check(tmp_path / "a.jsonl", first, line)
    (finding,) = found.findings
    assert (finding.line, finding.rule) == (2, rule)
    assert message in finding.message
    assert str(finding) == f"{tmp_path / 'a.jsonl'}:2: {rule}: {finding.message}"
    assert found.failed(is_strict=True)
    assert found.failed(is_strict=False) == (RULES[rule].level == "error")
    summary = found.files[0]
    assert (summary.errors, summary.notes) == ((1, 0) if RULES[rule].level == "error" else (0, 1))
    ignoring = audit.check([tmp_path / "a.jsonl"], ignored=[rule])
    assert told(ignoring) == []
    assert not ignoring.failed(is_strict=True)


def test_sound_files_have_no_findings(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "texts.jsonl", TEXT, {"text": prose(7), "url": "x"}),
        write(tmp_path / "chats.jsonl", CHAT, "", MESSAGES),
        write(tmp_path / "choices.jsonl", CHOICE, {**CHOICE, "question": prose(8)}),
        write(tmp_path / "checks.jsonl", CHECK, {"prompt": prose(10)}),
        write(tmp_path / "text.txt", prose(11), "", prose(12)),
    ]
    found = audit.check(files)
    assert found.findings == ()
    assert [file.format for file in found.files] == ["texts", "chats", "choices", "checks", "text"]
    assert [file.rows for file in found.files] == [2] * 5


def test_signs_and_inner_marks_are_a_difference(tmp_path: Path) -> None:
    asked = [("What is 2 + 2?", "4"), ("What is 2 - 2?", "0"), ("What is 22?", "22"), ("What is 2.2?", "2.2")]
    assert told(check(tmp_path / "a.jsonl", *({"prompt": p, "response": r} for p, r in asked))) == []
    assert told(check(tmp_path / "b.jsonl", *({"text": text} for text in ("?", "!", "...")))) == []


def test_answers_contradict_where_they_are_labels(tmp_path: Path) -> None:
    rows = [{"prompt": prose(seed), "response": answer} for seed, answer in enumerate(["Yes", "No", "yes.", "No"])]
    found = check(tmp_path / "a.jsonl", *rows, {"prompt": "Name a fruit?", "response": "yes"},
                  {"prompt": "Name a fruit ?", "response": "No"})  # fmt: skip
    assert told(found) == [(6, "contradiction")]
    assert "'No' here, 'yes' there" in found.findings[0].message
    free = [{"prompt": prose(seed), "response": prose(seed, 2)} for seed in range(9)]
    fruit = [{"prompt": "Name a fruit.", "response": answer} for answer in ("Apple", "Pear")]
    assert told(check(tmp_path / "b.jsonl", *free, *fruit)) == [(11, "several-answers")]


def test_classes_of_labelled_texts_are_balanced(tmp_path: Path) -> None:
    found = check(tmp_path / "a.jsonl", *({"text": prose(seed), "label": int(seed > 2)} for seed in range(20)))
    assert told(found) == [(None, "imbalance")]
    assert found.files[0].labels == {"1": 17, "0": 3}


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a"])
@pytest.mark.parametrize("content", [json.dumps(TEXT), json.dumps([TEXT], indent=2), f"\n{json.dumps(TEXT, indent=2)}", '["a"]'])
def test_json_is_not_read_as_prose(tmp_path: Path, name: str, content: str) -> None:
    found = check(tmp_path / name, content)
    assert told(found) == [(None, "format")]
    assert "JSON Lines are read from a file named .jsonl or .ndjson" in found.findings[0].message
    assert told(check(tmp_path / name, "[1] An introduction", "", "[Illustration]", "", '{"a": 1} is JSON')) == []


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson"])
def test_json_lines_by_other_names(tmp_path: Path, name: str) -> None:
    assert told(check(tmp_path / name, TEXT, TEXT)) == [(2, "duplicate")]


def test_plain_text_is_read_in_passages_or_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff\n\nfirst\nstill first\r\n  \nsecond\n\n\n".encode())
    assert [(row.line, row.pieces[0]) for row in rows.read(tmp_path / "a.txt").rows] == [(3, "first\nstill first"), (6, "second")]
    write(tmp_path / "b.txt", "one", "two")
    assert [(row.line, row.pieces[0]) for row in rows.read(tmp_path / "b.txt").rows] == [(1, "one"), (2, "two")]
    found = check(tmp_path / "c.txt", prose(1), "", "A heading", "", prose(1), "", "A heading")
    assert told(found) == [(5, "repeated-passage")]


@pytest.mark.parametrize(
    ("data", "line", "rule", "message"),
    [
        (b"", None, "empty", "the file is empty"),
        (b"\xef\xbb\xbf \n\n", None, "empty", "the file is empty"),
        (b"\x89PNG\0\0", None, "encoding", "binary, not text; UTF-8 is wanted"),
        ("text".encode("utf-16"), None, "encoding", "UTF-16 text; UTF-8 is wanted"),
        (b"fine\nna\xefve\n", 2, "encoding", "not UTF-8 (byte 3 of the line)"),
        ("fine\nna\ufffdve\n".encode(), 2, "mojibake", "U+FFFD 1 times"),
    ],
)
def test_a_file_that_is_no_text(tmp_path: Path, data: bytes, line: int | None, rule: str, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    (finding,) = audit.check([path]).findings
    assert (finding.line, finding.rule) == (line, rule)
    assert message in finding.message


def test_the_other_rows_of_a_damaged_file_are_checked_all_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXT, "{", TEXT)
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
    assert told(audit.check([path])) == [(2, "json"), (3, "duplicate"), (4, "encoding")]


def test_lengths(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    limits = audit.Limits(max_chars=20, max_tokens=5, count=lambda row: count(row, byte_tokenizer))
    found = check(tmp_path / "a.jsonl", {"text": "x" * 21}, {"text": "x" * 20}, {"text": "äö"}, limits=limits)
    assert told(found) == [(1, "over-long"), (1, "over-tokens"), (2, "over-tokens")]
    assert (found.files[0].tokens_total, found.files[0].tokens_max) == (45, 21)
    assert (found.files[0].chars_median, found.files[0].chars_max) == (20, 21)


def test_a_template_that_refuses_a_chat(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.chat_template = "{{ raise_exception('no chats today') }}"
    limits = audit.Limits(count=lambda row: count(row, byte_tokenizer))
    found = check(tmp_path / "a.jsonl", CHAT, limits=limits)
    assert told(found) == [(1, "fields")]
    assert "no chats today" in found.findings[0].message


def test_tokens_count_the_template(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    (chat,) = rows.read(write(tmp_path / "a.jsonl", {"prompt": "ab", "response": "c"})).rows
    (asked,) = rows.read(write(tmp_path / "b.jsonl", {"prompt": "ab"})).rows
    assert [count(row, byte_tokenizer) for row in (chat, asked)] == [7, 5]


def test_balance(tmp_path: Path) -> None:
    def labels(*counts: int) -> list[Any]:
        chosen = [(label, number) for label, count in enumerate(counts) for number in range(count)]
        return [{"prompt": prose(100 * label + number), "response": f"class {label}"} for label, number in chosen]

    found = check(tmp_path / "a.jsonl", *labels(16, 4))
    assert told(found) == [(None, "imbalance")]
    assert "'class 0' is the answer of 16 of 20 rows (80.0 %; evenly it would be 50.0 %)" in found.findings[0].message
    assert found.files[0].labels == {"class 0": 16, "class 1": 4}
    for counts in ((15, 5), (8, 4), (10, 10, 1)):
        assert told(check(tmp_path / "a.jsonl", *labels(*counts))) == [], counts
    free = [{"prompt": prose(n), "response": f"answer {n}"} for n in range(30)]
    assert check(tmp_path / "a.jsonl", *free).files[0].labels == {}


def test_choices_that_can_be_guessed_by_position(tmp_path: Path) -> None:
    items = [{"question": prose(n), "choices": list("abcd"), "answer": 0} for n in range(20)]
    found = check(tmp_path / "a.jsonl", *items)
    assert told(found) == [(None, "imbalance")]
    assert "evenly it would be 25.0 %" in found.findings[0].message


# --- Leakage ---------------------------------------------------------------------------------------------------------


def test_leakage_names_both_rows_and_how_much(tmp_path: Path) -> None:
    passage = prose(1, 40)
    own = [{"text": prose(2)}, {"text": f"{prose(3, 5)} {passage}"}]
    held_out = write(tmp_path / "eval.jsonl", {"text": prose(4)}, {"text": passage})
    found = check(tmp_path / "train.jsonl", *own, against=[held_out])
    assert told(found) == [(2, "leakage")]
    words = " ".join(passage.split()[:13])
    message = found.findings[0].message
    assert message.startswith(f"shares 28 of its 33 runs of 13 words with {held_out}:2; 100 % of that row is here: '")
    assert words[:60] in message
    assert [file.is_against for file in found.files] == [False, True]
    assert found.files[1].errors == 0


def test_leakage_across_formats(tmp_path: Path) -> None:
    items = write(tmp_path / "items.jsonl", {"question": prose(1), "choices": ["a", "b"], "answer": 0})
    chat = {"messages": [{"role": "system", "content": prose(9)}, {"role": "user", "content": f"Q: {prose(1)}"},
                         {"role": "assistant", "content": "a"}]}  # fmt: skip
    assert told(check(tmp_path / "chats.jsonl", chat, against=[items])) == [(1, "leakage")]
    assert told(check(tmp_path / "text.txt", prose(7), "", prose(1), against=[items])) == [(3, "leakage")]
    other = write(tmp_path / "other.jsonl", {"messages": [chat["messages"][0], {"role": "user", "content": prose(5)}]})
    assert told(check(tmp_path / "chats.jsonl", chat, against=[other])) == [], "a system message is no content"


@pytest.mark.parametrize("rows", [
    [{"prompt": "Capital of France?", "response": "Paris"}, {"prompt": "Why?", "response": "So"}],
    [CHOICE, {"question": "It is", "choices": ["a", "b"], "answer": 0}],
    [{"text": "Good morning"}, {"text": "Bad", "label": 0}],
    [{"prompt": "Name one fruit."}, {"prompt": "Why?", "expect": {"exact": "So"}}],
])  # fmt: skip
def test_a_copy_leaks_row_by_row(tmp_path: Path, rows: list[Any]) -> None:
    held_out = write(tmp_path / "eval.jsonl", *rows)
    assert told(check(tmp_path / "train.jsonl", *rows, against=[held_out])) == [(1, "leakage"), (2, "leakage")]


def test_short_questions_leak_with_their_answers_only(tmp_path: Path) -> None:
    held_out = write(tmp_path / "eval.jsonl", {"prompt": "Why?", "response": "So"}, {"prompt": "Who is it?", "response": "I"})
    own = [{"prompt": "Why?", "response": "Because"}, {"prompt": "who is it", "response": "You"}]
    found = check(tmp_path / "train.jsonl", *own, against=[held_out])
    assert told(found) == [(2, "leakage")]
    assert found.findings[0].message == f"its question is in {held_out}:2: 'who is it'"


def test_items_are_found_in_chats(tmp_path: Path) -> None:
    """As question and answer every one is; among lettered choices those that ask in 8 words or more."""
    path = audit.BUNDLED / "openbookqa.jsonl"
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [{"prompt": item["question"], "response": item["choices"][item["answer"]]} for item in items]
    found = check(tmp_path / "pairs.jsonl", *pairs, against=[path])
    assert [line for line, rule in told(found) if rule == "leakage"] == list(range(1, 51))
    lettered = [
        {"prompt": f"Question: {item['question']}\n" + "\n".join(f"{letter}. {choice}" for letter, choice in
                                                               zip("ABCD", item["choices"], strict=True)),
         "response": "ABCD"[item["answer"]]} for item in items
    ]  # fmt: skip
    found = check(tmp_path / "lettered.jsonl", *lettered, against=[path])
    leaking = {line for line, rule in told(found) if rule == "leakage"}
    assert leaking >= {number for number, item in enumerate(items, start=1) if len(item["question"].split()) >= 9}
    assert any(f"{path}:" in finding.message and " is in it: '" in finding.message for finding in found.findings)


def test_the_bundled_sets_can_be_checked_against(tmp_path: Path) -> None:
    passage = audit.BUNDLED.joinpath("evaluation.txt").read_text(encoding="utf-8")[1000:1500]
    found = check(tmp_path / "a.jsonl", {"text": prose(1)}, {"text": passage}, against=[Path("bundled")])
    assert told(found) == [(2, "leakage")]
    assert "bundled/evaluation.txt:" in found.findings[0].message
    assert len(found.files) == 5


def test_a_file_is_not_compared_with_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXT)
    for against in ([str(path)], [str(tmp_path / "x" / ".." / "a.jsonl")]):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="given twice"):
            audit.check([path], against)


@pytest.mark.parametrize("ignored", ["leak", "nonsense"])
def test_an_unknown_rule_is_refused(tmp_path: Path, ignored: str) -> None:
    with pytest.raises(InputError, match="unknown rule") as caught:
        check(tmp_path / "a.jsonl", TEXT, ignored=[ignored])
    assert caught.value.hint == "infopt data rules"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(InputError) as caught:
            audit.check([path])
        assert caught.value.hint


# --- Calibration text, as it was drawn -------------------------------------------------------------------------------


def test_a_remark_on_what_is_said_again(tmp_path: Path) -> None:
    def told(name: str, *lines: Any) -> str | None:
        path = write(tmp_path / name, *lines)
        return audit.remark(calibration.read(Calibration(text=str(path))))

    near = {"text": f"{TEXT['text']} more"}
    found = told("a.jsonl", *[TEXT] * 4, near, CHAT, CHAT, MESSAGES)
    assert found == f"calibration text: of 8 rows, 4 repeat others and 1 nearly do (infopt data check {tmp_path / 'a.jsonl'})"
    assert told("b.txt", prose(1), "", prose(2), "", prose(1)) is not None
    assert told("c.jsonl", TEXT, CHAT, MESSAGES) is told("d.txt", prose(1), "", prose(2)) is None
    assert audit.remark(calibration.read(Calibration())) is None


# --- Properties ------------------------------------------------------------------------------------------------------

ROW = st.tuples(st.integers(0, 6), st.sampled_from(["yes", "no", "perhaps"]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(ROW, max_size=25), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_no_count(tmp_path: Path, chosen: list[tuple[int, str]], shuffle: random.Random) -> None:
    own = [{"prompt": prose(seed), "response": label} for seed, label in chosen]
    held_out = write(tmp_path / "eval.jsonl", {"text": prose(2)}, {"text": prose(50)})
    before = check(tmp_path / "a.jsonl", *own, against=[held_out]).by_rule() if own else {}
    shuffle.shuffle(own)
    after = check(tmp_path / "a.jsonl", *own, against=[held_out]).by_rule() if own else {}
    assert before == after
    different = set(chosen)
    by_prompt = {seed: {label for other, label in different if other == seed} for seed, _ in chosen}
    assert before.get("duplicate", 0) == len(chosen) - len(different)
    assert before.get("contradiction", 0) + before.get("several-answers", 0) == sum(
        len(labels) > 1 for labels in by_prompt.values()
    )
    assert before.get("leakage", 0) == sum(seed == 2 for seed, _ in chosen)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".txt"]))
def test_no_file_is_a_crash(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    audit.check([path], [str(write(tmp_path / "b.txt", prose(0)))])


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["id", "text", "prompt", "response", "messages", "question", "choices", "answer", "expect", "raw", "max_tokens", "source"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), max_size=6))
def test_no_row_is_a_crash(tmp_path: Path, found: list[dict[str, Any]]) -> None:
    path = write(tmp_path / "a.jsonl", *found)
    audit.check([path], [str(write(tmp_path / "b.txt", prose(0)))])
