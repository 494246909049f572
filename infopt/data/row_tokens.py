"""How many tokens a row is to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infopt.data.prompts import render
from infopt.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def count(row: Row, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a row: chats and checks through the chat template where there is one, all else as it stands.

    Raises InputError when the template refuses the messages.
    """
    if row.messages and tokenizer.chat_template:
        text = render(row.messages, tokenizer, row.where, is_open=row.format == "checks")
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return len(tokenizer(row.text, verbose=False)["input_ids"])
