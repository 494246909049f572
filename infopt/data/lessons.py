"""Rows to learn from, one JSON object per line:

    {"text": "All of this is learned."}
    {"prompt": "Is water wet?", "response": "yes"}
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}
    {"prompt": "3 + 4 · 2?", "rationale": "4 · 2 is 8, and 3 more are 11.", "response": "11", "expect": {"exact": "11"}}
    {"prompt": "Is ice cold?", "expect": {"choice": ["yes", "no"]}}

A `response` is what the assistant says; rows without one are for a teacher to answer. `expect` holds the rules of
`infopt.data.expect`, by which answers are kept or thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopt.data.calibration import Document, Source
from infopt.data.jsonl import read_file, read_rows, want_text
from infopt.data.prompts import Message, Prompt, parse_messages, parse_prompt
from infopt.data.texts import content_hash
from infopt.errors import InputError

KEYS = ("id", "text", "prompt", "messages", "raw", "response", "rationale", "expect", "max_tokens")
_HINT = 'e.g. {"prompt": "Is water wet?", "response": "yes"}'


@dataclass(frozen=True)
class Lesson:
    """One row: `text`, or a prompt with what is answered, where that is known."""

    where: str
    text: str | None = None
    prompt: Prompt | None = None
    response: str | None = None
    rationale: str | None = None

    @property
    def asked(self) -> str:
        """What is asked, so that rows can be told apart: a prompt is the same in a chat of one message."""
        if self.prompt is None:
            return self.text or ""
        if self.prompt.is_raw:
            return (self.prompt.text or "").strip()
        messages = self.prompt.messages or (Message("user", self.prompt.text or ""),)
        return "\n".join(f"{each.role}: {each.content.strip()}" for each in messages)


def read_lessons(path: Path) -> tuple[Lesson, ...]:
    """The rows of a file, in its order. Raises InputError with file and line."""
    return tuple(_lesson(row, number, where) for number, (where, row) in enumerate(read_rows(path, KEYS, _HINT), start=1))


def source(path: Path) -> Source:
    """The rows as text that a model has seen, for provenance, and to be compared with what it is judged on."""
    documents = []
    for each in read_lessons(path):
        if each.prompt is None:
            documents.append(Document(each.where, text=each.text or ""))
            continue
        asked = each.prompt.messages or (Message("user", each.prompt.text or ""),)
        said = "\n".join(part for part in (each.rationale, each.response) if part)
        documents.append(Document(each.where, messages=(*asked, *([Message("assistant", said)] if said else []))))
    return Source(str(path), tuple(documents), content_hash(read_file(path, _HINT)))


def _lesson(row: dict[str, Any], number: int, where: str) -> Lesson:
    if "text" in row:
        others = sorted(row.keys() - {"text", "id"})
        if others:
            raise InputError(f"{where}: found text beside {', '.join(others)}; a row has text, or a prompt", hint=_HINT)
        return Lesson(where, text=want_text(row, "text", where))
    response = want_text(row, "response", where) if "response" in row else None
    rationale = want_text(row, "rationale", where) if "rationale" in row else None
    if rationale is not None and response is None:
        raise InputError(f"{where}: a rationale without a response", hint=_HINT)
    asked = {key: value for key, value in row.items() if key not in ("response", "rationale")}
    if "messages" in row and response is None:
        messages = parse_messages(row["messages"], where)
        if messages[-1].role == "assistant":
            response = messages[-1].content
            asked["messages"] = row["messages"][:-1]
    return Lesson(where, prompt=parse_prompt(asked, f"row-{number}", where), response=response, rationale=rationale)
