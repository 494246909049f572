"""What the package ships: texts that share no passage, small slices, and a licence for every file."""

from __future__ import annotations

import re

import pytest

from infopt.data.choices import BUNDLED_SETS, bundled_choices, read_choices
from infopt.data.expect import RULES
from infopt.data.overlap import Fingerprint, Piece, Words, shares
from infopt.data.prompts import BUNDLED_PROMPTS, read_prompts
from infopt.data.texts import BUNDLED, content_hash, read_text

FILES = sorted(path.name for path in BUNDLED.iterdir() if path.name != "NOTICE")
# A changed file changes every stored figure that was measured on it: renew a hash only together with the results.
HASHES = {
    "calibration.txt": "04c8c3097ca65c21",
    "evaluation.txt": "27b7c4afe35e13a5",
    "hellaswag.jsonl": "f250ab1801bc8731",
    "openbookqa.jsonl": "1dfec2b6f4cc954d",
    "prompts.jsonl": "75b152553599bee0",
}


def test_every_file_is_known_and_unchanged() -> None:
    assert {name: content_hash((BUNDLED / name).read_bytes())[:16] for name in FILES} == HASHES


def test_content_hash_is_sha256_of_the_utf8_bytes() -> None:
    assert content_hash("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert content_hash("é") == content_hash("é".encode())


@pytest.mark.parametrize("name", FILES)
def test_notice_names_source_and_permissive_licence(name: str) -> None:
    sections = re.split(r"\n(?=\S)", (BUNDLED / "NOTICE").read_text(encoding="utf-8"))
    own = [section for section in sections if name in section.splitlines()[0]]
    assert len(own) == 1, f"{name} needs one section in NOTICE"
    licence = re.search(r"Licence:\s+([\w. -]+)", own[0])
    assert licence
    assert re.match(r"(public domain|MIT|Apache-2\.0)", licence[1])
    assert re.search(r"From:\s+\S", own[0])


def test_calibration_and_evaluation_share_no_passage() -> None:
    calibration, evaluation = read_text("bundled", "calibration"), read_text("bundled", "evaluation")
    own, other = (Words.of([Piece(0, 0, text)]) for text in (calibration, evaluation))
    assert shares(own, Fingerprint.whole(other)) == []
    headwords = [{entry.split("\n")[0] for entry in text.split("\n\n")} for text in (calibration, evaluation)]
    assert not headwords[0] & headwords[1]


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_texts_are_prose(part: str) -> None:
    text = read_text("bundled", part)  # type: ignore[arg-type]
    assert 150_000 <= len(text.encode()) <= 310_000
    assert sum(c.isalpha() or c.isspace() for c in text) / len(text) > 0.93
    assert not re.search(r"[{}│┌═]|https?:|   ", text)


@pytest.mark.parametrize("name", BUNDLED_SETS)
def test_slices_are_small_even_and_not_guessable_by_position(name: str) -> None:
    items = read_choices(BUNDLED / f"{name}.jsonl")
    assert len(items) <= 50
    assert all(int(item.id.rsplit("-", 1)[1]) % 2 == 0 for item in items)
    assert {len(item.choices) for item in items} == {4}
    answers = [item.answer for item in items]
    assert max(answers.count(position) for position in range(4)) <= len(items) / 2


def test_bundled_choices_take_the_sets_in_turn() -> None:
    assert [item.source for item in bundled_choices(5)] == ["HellaSwag", "OpenBookQA", "HellaSwag", "OpenBookQA", "HellaSwag"]
    assert len(bundled_choices()) == sum(len(read_choices(BUNDLED / f"{name}.jsonl")) for name in BUNDLED_SETS)


def test_bundled_prompts_use_every_rule_and_every_form() -> None:
    prompts = read_prompts(BUNDLED_PROMPTS)
    rules = {rule for p in prompts if p.expect for rule in RULES if getattr(p.expect, rule) not in (None, (), False)}
    assert rules == set(RULES)
    assert any(p.expect and p.expect.refusal is False for p in prompts)
    assert (
        {bool(p.messages) for p in prompts} == {p.is_raw for p in prompts} == {p.expect is None for p in prompts} == {True, False}
    )
