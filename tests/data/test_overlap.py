"""Passages in common: planted ones are found with their place, other text gives none, a fingerprint keeps its promise."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.data.overlap import KEPT, RUN, Fingerprint, Piece, Words, partners, pieces, quote, shares, words
from infopt.errors import InputError

SEEDS = st.integers(0, 10**6)


def text(seed: int, count: int, vocabulary: int = 400) -> list[str]:
    chosen = random.Random(seed)
    return [f"w{chosen.randrange(vocabulary)}" for _ in range(count)]


def rows(*texts: str) -> Words:
    return Words.of([Piece(row, row, each) for row, each in enumerate(texts)])


def runs(found: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def leaking(own: Words, other: Words) -> list[int]:
    return [share.row for share in shares(own, Fingerprint.whole(other), other)]


def test_words_are_normalised() -> None:
    assert words("Don't—PANIC, ﬁne: ½ x_1") == ["don", "t", "panic", "fine", "1", "2", "x_1"]
    assert words("東京タワー is 高い") == ["東", "京", "タ", "ワ", "ー", "is", "高", "い"]
    assert words("... !!! ") == []


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=60), st.lists(st.sampled_from("abc"), max_size=60))
def test_rows_share_what_a_set_of_tuples_says_they_share(first: list[str], second: list[str]) -> None:
    found = shares(rows(" ".join(first)), Fingerprint.whole(rows(" ".join(second))))
    common = runs(first, RUN) & runs(second, RUN)
    if len(first) >= RUN:
        assert bool(found) == bool(common)
        assert all(share.found == sum(tuple(first[i : i + RUN]) in common for i in range(len(first) - 12)) for share in found)
    elif len(first) >= 8:
        assert bool(found) == (runs(first, 8) <= runs(second, 8))
    else:
        assert bool(found) == bool(first and first == second)


@settings(deadline=None)
@given(planted=st.integers(0, 19), into=st.integers(0, 29), length=st.integers(13, 60), before=st.integers(0, 20), seed=SEEDS)
def test_a_planted_passage_is_found_in_the_row_it_was_planted_into(
    planted: int, into: int, length: int, before: int, seed: int
) -> None:
    own = [text(seed + row, 80) for row in range(20)]
    other = [[f"other{word}" for word in text(seed + 100 + row, 50)] for row in range(30)]
    other[into][before:before] = own[planted][5 : 5 + length]
    mine, theirs = rows(*map(" ".join, own)), rows(*map(" ".join, other))
    (share,) = shares(mine, Fingerprint.whole(theirs), theirs)
    assert (share.row, share.first, share.found, share.judged) == (planted, 5, length - 12, 68)
    assert partners(mine, theirs, [share]) == {planted: into}
    assert quote(" ".join(own[planted]), share.first, RUN) == " ".join(own[planted][5:18])


@settings(deadline=None)
@given(SEEDS, st.permutations(range(12)))
def test_the_order_of_rows_does_not_matter(seed: int, order: list[int]) -> None:
    own = [" ".join(text(seed + row // 2, 30)) for row in range(12)]
    other = rows(*(" ".join(text(seed + row, 40)) for row in (0, 3, 90)))
    expected = leaking(rows(*own), other)
    assert [own[row] for row in expected] == [own[0], own[1], own[6], own[7]]
    assert sorted(order[row] for row in leaking(rows(*(own[row] for row in order)), other)) == expected


@settings(deadline=None)
@given(SEEDS)
def test_disjoint_texts_share_nothing(seed: int) -> None:
    own, other = (rows(*(" ".join(f"{side}{word}" for word in text(seed, 60)) for _ in range(3))) for side in "ab")
    assert leaking(own, other) == leaking(other, own) == []


def test_case_punctuation_and_line_breaks_are_no_difference() -> None:
    passage = text(1, 20)
    assert leaking(rows(" ".join(passage).upper()), rows(",\n".join(passage))) == [0]


def test_runs_end_with_their_stretch() -> None:
    passage = text(1, 20)
    cut = Words.of([Piece(0, 0, " ".join(passage[:10])), Piece(0, 1, " ".join(passage[10:]))])
    joined = Words.of([Piece(0, 0, " ".join(passage[:10])), Piece(1, 0, " ".join(passage[10:]))])
    whole = rows(" ".join(passage))
    assert leaking(whole, cut) == []
    assert leaking(whole, joined) == [0]
    assert leaking(joined, whole) == [0, 1]


def test_short_rows_leak_as_wholes() -> None:
    sentence = "the capital of france is a city"
    assert leaking(rows(sentence), rows(sentence.upper())) == [0]
    assert leaking(rows(sentence), rows(f"{sentence} by a river")) == [], "a part of another row"
    assert leaking(rows("Yes."), rows("yes")) == [0]
    assert leaking(rows("yes"), rows("yes it is")) == leaking(rows("", "?"), rows("!", "")) == []
    passage = text(2, 10)
    assert leaking(rows(" ".join(passage)), rows(" ".join([*text(3, 9), *passage, *text(4, 9)]))) == [0]
    assert leaking(rows(" ".join([*passage, "other"])), rows(" ".join(passage))) == [], "not all of it"


def test_a_question_is_found_beside_another_answer() -> None:
    def qa(question: str, answer: str) -> Words:
        return Words.of([Piece(0, number, text) for number, text in enumerate(pieces(f"{question}\n{answer}", question))])

    def asked(question: str) -> Words:
        return Words.of([Piece(0, number, text) for number, text in enumerate(pieces(question, question))])

    for length in (3, 7, 8, 12, 13, 40):
        question = " ".join(text(length, length))
        assert leaking(qa(question, "red"), qa(question, "blue")) == [0], length
        assert leaking(asked(question), qa(question, "blue")) == leaking(qa(question, "red"), asked(question)) == [0], length
    assert leaking(qa("Why?", "So."), qa("why", "Not so")) == [], "two words say too little"
    assert leaking(qa("Why?", "So."), qa("why", "so")) == [0]
    assert leaking(asked("Why?"), qa("why", "so")) == leaking(asked("Why?"), asked("Why?")) == []


def test_the_first_piece_that_is_found_names_the_row() -> None:
    passage = text(2, 10)
    own = Words.of([Piece(0, 0, " ".join([*passage, "other"])), Piece(0, 1, " ".join(passage)), Piece(2, 2, " ".join(passage))])
    found = shares(own, Fingerprint.whole(rows("x", " ".join(passage))))
    assert [(share.row, share.piece, share.length, share.found, share.judged) for share in found] == [
        (0, 1, 8, 3, 3),
        (2, 2, 8, 3, 3),
    ]
    assert partners(own, rows("x", " ".join(passage)), found) == {0: 1, 2: 1}


def test_pieces_of_a_row_are_one_row_of_a_template() -> None:
    """Ten rows with a question, which is a part of both pieces, are no template yet."""
    question = " ".join(text(1, 9))
    own = Words.of([Piece(row, 2 * row + part, question) for row in range(10) for part in (0, 1)])
    assert leaking(own, own) == list(range(10))


def test_templates_do_not_count_unless_one_side_repeats_them_alone() -> None:
    template = " ".join(text(5, 20))
    own = rows(*(f"{template} {' '.join(text(10 + row, 9))}" for row in range(11)))
    other = rows(*(f"{template} {' '.join(text(40 + row, 9))}" for row in range(11)))
    assert leaking(own, other) == []
    once = rows(template)
    assert leaking(own, once) == list(range(11))
    assert leaking(once, own) == [0], "a row that was copied eleven times is no template"


def test_no_text_is_no_problem() -> None:
    nothing = Words.of([])
    for own, other in ((nothing, rows("a b c d")), (rows("", "..."), nothing), (rows(" ".join(text(0, 30))), nothing)):
        assert leaking(own, other) == []
        assert partners(own, other, []) == {}


# --- Fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_survives_the_disk(tmp_path: Path) -> None:
    fingerprint = Fingerprint.of(rows(" ".join(text(0, 500))))
    path = tmp_path / "runs.npy"
    path.write_bytes(fingerprint.to_bytes())
    again = Fingerprint.read(path)
    assert fingerprint.to_bytes() == again.to_bytes()
    np.testing.assert_array_equal(again.long, fingerprint.long)
    assert len(fingerprint.long) == 488
    for damaged in (b"", fingerprint.to_bytes()[:200], b"no array at all", b"PK\x03\x04 no archive", np.float64(3).tobytes()):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            Fingerprint.read(path)


def test_hashes_are_the_same_in_every_process() -> None:
    """They are stored, so they must not follow Python's random hash seed or its version."""
    found = [f"word{number}" for number in range(14)]
    expected = [0, 0]
    for start in (0, 1):
        for word in found[start : start + 13]:
            hashed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
            expected[start] = (expected[start] * 0x9E3779B97F4A7C15 + hashed) % 2**64
    assert rows(" ".join(found)).runs(RUN)[0].tolist() == expected


def test_a_sketch_finds_a_copy_and_never_what_is_not_there() -> None:
    passages = [text(seed, 200, 5000) for seed in range(60)]
    known = rows(*(" ".join(each) for each in passages))
    sketch = Fingerprint.of(known, kept=len(known.runs(RUN)[0]) // 10)
    copies = rows(*(" ".join(each[20:130]) for each in passages))
    assert len(shares(copies, sketch)) >= 58, "each is missed with probability 0.9 to the power of 98"
    others = rows(*(" ".join(text(1000 + seed, 200, 5000)) for seed in range(60)))
    assert shares(others, sketch) == []


def test_a_sketch_is_small() -> None:
    found = rows(" ".join(text(0, 150_000, 30_000)))
    fingerprint = Fingerprint.of(found)
    assert len(fingerprint.long) == len(fingerprint.short) == KEPT
    assert len(fingerprint.to_bytes()) < 2 * 8 * KEPT + 1000
    assert len(shares(rows(" ".join(text(0, 150_000, 30_000)[500:560])), fingerprint)) == 1
