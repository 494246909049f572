"""Data files read as a linter reads them: what is wrong becomes findings with file and line, and the rest is rows.

| format | row |
|---|---|
| text | a passage between blank lines of a plain text file; a line, in a file without blank lines |
| texts | {"text": ...}, where a `label` beside it, a string, number or boolean, is its class |
| chats | {"messages": [...]} ending with the assistant's turn, or {"prompt": ..., "response": ...} |
| choices | {"question": ..., "choices": [...], "answer": 0}, see `infopt.data.choices` |
| checks | {"prompt": ...} or {"messages": [...]} ending with the user's turn, with `expect`, see `infopt.data.prompts` |

A file whose name ends with .jsonl or .ndjson is of the format that most of its rows have; every other file is plain text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopt.data import choices, prompts
from infopt.data.chats import HINT, contents, parse_chat
from infopt.data.jsonl import check_keys, is_json, is_jsonl, parse_line, want_text
from infopt.data.overlap import pieces
from infopt.data.prompts import Message
from infopt.errors import InputError
from infopt.findings import Finding

JSON_HINT = "JSON Lines are read from a file named .jsonl or .ndjson"
FORMATS = ("text", "texts", "chats", "choices", "checks")
_PASSAGE = re.compile(r"\S[^\n]*(?:\n[^\S\n]*\S[^\n]*)*")
_LINE = re.compile(r"\S[^\n]*")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n(?=\s*\S)")
_REPLACED = re.compile(r"\ufffd|\\u[fF]{3}[dD]")
_MARKS = re.compile(r"[.,;:!?…。、，；：？！]+(?!\w)|(?<!\w)[\"'`“”‘’]+|[\"'`“”‘’]+(?!\w)")
_HINT = "a row has text; messages; prompt and response; or question, choices and answer"


@dataclass(frozen=True)
class Row:
    """`pieces` of its `text` are compared for overlap, see `infopt.data.overlap`. The same `asked` with another `label` is a
    contradiction. `answer_class`: the class whose balance counts, where rows have classes, `options` of them at least."""

    file: str
    line: int
    format: str
    text: str
    key: str
    """Equal for rows that say the same."""
    pieces: tuple[str, ...]
    asked: str | None = None
    label: str | None = None
    answer_class: str | None = None
    options: int = 0
    messages: tuple[Message, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class DataFile:
    file: str
    format: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]


def read(path: Path, name: str | None = None) -> DataFile:
    """The rows of a file and what is wrong with the others; `name`: the file in messages. Raises InputError when it cannot
    be opened."""
    file = name or str(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file", hint="check the path; it is taken from the working directory") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})", hint="give a readable file") from None
    if b"\0" in data:
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "UTF-16 text" if wide else "binary, not text"
        return DataFile(file, "text", (), (Finding(file=file, line=None, rule="encoding", message=f"{found}; UTF-8 is wanted"),))
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        return DataFile(file, "text", (), (Finding(file=file, line=None, rule="empty", message="the file is empty"),))
    lines, findings = _decode(data, file)
    if is_jsonl(path):
        more = _read_jsonl(lines, file)
        return DataFile(file, more.format, more.rows, (*findings, *more.findings))
    text = "\n".join(lines)
    if is_json(text):
        wrong = Finding(file=file, line=None, rule="format", message=f"JSON, which would be read as prose; {JSON_HINT}")
        return DataFile(file, "text", (), (*findings, wrong))
    return DataFile(file, "text", passages(text, file), tuple(findings))


def _decode(data: bytes, file: str) -> tuple[list[str], list[Finding]]:
    """The file's lines, those that are not UTF-8 left blank."""
    lines: list[str] = []
    findings: list[Finding] = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            lines.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            lines.append("")
            message = f"not UTF-8 (byte {error.start + 1} of the line)"
            findings.append(Finding(file=file, line=number, rule="encoding", message=message))
        wrong = len(_REPLACED.findall(lines[-1]))
        if wrong:
            message = f"U+FFFD {wrong} times: the text was decoded wrongly before"
            findings.append(Finding(file=file, line=number, rule="mojibake", message=message))
    return lines, findings


def passages(text: str, file: str) -> tuple[Row, ...]:
    """The rows of a plain text."""
    unit = _PASSAGE if _BLANK_LINE.search(text) else _LINE
    rows: list[Row] = []
    line, last = 1, 0
    for match in unit.finditer(text):
        line, last = line + text.count("\n", last, match.start()), match.start()
        passage = match[0].rstrip()
        rows.append(Row(file, line, "text", passage, plain(passage), (passage,)))
    return tuple(rows)


def squeezed(text: str) -> str:
    """The text with white space runs as one blank."""
    return " ".join(text.split())


def plain(text: str) -> str:
    """What texts have in common that say the same: case, white space, and marks at the ends of words are no difference.

    Signs are one: `2 + 2` is not `2 - 2`."""
    return squeezed(_MARKS.sub(" ", unicodedata.normalize("NFC", text).casefold())) or squeezed(text)


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def _read_jsonl(lines: list[str], file: str) -> DataFile:
    findings: list[Finding] = []
    parsed: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = parse_line(line)
        if isinstance(found, dict):
            parsed.append((number, found))
        else:
            rule, message = found
            findings.append(Finding(file=file, line=number, rule=rule, message=message))
    formats = [_format(row) for _, row in parsed]
    known = Counter(each for each in formats if each)
    main = known.most_common(1)[0][0] if known else "texts"
    parse = _PARSERS[main]
    rows: list[Row] = []
    ids: dict[str, int] = {}
    for (number, found), own in zip(parsed, formats, strict=True):
        problem = _problem(found, own, main, number, ids)
        if problem is None:
            try:
                rows.append(parse(found, file, number))
                continue
            except InputError as error:
                problem = "fields", str(error).removeprefix(f"{file}:{number}: ")
        findings.append(Finding(file=file, line=number, rule=problem[0], message=problem[1]))
    return DataFile(file, main, tuple(rows), tuple(findings))


