"""Near-duplicates: what all pairs compared one by one would give."""

from __future__ import annotations

import random
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.data.duplicates import NEIGHBOURS, groups
from infopt.data.overlap import Piece, Words


def of(texts: list[list[str]]) -> Words:
    return Words.of([Piece(row, row, " ".join(each)) for row, each in enumerate(texts)])


def least(size: int) -> float:
    """A changed word inside, or 0.8, whichever is less; 0.8 below 14 words."""
    return 0.8 if size < 12 else min(0.8, (size - 3) / (size + 3))


def by_definition(texts: list[list[str]]) -> list[tuple[int, ...]]:
    sets = [{tuple(each[i : i + 3]) for i in range(len(each) - 2)} for each in texts]
    found = [{row} for row in range(len(texts))]
    for first, second in combinations(range(len(texts)), 2):
        common, either = len(sets[first] & sets[second]), len(sets[first] | sets[second])
        if common and common / either >= max(least(len(sets[first])), least(len(sets[second]))) - 1e-9:
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


def test_one_changed_word_is_near_from_14_words_on_and_two_from_56() -> None:
    """Inside the text two changed words change six runs: (n − 2 − 6) / (n − 2 + 6) ≥ 0.8 at 56 words."""

    def changed(words: int, *places: int) -> list[tuple[int, ...]]:
        text = [f"w{i}" for i in range(words)]
        return groups(of([text, ["changed" if i in places else word for i, word in enumerate(text)]]))

    assert [changed(count, 6) for count in (13, 14, 15, 28, 29, 60)] == [[], *[[(0, 1)]] * 5]
    assert [changed(count, 6, 12) for count in (28, 55, 56)] == [[], [], [(0, 1)]]


def test_a_crowd_of_variants_is_one_group() -> None:
    """More rows at one run than are compared with each other."""
    base = [f"w{i}" for i in range(60)]
    count = 6 * NEIGHBOURS
    texts = [[*base[: row % 50 + 3], f"x{row}", *base[row % 50 + 4 :]] for row in range(count)]
    assert groups(of(texts)) == [tuple(range(count))]


def test_no_words_no_duplicates() -> None:
    assert groups(of([])) == groups(of([[], []])) == groups(of([["a", "b"], ["a", "b"]])) == []
