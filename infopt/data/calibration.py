"""Calibration text: where it comes from, what is drawn of it, and the windows of tokens that a model gets.

| `calibration.text` | what it is |
|---|---|
| `bundled` | 300 kB of the Jargon File |
| a .jsonl or .ndjson file | a row each: {"text": ...}, or a chat (`infopt.data.chats`), which goes through the chat template |
| another file | plain text in UTF-8, no JSON |
| `hub:NAME[:SPLIT[:FIELD]]` | a data set of the hub, NAME being owner/name[/configuration]; needs the package datasets |

Of many rows as many are drawn, in an order that `seed` decides, as make 16 characters for every token asked for, which is
enough for any tokenizer, and of a long text as many spans of that length; so what a model may have seen, and its fingerprint,
are the same for every model. Documents are packed
one after the other, each text ended by the end-of-text token, and cut into windows.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.data import texts
from infopt.data.chats import contents, parse_chat
from infopt.data.jsonl import is_json, is_jsonl, kind, parse_line, read_file, want_text
from infopt.data.overlap import Piece, Words, pieces
from infopt.data.prompts import Message, render
from infopt.data.rows import JSON_HINT
from infopt.errors import InputError, MissingNeedError
from infopt.needs import Needs, missing_need

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from infopt.sections import Calibration

HUB = "hub:"
CHARS_PER_TOKEN = 16
SHUFFLED_ROWS = 10_000
"""Rows of a hub data set that are read ahead to be shuffled."""
_HINT = 'a row is {"text": "..."}, {"messages": [...]} or {"prompt": "...", "response": "..."}'


@dataclass(frozen=True)
class Document:
    """A text, or a chat. `where` names it in messages."""

    where: str
    text: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def said(self) -> tuple[str, ...]:
        return contents(self.messages) if self.messages else (self.text,)

    @property
    def pieces(self) -> tuple[str, ...]:
        """What is compared for overlap: all of it, and a chat's question by itself."""
        is_answered = bool(self.messages) and self.messages[-1].role == "assistant"
        return pieces("\n".join(self.said), "\n".join(self.said[:-1]) if is_answered else None)


@dataclass(frozen=True)
class Source:
    """What was drawn. `hash`: sha256 of the whole file, or of what was read of a hub data set."""

    name: str
    documents: tuple[Document, ...]
    hash: str

    def words(self) -> Words:
        """Of all that was drawn, to be compared for overlap."""
        texts = ((row, text) for row, document in enumerate(self.documents) for text in document.pieces)
        return Words.of(Piece(row, stretch, text) for stretch, (row, text) in enumerate(texts))


def read(section: Calibration) -> Source:
    """The documents that a recipe's calibration draws. No model is needed. Raises InputError with file and line."""
    if section.text.startswith(HUB):
        return _read_hub(section)
    path = texts.text_path(section.text, "calibration")
    try:
        written = path.stat()
    except OSError:
        return _read_file(section, path)  # which says what is wrong with it
    return _read_unchanged(section, path, (written.st_mtime_ns, written.st_size))


@lru_cache(maxsize=1)
def _read_unchanged(section: Calibration, path: Path, written: tuple[int, int]) -> Source:
    """Checks, provenance and the technique each ask for the text of one recipe."""
    return _read_file(section, path)


def _read_file(section: Calibration, path: Path) -> Source:
    content = read_file(path, "give plain text in UTF-8, JSONL, or `bundled`")
    if "\0" in content:
        raise InputError(f"{path}: a binary file", hint="give plain text in UTF-8, JSONL, or `bundled`")
    if is_jsonl(path):
        documents = _drawn(_shuffled(list(_documents(path, content)), section.seed), section)
    elif is_json(content):
        raise InputError(f"{path}: JSON, which would be read as prose", hint=JSON_HINT)
    else:
        documents = (Document(str(path), text=_spans(content, section)),)
    return Source(section.text, documents, texts.content_hash(content))


def joined(sources: Sequence[Source]) -> Source:
    """Several as one; its hash is that of their hashes."""
    if len(sources) == 1:
        return sources[0]
    digest = hashlib.sha256("".join(source.hash for source in sources).encode()).hexdigest()
    documents = tuple(document for source in sources for document in source.documents)
    return Source(", ".join(source.name for source in sources), documents, digest)


