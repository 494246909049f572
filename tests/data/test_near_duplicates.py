"""Near-duplicates: what all pairs compared one by one would give."""

from __future__ import annotations

import random
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.data.duplicates import NEIGHBOURS, THRESHOLD, groups
from infopt.data.overlap import Piece, Words


def of(texts: list[list[str]]) -> Words:
    return Words.of([Piece(row, row, " ".join(each)) for row, each in enumerate(texts)], len(texts))


def by_definition(texts: list[list[str]]) -> list[tuple[int, ...]]:
    sets = [{tuple(each[i : i + 3]) for i in range(len(each) - 2)} for each in texts]
    found = [{row} for row in range(len(texts))]
    for first, second in combinations(range(len(texts)), 2):
        if sets[first] and sets[second] and len(sets[first] & sets[second]) >= THRESHOLD * len(sets[first] | sets[second]):
            one = next(group for group in found if first in group)
            other = next(group for group in found if second in group)
            if one is not other:
                one |= other
                found.remove(other)
    return sorted(tuple(sorted(group)) for group in found if len(group) > 1)


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("ab"), max_size=12), max_size=14))
def test_small_alphabets_where_everything_meets(texts: list[list[str]]) -> None:
    assert groups(of(texts)) == by_definition(texts)


@settings(deadline=None)
@given(st.integers(), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=25))
def test_variants_of_texts(seed: int, variants: list[tuple[int, int]]) -> None:
    """(which text, how many words are changed)"""
    chosen = random.Random(seed)
    base = [[f"w{chosen.randrange(300)}" for _ in range(chosen.randrange(10, 60))] for _ in range(10)]
    texts = []
    for source, changes in variants:
        copy = list(base[source])
        for _ in range(changes):
            copy[chosen.randrange(len(copy))] = f"x{chosen.randrange(10_000)}"
        texts.append(copy)
    found = groups(of(texts))
    assert found == by_definition(texts)
    order = list(range(len(texts)))
    chosen.shuffle(order)
    shuffled = groups(of([texts[row] for row in order]))
    assert sorted(tuple(sorted(order[row] for row in group)) for group in shuffled) == found


def test_one_changed_word_in_27_is_near() -> None:
    """Inside the text a changed word changes three runs: (n − 2 − 3) / (n − 2 + 3) reaches 0.8 at 29 words."""
    long, short = [f"w{i}" for i in range(29)], [f"w{i}" for i in range(28)]
    for words, expected in ((long, [(0, 1)]), (short, [])):
        assert groups(of([words, [*words[:10], "changed", *words[11:]]])) == expected


def test_a_crowd_of_variants_is_one_group() -> None:
    """More rows at one run than are compared with each other."""
    base = [f"w{i}" for i in range(60)]
    count = 6 * NEIGHBOURS
    texts = [[*base[: row % 50 + 3], f"x{row}", *base[row % 50 + 4 :]] for row in range(count)]
    assert groups(of(texts)) == [tuple(range(count))]


def test_no_words_no_duplicates() -> None:
    assert groups(of([])) == groups(of([[], []])) == groups(of([["a", "b"], ["a", "b"]])) == []
