"""The user's prompts, one JSON object per line:

    {"prompt": "Name the capital of France.", "expect": {"contains": "Paris"}}
    {"id": "json-1", "messages": [{"role": "user", "content": "..."}], "max_tokens": 80, "expect": {"json": true}}
    {"prompt": "Once upon a time", "raw": true}

A row holds `prompt` or `messages`. Where the tokenizer has a chat template, a `prompt` is sent as one user message, unless
`raw` is true: then the text goes in as it stands. `max_tokens` ends the answer; `expect` holds the rules of
`infopt.data.expect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.data.expect import Expect, parse_expect
from infopt.data.jsonl import check_keys, kind, read_rows, want_count, want_text
from infopt.data.texts import BUNDLED
from infopt.errors import InputError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEYS = ("id", "prompt", "messages", "raw", "max_tokens", "expect")
ROLES = ("system", "user", "assistant", "tool")
BUNDLED_PROMPTS = BUNDLED / "prompts.jsonl"
_HINT = 'e.g. {"prompt": "Name the capital of France.", "expect": {"contains": "Paris"}}'


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One row: `text` or `messages` is given, never both. `where` is `file:line`."""

    id: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    is_raw: bool = False
    max_tokens: int | None = None
    expect: Expect | None = None
    where: str = ""


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file, in its order. Raises InputError with file and line for anything that is not a prompt."""
    rows: list[Prompt] = []
    first_seen: dict[str, str] = {}
    for number, (where, row) in enumerate(read_rows(path, KEYS, _HINT), start=1):
        prompt = parse_prompt(row, f"row-{number}", where)
        if prompt.id in first_seen:
            raise InputError(f"{where}: the id {prompt.id!r} was used at {first_seen[prompt.id]}", hint="make ids unique")
        first_seen[prompt.id] = where
        rows.append(prompt)
    return tuple(rows)


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The prompt's token ids, as the model should see them. Raises InputError when they cannot be made."""
    if prompt.text is not None and (prompt.is_raw or not tokenizer.chat_template):
        ids = tokenizer(prompt.text, verbose=False)["input_ids"]
    else:
        # Rendered to text first: what tokenize=True returns differs between transformers versions.
        messages = prompt.messages if prompt.text is None else (Message("user", prompt.text),)
        rendered = render(messages, tokenizer, prompt.where, is_open=True)
        ids = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
    if not len(ids):
        raise InputError(f"{prompt.where}: the prompt {prompt.id!r} has no tokens", hint="give a longer prompt")
    return tuple(int(token) for token in ids)


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str, *, is_open: bool) -> str:
    """The messages through the tokenizer's chat template; `is_open` asks for the assistant's turn next. Raises InputError."""
    if not tokenizer.chat_template:
        raise InputError(f"{where}: messages need a chat template and this tokenizer has none", hint='use "prompt" instead')
    from jinja2.exceptions import TemplateError

    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=is_open))
    except TemplateError as error:
        raise InputError(
            f"{where}: the model's chat template refuses these messages: {error}", hint="change their roles"
        ) from None


def parse_prompt(row: dict[str, Any], default_id: str, where: str) -> Prompt:
    """The prompt in a row whose keys were checked. Raises InputError."""
    if ("prompt" in row) == ("messages" in row):
        found = "both" if "prompt" in row else "neither"
        raise InputError(f"{where}: a row holds either prompt or messages; found {found}", hint=_HINT)
    is_raw = row.get("raw", False)
    if not isinstance(is_raw, bool) or (is_raw and "messages" in row):
        raise InputError(f"{where}: raw is {kind(is_raw)}; true or false is wanted, and only beside prompt", hint=_HINT)
    max_tokens = want_count(row, "max_tokens", where)
    expect = parse_expect(row["expect"], where) if "expect" in row else None
    if max_tokens and expect and expect.max_tokens and max_tokens <= expect.max_tokens:
        raise InputError(
            f"{where}: the answer ends after {max_tokens} tokens, so expect.max_tokens {expect.max_tokens} can never fail",
            hint="let max_tokens exceed expect.max_tokens",
        )
    return Prompt(
        id=want_text(row, "id", where) if "id" in row else default_id,
        text=want_text(row, "prompt", where) if "prompt" in row else None,
        messages=_open_messages(row["messages"], where) if "messages" in row else (),
        is_raw=is_raw,
        max_tokens=max_tokens,
        expect=expect,
        where=where,
    )


def parse_messages(value: Any, where: str) -> tuple[Message, ...]:
    """The messages of a chat. Raises InputError."""
    if not isinstance(value, list) or not value:
        found = "empty" if value == [] else kind(value)
        raise InputError(f"{where}: messages is {found}; a list of messages is wanted", hint=_MESSAGES_HINT)
    messages = []
    for index, entry in enumerate(value):
        place = f"{where}: messages[{index}]"
        if not isinstance(entry, dict):
            raise InputError(f"{place} is {kind(entry)}; an object is wanted", hint=_MESSAGES_HINT)
        check_keys(entry, ("role", "content"), place)
        role = want_text(entry, "role", place)
        if role not in ROLES:
            raise InputError(f"{place}: {unknown('role', role, ROLES)}", hint=_MESSAGES_HINT)
        messages.append(Message(role, want_text(entry, "content", place)))
    return tuple(messages)


def _open_messages(value: Any, where: str) -> tuple[Message, ...]:
    messages = parse_messages(value, where)
    if messages[-1].role == "assistant":
        raise InputError(f"{where}: the last message is the assistant's, so nothing is left to answer", hint=_MESSAGES_HINT)
    return messages


_MESSAGES_HINT = 'e.g. "messages": [{"role": "user", "content": "Hello"}]'
