"""Reads JSON Lines strictly: every problem names the file and the line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from infopt.errors import InputError, unknown


def read_file(path: Path, hint: str) -> str:
    """The file's text, without a byte order mark. Raises InputError when it is missing, not UTF-8, or blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", hint="check the path; it is taken from the working directory") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})", hint="save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", hint="give a readable text file") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty", hint=hint)
    return text


def read_rows(path: Path, keys: Collection[str], hint: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`file:line`, row) for every line that is not blank; only `keys` are allowed. Raises InputError."""
    for number, line in enumerate(read_file(path, hint).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = parse_line(line)
        if not isinstance(row, dict):
            raise InputError(f"{where}: {row[1]}", hint=hint)
        check_keys(row, keys, where)
        yield where, row


def is_jsonl(path: Path) -> bool:
    """By its name: .jsonl or .ndjson."""
    return path.suffix.lower() in (".jsonl", ".ndjson")


def is_json(text: str) -> bool:
    """Whether a text opens with a JSON object, or a list of strings, lists or objects, so that it is no prose."""
    try:
        found, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) or (isinstance(found, list) and isinstance(next(iter(found), None), str | list | dict))


class _RowError(ValueError):
    """What JSON itself allows, or Python, and a row does not."""


def parse_line(line: str) -> dict[str, Any] | tuple[str, str]:
    """The JSON object in a line, or (rule, what is wrong with it)."""
    try:
        found = json.loads(line, object_pairs_hook=_no_twice, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return "json", f"broken JSON ({error.msg}, column {error.colno})"
    except RecursionError:
        return "json", "broken JSON (nested too deeply)"
    except _RowError as error:
        return "json", str(error)
    except ValueError:  # Python reads no more than a few thousand digits
        return "json", "a number with too many digits"
    if not isinstance(found, dict):
        return "json", f"found {kind(found)}; a row is a JSON object"
    if "\\u" in line and _has_lone_surrogate(found):
        return "encoding", "half a surrogate pair (\\ud800 … \\udfff), which is no character"
    return found


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _RowError(f"the key {twice!r} is given twice")
    return found


def _no_constant(name: str) -> None:
    raise _RowError(f"{name} is not JSON")


def _has_lone_surrogate(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def check_keys(mapping: dict[str, Any], keys: Collection[str], where: str) -> None:
    for key in mapping:
        if key not in keys:
            raise InputError(f"{where}: {unknown('key', key, keys)}", hint=f"allowed: {', '.join(keys)}")


def kind(value: object) -> str:
    """A JSON value's type and itself, short, for messages."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    name = names.get(type(value), "null")
    text = json.dumps(value, ensure_ascii=False, default=str)
    return name if value is None else f"{name} ({text if len(text) <= 40 else text[:37] + '...'})"


def short(text: str, limit: int = 40) -> str:
    """The text in quotes on one line, cut to `limit` characters, for messages."""
    text = " ".join(text.split())
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def want_text(row: dict[str, Any], key: str, where: str) -> str:
    """The string under `key`, not blank. Raises InputError."""
    if key not in row:
        raise InputError(f"{where}: {key!r} is missing", hint=f'add "{key}": "..."')
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} is {kind(value)}; a string that is not blank is wanted", hint=f'e.g. "{key}": "..."')
    return value


def want_count(row: dict[str, Any], key: str, where: str) -> int | None:
    """The whole number ≥ 1 under `key`, None when the key is absent. Raises InputError."""
    if key not in row:
        return None
    value = row[key]
    if type(value) is not int or value < 1:
        raise InputError(f"{where}: {key} is {kind(value)}; a whole number of at least 1 is wanted", hint=f'e.g. "{key}": 64')
    return value
