"""Writes the rows of a small extraction task, made by rule, for `recipes/distil_extract.yaml`.

    python benchmarks/extract_rows.py FOLDER && cd FOLDER
    infopt optimize demo -r finetune -o teacher
    infopt compare teacher demo:distil_extract --checks test.jsonl

A sentence says who did what, where and when, with another year beside it; the answer is JSON with name, place and year. Names and
places are made of syllables, so that nobody knows them by heart: an answer has to be read from the sentence.

train.jsonl    sentences with their answer, of which the teacher learns
prompts.jsonl  others, with the schema that an answer must meet, and no answer
test.jsonl     others again; the schema there has the true values: what is well-formed and untrue breaks it
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

CONSONANTS, VOWELS, ENDS = "bdfghklmnprstvz", "aeiou", ("", "n", "r", "s", "l", "m")
DEEDS = ("opened a bakery", "founded a school", "built a bridge", "started a newspaper", "bought a mill", "won the race")
SHAPES = (
    "In {year}, {name} {deed} in {place}, {gap} years before the flood of {other}.",
    "{name} {deed} in {place} in {year}; the flood came in {other}.",
    "After the flood of {other}, {name} came to {place} and {deed} in {year}.",
    "The people of {place} remember {name}, who {deed} in {year} and retired in {other}.",
    "It was {name} who {deed} in {place} in {year}, not in {other} as some say.",
)
TRAIN, PROMPTS, TEST = 320, 480, 120
#: Twice the longest answer.
MOST_TOKENS = 80
KEYS = ("name", "place", "year")


def word(source: random.Random, syllables: int) -> str:
    made = "".join(source.choice(CONSONANTS) + source.choice(VOWELS) for _ in range(syllables))
    return (made + source.choice(ENDS)).capitalize()


def facts(source: random.Random) -> dict[str, Any]:
    name = f"{word(source, 2)} {word(source, source.choice((2, 3)))}"
    return {"name": name, "place": word(source, source.choice((2, 3))), "year": source.randint(1850, 1979)}


def prompt(found: dict[str, Any], source: random.Random) -> str:
    gap, shape = source.randint(2, 20), source.choice(SHAPES)
    other = found["year"] - gap if shape.startswith("After") else found["year"] + gap
    return f"Text: {shape.format(**found, deed=source.choice(DEEDS), gap=gap, other=other)}\nJSON:"


def schema(values: dict[str, Any] | None = None) -> dict[str, Any]:
    kinds: dict[str, Any] = {"name": {"type": "string"}, "place": {"type": "string"}, "year": {"type": "integer"}}
    if values is not None:
        kinds = {key: {"const": value} for key, value in values.items()}
    return {"json_schema": {"type": "object", "required": list(KEYS), "properties": kinds, "additionalProperties": False}}


def rows(count: int, source: random.Random, *, is_answered: bool = False, is_test: bool = False) -> list[dict[str, Any]]:
    written = []
    for _ in range(count):
        found = facts(source)
        row: dict[str, Any] = {"prompt": prompt(found, source), "raw": True, "expect": schema(found if is_test else None)}
        row |= {"max_tokens": MOST_TOKENS} if is_test else {}
        written.append(row | ({"response": f" {json.dumps(found)}"} if is_answered else {}))
    return written


def main() -> None:
    out, source = Path(sys.argv[1]), random.Random(0)
    files = {
        "train": rows(TRAIN, source, is_answered=True),
        "prompts": rows(PROMPTS, source),
        "test": rows(TEST, source, is_test=True),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, written in files.items():
        path = out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in written), encoding="utf-8")
        print(f"{path}: {len(written)} rows")


if __name__ == "__main__":
    main()
