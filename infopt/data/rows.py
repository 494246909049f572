"""Data files read as a linter reads them: what is wrong becomes findings with file and line, and the rest is rows.

| format | row |
|---|---|
| text | a passage between blank lines of a plain text file; a line, in a file without blank lines |
| texts | {"text": ...} |
| chats | {"messages": [...]} ending with the assistant's turn, or {"prompt": ..., "response": ...} |
| choices | {"question": ..., "choices": [...], "answer": 0}, see `infopt.data.choices` |
| checks | {"prompt": ...} or {"messages": [...]} ending with the user's turn, with `expect`, see `infopt.data.prompts` |

A file whose name ends with .jsonl is of the format that most of its rows have; every other file is plain text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopt.data import choices, prompts
from infopt.data.chats import HINT, contents, parse_chat
from infopt.data.jsonl import check_keys, kind, want_text
from infopt.data.prompts import Message
from infopt.errors import InputError
from infopt.findings import Finding

FORMATS = ("text", "texts", "chats", "choices", "checks")
_PASSAGE = re.compile(r"\S[^\n]*(?:\n[^\S\n]*\S[^\n]*)*")
_LINE = re.compile(r"\S[^\n]*")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n(?=\s*\S)")
_REPLACED = re.compile(r"\ufffd|\\u[fF]{3}[dD]")
_HINT = "a row has text; messages; prompt and response; or question, choices and answer"


@dataclass(frozen=True)
class Row:
    """`pieces` are compared for overlap. The same `asked` with another `label` is a contradiction. `answer_class`: the class
    whose balance counts, where rows have classes, `options` of them at least."""

    file: str
    line: int
    format: str
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

    @property
    def chars(self) -> int:
        return sum(map(len, self.pieces))


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
    is_jsonl = path.suffix == ".jsonl"
    if b"\0" in data:
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "UTF-16 text" if wide else "binary, not text"
        return DataFile(file, "text", (), (Finding(file=file, line=None, rule="encoding", message=f"{found}; UTF-8 is wanted"),))
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        return DataFile(file, "text", (), (Finding(file=file, line=None, rule="empty", message="the file is empty"),))
    lines, findings = _decode(data, file)
    more = _read_jsonl(lines, file) if is_jsonl else _read_text(lines, file)
    return DataFile(file, more.format, more.rows, (*findings, *more.findings))


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


def _read_text(lines: list[str], file: str) -> DataFile:
    text = "\n".join(lines)
    unit = _PASSAGE if _BLANK_LINE.search(text) else _LINE
    rows: list[Row] = []
    line, last = 1, 0
    for match in unit.finditer(text):
        line, last = line + text.count("\n", last, match.start()), match.start()
        rows.append(Row(file, line, "text", squeezed(match[0]), (match[0].rstrip(),)))
    return DataFile(file, "text", tuple(rows), ())


def squeezed(text: str) -> str:
    """The text with white space runs as one blank."""
    return " ".join(text.split())


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


def parse_line(line: str) -> dict[str, Any] | tuple[str, str]:
    """The JSON object in a line, or (rule, what is wrong with it)."""
    try:
        found = json.loads(line, object_pairs_hook=_no_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return "json", f"broken JSON ({error.msg}, column {error.colno})"
    except RecursionError:
        return "json", "broken JSON (nested too deeply)"
    except ValueError as error:
        return "json", str(error)
    if not isinstance(found, dict):
        return "json", f"found {kind(found)}; a row is a JSON object"
    if "\\u" in line and _has_lone_surrogate(found):
        return "encoding", "half a surrogate pair (\\ud800 … \\udfff), which is no character"
    return found


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _has_lone_surrogate(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


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
    text = want_text(row, "text", f"{file}:{line}")
    return Row(file, line, "texts", squeezed(text), (text,))


def _chat_row(row: dict[str, Any], file: str, line: int) -> Row:
    where = f"{file}:{line}"
    messages = parse_chat(row, where)
    if messages[-1].role != "assistant":
        raise InputError(f"{where}: the last message is the {messages[-1].role}'s, so nothing is answered", hint=HINT)
    *turns, last = (f"{message.role}: {squeezed(message.content)}" for message in messages)
    asked, answer = "\n".join(turns), squeezed(messages[-1].content)
    return Row(file, line, "chats", f"{asked}\n{last}", contents(messages), asked, answer, short_label(answer), 2, messages)


def _choice_row(row: dict[str, Any], file: str, line: int) -> Row:
    where = f"{file}:{line}"
    check_keys(row, choices.KEYS, where)
    item = choices.parse_item(row, Path(file), line, where)
    options = sorted(map(squeezed, item.choices))
    asked, label = "\n".join([squeezed(item.question), *options]), squeezed(item.choices[item.answer])
    # The order of the choices is no difference; which of them stands where is what balance is about.
    pieces = (f"{item.question} {item.choices[item.answer]}",)
    position = f"choice {item.answer + 1} of {len(item.choices)}"
    return Row(file, line, "choices", f"{asked}\n= {label}", pieces, asked, label, position, len(item.choices))


def _check_row(row: dict[str, Any], file: str, line: int) -> Row:
    where = f"{file}:{line}"
    check_keys(row, prompts.KEYS, where)
    prompt = prompts.parse_prompt(row, f"row-{line}", where)
    messages = prompt.messages or (Message("user", prompt.text or ""),)
    asked = "\n".join(f"{message.role}: {squeezed(message.content)}" for message in messages)
    expect = prompt.expect
    label = None
    if expect and expect.exact is not None:
        label = squeezed(expect.exact)
    elif expect and expect.refusal is not None:
        label = "declines" if expect.refusal else "answers"
    key = f"{asked}\n{json.dumps(row.get('expect'), sort_keys=True)}"
    return Row(file, line, "checks", key, contents(messages), asked, label, short_label(label), 2, messages)


_PARSERS: dict[str, Callable[[dict[str, Any], str, int], Row]] = {
    "texts": _text_row,
    "chats": _chat_row,
    "choices": _choice_row,
    "checks": _check_row,
}
LABEL_WORDS = 5


def short_label(answer: str | None) -> str | None:
    """An answer that is a label: of five words or fewer."""
    return answer if answer is not None and len(answer.split()) <= LABEL_WORDS else None
