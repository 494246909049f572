"""Chats for calibration and training, one JSON object per line:

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}
    {"prompt": "Hello", "response": "Hi."}

A pair is a user's message and the assistant's. Other keys are not read.
"""

from __future__ import annotations

from typing import Any

from infopt.data.jsonl import want_text
from infopt.data.prompts import Message, parse_messages
from infopt.errors import InputError

HINT = 'e.g. {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}'


def parse_chat(row: dict[str, Any], where: str) -> tuple[Message, ...]:
    """The messages of a row. Raises InputError."""
    if "messages" in row:
        return parse_messages(row["messages"], where)
    if not {"prompt", "response"} & row.keys():
        raise InputError(f"{where}: neither messages nor prompt and response", hint=HINT)
    return Message("user", want_text(row, "prompt", where)), Message("assistant", want_text(row, "response", where))


def contents(messages: tuple[Message, ...]) -> tuple[str, ...]:
    """What a chat says, system messages left out: they are the same in many chats, and content in none."""
    return tuple(message.content for message in messages if message.role != "system")