def windows(source: Source, section: Calibration, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """`samples` windows of `tokens` token ids, in the order of the text, chosen by `seed`.

    Raises InputError when there are fewer, with the number that there are.
    """
    wanted = section.samples * section.tokens
    ids: list[int] = []
    for document in source.documents:
        ids += _encode(document, tokenizer, is_only=len(source.documents) == 1)
        if len(ids) >= wanted and len(source.documents) > 1:
            break
    count = len(ids) // section.tokens
    if count < section.samples:
        hint = f"calibration: {{samples: {count}}}, shorter windows, or more text" if count else "give more text, or lower tokens"
        raise InputError(
            f"calibration.text: {source.name} has {len(ids)} tokens, which fill {count} windows of {section.tokens}; "
            f"calibration.samples asks for {section.samples}",
            hint=hint,
        )
    return texts.windows(ids, section.tokens, section.samples, section.seed)


def _encode(document: Document, tokenizer: PreTrainedTokenizerBase, *, is_only: bool) -> list[int]:
    if document.messages:
        rendered = render(document.messages, tokenizer, document.where, is_open=False)
        return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
    ids = list(tokenizer(document.text, verbose=False)["input_ids"])
    if is_only or tokenizer.eos_token_id is None or ids[-1:] == [tokenizer.eos_token_id]:
        return ids
    return [*ids, int(tokenizer.eos_token_id)]


def _shuffled(documents: list[Document], seed: int) -> list[Document]:
    random.Random(seed).shuffle(documents)
    return documents


def _spans(text: str, section: Calibration) -> str:
    """Of a text longer than any tokenizer needs, as many spans as there are windows, from all over it."""
    length = section.tokens * CHARS_PER_TOKEN
    starts = range(0, len(text), length)
    if len(starts) <= section.samples:
        return text
    chosen = sorted(random.Random(section.seed).sample(starts, section.samples))
    return "\n".join(text[start : start + length] for start in chosen)


def _drawn(documents: Iterable[Document], section: Calibration) -> tuple[Document, ...]:
    """The first documents that make enough text for any tokenizer."""
    left = section.samples * section.tokens * CHARS_PER_TOKEN
    found: list[Document] = []
    for document in documents:
        if left <= 0:
            break
        found.append(document)
        left -= sum(map(len, document.said))
    return tuple(found)


def _documents(path: Path, content: str) -> Iterator[Document]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            row = parse_line(line)
            if not isinstance(row, dict):
                raise InputError(f"{where}: {row[1]}", hint=f"infopt data check {path}")
            yield _document(row, where)


def _document(row: dict[str, Any], where: str) -> Document:
    if "messages" in row or "response" in row:
        return Document(where, messages=parse_chat(row, where))
    if "text" not in row:
        raise InputError(f"{where}: found {', '.join(row) or 'no keys'}; text or a chat is wanted", hint=_HINT)
    return Document(where, text=want_text(row, "text", where))


# --- The hub ---------------------------------------------------------------------------------------------------------


def parse_hub(text: str) -> tuple[str, str | None, str, str | None]:
    """(data set, configuration, split, field or None) of `hub:NAME[:SPLIT[:FIELD]]`. Raises InputError."""
    name, *rest = text.removeprefix(HUB).split(":")
    parts = name.split("/")
    if not all(parts) or len(parts) > 3 or len(rest) > 2 or not all(rest):
        raise InputError(
            f"calibration.text: found {text!r}; allowed: hub:NAME[:SPLIT[:FIELD]]", hint="e.g. hub:owner/name:train:text"
        )
    split, field = rest[0] if rest else "train", rest[1] if len(rest) > 1 else None
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None, split, field


@lru_cache(maxsize=1)
def _read_hub(section: Calibration) -> Source:
    name, configuration, split, field = parse_hub(section.text)
    lacking = missing_need(Needs(modules=("datasets",)))
    if lacking:
        message = f"calibration.text: {section.text} {lacking.message}"
        raise MissingNeedError(message, hint=f"{lacking.hint}, or give a .jsonl file")
    try:
        rows = importlib.import_module("datasets").load_dataset(name, configuration, split=split, streaming=True)
        shuffled = rows.shuffle(seed=section.seed, buffer_size=SHUFFLED_ROWS)
        documents = _drawn((_hub_document(row, field, section.text, n) for n, row in enumerate(shuffled)), section)
    except InputError:
        raise
    except Exception as error:  # the library, its network stack and its file formats raise dozens of types
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"calibration.text: {section.text} cannot be read: {reason}", hint="without a network, give a .jsonl file instead"
        ) from error
    if not documents:
        raise InputError(f"calibration.text: {section.text} has no rows", hint="name another split")
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.text, [[m.role, m.content] for m in document.messages]]).encode())
    return Source(section.text, documents, digest.hexdigest())


def _hub_document(row: dict[str, Any], field: str | None, name: str, number: int) -> Document:
    where = f"{name}, row {number + 1} as drawn"
    if field is None:
        return _document({key: row[key] for key in ("messages", "prompt", "response", "text") if row.get(key)} or row, where)
    if field not in row:
        raise InputError(f"calibration.text: {name} has no field {field!r}", hint=f"its fields: {', '.join(row)}")
    if isinstance(row[field], str):
        return Document(where, text=want_text(row, field, where))
    if isinstance(row[field], list):
        return Document(where, messages=parse_chat({"messages": row[field]}, where))
    raise InputError(f"{where}: {field} is {kind(row[field])}; text or a list of messages is wanted", hint=_HINT)
