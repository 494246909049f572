"""Rows to learn from: what they hold, and what is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infopt.data.lessons import read_lessons, source
from infopt.data.prompts import Message
from infopt.errors import InputError


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_every_form_of_row(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"text": "All of this."},
        {"prompt": "Is water wet?", "response": "yes", "expect": {"choice": ["yes", "no"]}},
        {"messages": [*CHAT, {"role": "assistant", "content": "Hi."}]},
        {"messages": CHAT},
        {"prompt": "3 + 8?", "rationale": "Three more than eight.", "response": "11"},
        {"messages": CHAT, "response": "Hi."},
    )
    text, pair, chat, unanswered, reasoned, split = read_lessons(path)
    assert text.text == "All of this."
    assert text.prompt is None
    assert pair.prompt is not None
    assert (pair.prompt.text, pair.response, pair.where) == ("Is water wet?", "yes", f"{path}:2")
    assert pair.prompt.expect is not None
    assert chat.prompt is not None
    assert (chat.prompt.messages, chat.response) == ((Message("system", "Be brief."), Message("user", "Hello")), "Hi.")
    assert unanswered.response is None
    assert (reasoned.rationale, reasoned.response) == ("Three more than eight.", "11")
    assert split.response == "Hi."
    assert split.asked == chat.asked != pair.asked


def test_prompts_are_told_apart_by_what_they_say(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Is it?"}], "response": "b"}
    rows = read_lessons(written(tmp_path, {"prompt": "Is it? ", "response": "a"}, chat, {"prompt": "is IT?", "response": "c"}))
    assert rows[0].asked == rows[1].asked != rows[2].asked


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "response": "b"}, "found text beside response"),
        ({"response": "b"}, "either prompt or messages; found neither"),
        ({"prompt": "a", "rationale": "b"}, "a rationale without a response"),
        ({"prompt": "a", "response": 3}, "response is"),
        ({"prompt": "a", "answer": "b"}, "unknown"),
        ({"prompt": "a", "response": "b", "expect": {}}, "expect is"),
    ],
)
def test_other_rows_are_refused_with_their_place(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"text": "fine"}, row)
    with pytest.raises(InputError) as refused:
        read_lessons(path)
    assert f"{path}:2" in str(refused.value)
    assert message in str(refused.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the file is empty"):
        read_lessons(written(tmp_path))


def test_what_a_model_has_seen_is_prompts_reasons_and_answers(tmp_path: Path) -> None:
    reasoned = {"prompt": "two", "rationale": "three", "response": "four"}
    path = written(tmp_path, {"text": "one"}, reasoned, {"messages": CHAT}, {"prompt": "five"})
    found = source(path)
    assert [document.said for document in found.documents] == [("one",), ("two", "three\nfour"), ("Hello",), ("five",)]
    assert found.name == str(path)
    assert found.hash != source(written(tmp_path, {"text": "one"})).hash