def _format(row: dict[str, Any]) -> str | None:
    """What a row is, by its keys; a chat that the assistant does not end waits for an answer."""
    if "choices" in row or "question" in row:
        return "choices"
    if "response" in row:
        return "chats"
    if "messages" in row:
        last = row["messages"][-1] if isinstance(row["messages"], list) and row["messages"] else None
        return "chats" if isinstance(last, dict) and last.get("role") == "assistant" else "checks"
    return "checks" if "prompt" in row else "texts" if "text" in row else None


def _problem(row: dict[str, Any], own: str | None, main: str, line: int, ids: dict[str, int]) -> tuple[str, str] | None:
    """(rule, message) of what a row's own parser does not tell."""
    if own is None:
        return "fields", f"found {', '.join(row) or 'no keys'}; {_HINT}"
    if own != main and {own, main} != {"chats", "checks"}:  # there the parser says more
        return "format", f"a row of {own}; most rows of this file are {main}"
    if main in ("choices", "checks") and isinstance(row.get("id"), str):
        first = ids.setdefault(row["id"], line)
        if first != line:
            return "fields", f"the id {row['id']!r} was used at line {first}"
    for path, value in _contents(row):
        if isinstance(value, str) and not value.strip():
            return "empty", f"{path} is blank"
    return None


def _contents(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((key, row[key]) for key in ("text", "prompt", "response", "question") if key in row)
    messages = row.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict) and "content" in message:
            yield f"messages[{index}].content", message["content"]


def _text_row(row: dict[str, Any], file: str, line: int) -> Row:
    text, label = want_text(row, "text", f"{file}:{line}"), row.get("label")
    return of_text(text, file, line, str(label) if isinstance(label, str | int | float) and str(label).strip() else None)


def of_text(text: str, file: str, line: int, label: str | None = None) -> Row:
    asked = plain(text)
    if label is None:
        return Row(file, line, "texts", text, asked, (text,))
    label = squeezed(label)
    return Row(file, line, "texts", text, f"{asked}\n= {label}", (text,), asked, label, label, 2)


def _chat_row(row: dict[str, Any], file: str, line: int) -> Row:
    where = f"{file}:{line}"
    messages = parse_chat(row, where)
    if messages[-1].role != "assistant":
        raise InputError(f"{where}: the last message is the {messages[-1].role}'s, so nothing is answered", hint=HINT)
    return of_chat(messages, file, line)


def of_chat(messages: tuple[Message, ...], file: str, line: int) -> Row:
    said, answer = contents(messages), squeezed(messages[-1].content)
    text, question = "\n".join(said), "\n".join(said[:-1])
    asked = _turns(messages[:-1])
    key = f"{asked}\n= {plain(answer)}"
    return Row(file, line, "chats", text, key, pieces(text, question), asked, answer, _class(answer), 2, messages)


def _turns(messages: tuple[Message, ...]) -> str:
    return "\n".join(f"{message.role}: {plain(message.content)}" for message in messages)


def _choice_row(row: dict[str, Any], file: str, line: int) -> Row:
    where = f"{file}:{line}"
    check_keys(row, choices.KEYS, where)
    item = choices.parse_item(row, Path(file), line, where)
    options = sorted(map(plain, item.choices))
    asked, label = "\n".join([plain(item.question), *options]), squeezed(item.choices[item.answer])
    # The order of the choices is no difference; which of them stands where is what balance is about.
    position = f"choice {item.answer + 1} of {len(item.choices)}"
    key = f"{asked}\n= {plain(label)}"
    return Row(file, line, "choices", item.text, key, pieces(item.text, item.question), asked, label, position, len(item.choices))


def _check_row(row: dict[str, Any], file: str, line: int) -> Row:
    where = f"{file}:{line}"
    check_keys(row, prompts.KEYS, where)
    prompt = prompts.parse_prompt(row, f"row-{line}", where)
    messages = prompt.messages or (Message("user", prompt.text or ""),)
    asked, text, expect = _turns(messages), "\n".join(contents(messages)), prompt.expect
    label, answer = None, text
    if expect and expect.exact is not None:
        label, answer = squeezed(expect.exact), f"{text}\n{expect.exact}"
    elif expect and expect.refusal is not None:
        label = "declines" if expect.refusal else "answers"
    key = f"{asked}\n{json.dumps(row.get('expect'), sort_keys=True)}"
    return Row(file, line, "checks", text, key, pieces(answer, text), asked, label, _class(label), 2, messages)


_PARSERS: dict[str, Callable[[dict[str, Any], str, int], Row]] = {
    "texts": _text_row,
    "chats": _chat_row,
    "choices": _choice_row,
    "checks": _check_row,
}
LABEL_WORDS = 5


def _class(answer: str | None) -> str | None:
    """An answer that may be a class: of five words or fewer."""
    return plain(answer) if answer is not None and len(answer.split()) <= LABEL_WORDS else None
