"""Multiple-choice questions, one JSON object per line:

    {"id": "openbookqa-2", "question": "Predators eat", "choices": ["lions", "bunnies"], "answer": 1, "source": "OpenBookQA"}

`question` is the text before the choice, `answer` the index of the right choice, counted from 0. `id` and `source` may be
left out. The bundled slices hold 50 even-numbered rows per set: enough to see a ruined model, too few for a gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from infopt.data.jsonl import kind, read_rows, want_text
from infopt.data.texts import BUNDLED
from infopt.errors import InputError

KEYS = ("id", "question", "choices", "answer", "source")
BUNDLED_SETS = ("hellaswag", "openbookqa")
_HINT = 'e.g. {"question": "Predators eat", "choices": ["grass", "bunnies"], "answer": 1}'


@dataclass(frozen=True)
class Item:
    """One question. `answer` indexes `choices`."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    source: str

    @property
    def text(self) -> str:
        """The question and its answer."""
        return f"{self.question} {self.choices[self.answer]}"


def read_choices(path: Path) -> tuple[Item, ...]:
    """The items of a file, in its order. Raises InputError with file and line for anything that is not an item."""
    items = tuple(
        parse_item(row, path, number, where) for number, (where, row) in enumerate(read_rows(path, KEYS, _HINT), start=1)
    )
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise InputError(f"{path}: two items have the id {item.id!r}", hint="make ids unique, or leave them out")
        seen.add(item.id)
    return items


def bundled_choices(limit: int | None = None) -> tuple[Item, ...]:
    """The bundled items, one set after the other in turn, so that any `limit` covers the sets evenly."""
    sets = [read_choices(BUNDLED / f"{name}.jsonl") for name in BUNDLED_SETS]
    return tuple(item for item in chain.from_iterable(zip_longest(*sets)) if item is not None)[:limit]


def parse_item(row: dict[str, Any], path: Path, number: int, where: str) -> Item:
    """The item in row `number`, whose keys were checked. Raises InputError."""
    question = want_text(row, "question", where)
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise InputError(f"{where}: choices is {kind(choices)}; a list of two or more strings is wanted", hint=_HINT)
    if len(set(choices)) < len(choices):
        raise InputError(f"{where}: a choice is given twice", hint=_HINT)
    answer = row.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(f"{where}: answer is {kind(answer)}; an index from 0 to {len(choices) - 1} is wanted", hint=_HINT)
    name = want_text(row, "id", where) if "id" in row else f"row-{number}"
    source = want_text(row, "source", where) if "source" in row else path.stem
    return Item(name, question, tuple(choices), answer, source)
