"""Near-duplicate rows: all pairs whose sets of 3-word runs agree (Jaccard index) as `thresholds` ask, exactly, no pair by luck.

Two sets with |A ∩ B| / |A ∪ B| ≥ t share one of the first |A| − ⌈t·|A|⌉ + 1 elements of A in any order common to all sets, so
only rows that meet there are compared; with the rarest runs first, few do (prefix filtering: Chaudhuri, Ganti and Kaushik,
ICDE 2006; Bayardo, Ma and Srikant, WWW 2007).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from infopt.data.overlap import Words, distinct

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHINGLE = 3
THRESHOLD, LEAST = 0.8, 12
NEIGHBOURS = 50
"""Rows that meet at one run are compared with so many of their neighbours by size and content: where more meet, they are
variants of one text, and chains of neighbours put them into one group."""


def thresholds(sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """The least Jaccard index that makes a set of so many runs a near-duplicate; the stricter one of two sets decides.

    A changed word inside changes three runs, which leaves (s − 3) / (s + 3) of s. So one is found in rows of 14 words or more;
    the 0.8 for long rows are one in about 27. Shorter rows that differ in a word may well be different questions.
    """
    import numpy as np

    return np.where(sizes < LEAST, THRESHOLD, np.minimum(THRESHOLD, (sizes - 3) / (sizes + 3))) - 1e-9


def groups(found: Words) -> list[tuple[int, ...]]:
    """Rows that are near-duplicates of each other, directly or through others; each group and their list ascending."""
    import numpy as np

    keys, sizes, universe = _sets(found)
    least = thresholds(sizes)
    ends = np.cumsum(sizes)
    sets: dict[int, frozenset[int]] = {}

    def runs_of(row: int) -> frozenset[int]:
        if row not in sets:
            sets[row] = frozenset((keys[ends[row] - sizes[row] : ends[row]] - row * universe).tolist())
        return sets[row]

    parent = list(range(len(sizes)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for first, second in _candidates(keys, sizes, least, universe):
        if root(first) == root(second):
            continue
        one, other = runs_of(first), runs_of(second)
        common = len(one & other)
        if common >= max(least[first], least[second]) * (len(one) + len(other) - common):
            parent[root(second)] = root(first)
    members: dict[int, list[int]] = {}
    for row in range(len(sizes)):
        members.setdefault(root(row), []).append(row)
    return sorted(tuple(rows) for rows in members.values() if len(rows) > 1)


def _sets(found: Words) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Every row's set as keys row·universe + rank, ascending, rank 0 the rarest run; the sets' sizes; the universe's size."""
    import numpy as np

    hashes, first = found.runs(SHINGLE)
    order = np.argsort(hashes)
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = hashes[order[1:]] != hashes[order[:-1]]
    starts = np.flatnonzero(is_new)
    universe = max(len(starts), 1)
    rank = np.empty(len(starts), dtype=np.int64)
    rank[np.argsort(np.diff(starts, append=len(order)), kind="stable")] = np.arange(len(starts))
    keys: NDArray[np.int64] = distinct(found.row[found.piece[first[order]]] * universe + rank[np.cumsum(is_new) - 1])
    return keys, np.bincount(keys // universe, minlength=int(found.row.max(initial=-1)) + 1), universe


def _candidates(
    keys: NDArray[np.int64], sizes: NDArray[np.int64], least: NDArray[np.float64], universe: int
) -> Iterator[tuple[int, int]]:
    """Pairs of rows that meet in their prefixes and whose sizes allow the threshold."""
    import numpy as np

    row, rank = np.divmod(keys, universe)
    position = np.arange(len(keys)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    in_prefix = position < sizes[row] - np.ceil(least[row] * sizes[row]) + 1
    row, rank = row[in_prefix], rank[in_prefix]
    # A row's least rank stands for its content, so that the order of rows does not decide which are neighbours.
    content = np.zeros(len(sizes), dtype=np.int64)
    content[row[::-1]] = rank[::-1]
    order = np.lexsort((content[row], sizes[row], rank))
    row, rank = row[order], rank[order]
    for distance in range(1, NEIGHBOURS + 1):
        meets = rank[distance:] == rank[:-distance]
        if not meets.any():
            return
        one, other = row[:-distance][meets], row[distance:][meets]
        small, large = np.minimum(sizes[one], sizes[other]), np.maximum(sizes[one], sizes[other])
        fits = small >= np.maximum(least[one], least[other]) * large
        first, second = np.divmod(distinct(one[fits] * len(sizes) + other[fits]), len(sizes))
        yield from zip(first.tolist(), second.tolist(), strict=True)
