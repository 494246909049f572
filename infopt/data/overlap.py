"""Which rows share a passage with other text: by hashed runs of words, exactly, or from a small fingerprint of that text.

A run of 13 words in common is contamination in GPT-3's analysis (arXiv 2005.14165, appendix C). Words are lower-cased runs of
letters and digits after Unicode's NFKC; a Chinese or Japanese character is a word. A row in which no piece has 13 words shares
a passage when all its runs of 8 words, the least length in that analysis, occur in the other text. A row of 4 to 7 words, not
a passage of plain text, does when it is a row of the other set too; a shorter one is not judged. Runs in more than ten rows of
both sides are a template, not content, and do not count (ten as there).

A word's 64-bit hash is blake2b; a run's is the polynomial Σ wᵢ·Bⁿ⁻ⁱ mod 2⁶⁴ of its words'. Two different runs have the same hash
with probability 2⁻⁶⁴: comparing 10⁵ runs with 10⁵ finds one that is not there with probability 5·10⁻¹⁰.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infopt.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint64]
    Indices = NDArray[np.int64]

RUN, SHORT_RUN, LEAST = 13, 8, 4
TEMPLATE_ROWS = 10
KEPT = 2**16
"""Hashes of a fingerprint per length of run: 512 KiB each at most."""
_BASE = 0x9E3779B97F4A7C15
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


class Piece(NamedTuple):
    """Text of a row. Runs of words cross from one piece to the next of the same `stretch` and no other."""

    row: int
    stretch: int
    text: str


def words(text: str) -> list[str]:
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).lower())


class _Vocabulary(dict[str, int]):
    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = value = int.from_bytes(digest, "little")
        return value


@dataclass(frozen=True)
class Words:
    """The words of many rows: `hashes`, `row` and `stretch` [words], `count` rows."""

    hashes: Hashes
    row: Indices
    stretch: Indices
    count: int

    @staticmethod
    def of(pieces: Iterable[Piece], count: int) -> Words:
        """The words of `pieces`, whose rows are numbered from 0 to `count` - 1."""
        import numpy as np

        vocabulary = _Vocabulary()
        found: list[int] = []
        places: list[tuple[int, int, int]] = []
        for piece in pieces:
            before = len(found)
            found.extend(map(vocabulary.__getitem__, words(piece.text)))
            places.append((piece.row, piece.stretch, len(found) - before))
        rows, stretches, lengths = np.array(places, dtype=np.int64).reshape(-1, 3).T
        return Words(np.array(found, dtype=np.uint64), np.repeat(rows, lengths), np.repeat(stretches, lengths), count)

    def runs(self, length: int) -> tuple[Hashes, Indices]:
        """(hash, index of its first word) of every run of `length` words inside a stretch."""
        import numpy as np

        starts = max(0, len(self.hashes) - length + 1)
        base, total = np.uint64(_BASE), self.hashes[:starts].copy()
        for offset in range(1, length):
            total = total * base + self.hashes[offset : starts + offset]
        inside = np.flatnonzero(self.stretch[:starts] == self.stretch[length - 1 : length - 1 + starts])
        return total[inside], inside

    def wholes(self) -> tuple[Hashes, Indices]:
        """(hash, index of its first word) of every row of 4 to 7 words in a stretch of its own."""
        import numpy as np

        size = np.bincount(self.row, minlength=self.count)
        begins = np.ones(len(self.row), dtype=bool)
        begins[1:] = (self.row[1:] != self.row[:-1]) | (self.stretch[1:] != self.stretch[:-1])
        first = np.flatnonzero(begins)
        length = np.diff(first, append=len(self.row))
        is_alone = np.bincount(self.stretch[first]) == 1 if len(first) else np.zeros(0, dtype=bool)
        chosen = (length == size[self.row[first]]) & (length >= LEAST) & (length < SHORT_RUN) & is_alone[self.stretch[first]]
        first, length = first[chosen], length[chosen]
        total = self.hashes[first].copy()
        for offset in range(1, SHORT_RUN - 1):
            more = offset < length
            total[more] = total[more] * np.uint64(_BASE) + self.hashes[first[more] + offset]
        return total, first

    def units(self, length: int) -> tuple[Hashes, Indices]:
        """What is compared at a length of run: the runs, and with those of 8 words the rows that are shorter."""
        import numpy as np

        hashes, first = self.runs(length)
        if length == RUN:
            return hashes, first
        more, where = self.wholes()
        order = np.argsort(np.concatenate([first, where]), kind="stable")
        return np.concatenate([hashes, more])[order], np.concatenate([first, where])[order]

    def judged(self, length: int) -> tuple[Hashes, Indices]:
        """Runs that decide: all of 13 words; those of 8 words only where the row has none of 13."""
        import numpy as np

        hashes, first = self.units(length)
        if length == RUN:
            return hashes, first
        has_long = np.zeros(self.count, dtype=bool)
        has_long[self.row[self.runs(RUN)[1]]] = True
        mine = ~has_long[self.row[first]]
        return hashes[mine], first[mine]

    def templates(self, length: int, among: Hashes) -> Hashes:
        """Those `among` the hashes whose run occurs in more than ten rows."""
        import numpy as np

        hashes, first = self.units(length)
        chosen = _members(hashes, distinct(among))
        in_rows, _, _ = _pairs(hashes[chosen], self.row[first[chosen]])
        found, counts = np.unique(in_rows, return_counts=True)
        return found[counts > TEMPLATE_ROWS]


@dataclass(frozen=True)
class Fingerprint:
    """A text's runs of 13 and of 8 words by hash, ascending: all of them, or the smallest KEPT (a bottom-k sketch).

    From a sketch, only runs up to its largest hash are compared, a random share s of all. Nothing is found that is not there
    (see above). A passage of n words in common is missed with probability (1 − s)ⁿ⁻¹². s is 1 up to 65,536 different runs, about
    85,000 tokens of English; at ten times that, a passage of 100 words is missed with probability 10⁻⁴.
    """

    long: Hashes
    short: Hashes
    long_bound: int
    short_bound: int

    @staticmethod
    def whole(found: Words) -> Fingerprint:
        """Of every run."""
        return Fingerprint.of(found, kept=2**63)

    @staticmethod
    def of(found: Words, kept: int = KEPT) -> Fingerprint:
        sides: list[Any] = []
        for length in (RUN, SHORT_RUN):
            hashes: Hashes = distinct(found.units(length)[0])
            is_whole = len(hashes) <= kept
            sides.append((hashes if is_whole else hashes[:kept], 2**64 - 1 if is_whole else int(hashes[kept - 1])))
        (long, long_bound), (short, short_bound) = sides
        return Fingerprint(long, short, long_bound, short_bound)

    def to_bytes(self) -> bytes:
        """A .npy array of uint64: two bounds, the number of long runs, long runs, short runs."""
        import numpy as np

        head = np.array([self.long_bound, self.short_bound, len(self.long)], dtype="<u8")
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([head, self.long, self.short]).astype("<u8"), allow_pickle=False)
        return buffer.getvalue()

    @staticmethod
    def read(path: Path) -> Fingerprint:
        """Raises InputError when the file is damaged."""
        import numpy as np

        try:
            found = np.load(path, allow_pickle=False)
            long_bound, short_bound, count = (int(number) for number in found[:3])
            long, short = found[3 : 3 + count].astype(np.uint64), found[3 + count :].astype(np.uint64)
        except (OSError, ValueError, TypeError, EOFError, IndexError) as error:
            message = f"{path}: the fingerprint of the calibration text cannot be read ({error})"
            raise InputError(message, hint="make the artifact again: infopt optimize") from None
        return Fingerprint(long, short, long_bound, short_bound)

    def side(self, length: int) -> tuple[Hashes, int]:
        """Its runs of that length, and the largest hash that it would hold."""
        return (self.long, self.long_bound) if length == RUN else (self.short, self.short_bound)


class Share(NamedTuple):
    """How much of a row occurs in the other text: `found` of the `judged` runs of `length` words; `first` is the number,
    in the row, of the first word of the first one found."""

    row: int
    length: int
    found: int
    judged: int
    first: int


def distinct(values: Hashes | Indices) -> Any:
    """Each value once, ascending. (np.unique hashes before it sorts, which takes ten times as long on millions.)"""
    import numpy as np

    ascending = np.sort(values)
    is_new = np.ones(len(ascending), dtype=bool)
    is_new[1:] = ascending[1:] != ascending[:-1]
    return ascending[is_new]


def _members(hashes: Hashes, known: Hashes) -> NDArray[np.bool_]:
    """Which of `hashes` are among the ascending `known`: a table of their leading bits leaves few to look up."""
    import numpy as np

    shift = np.uint64(64 - max(10, min(26, 4 + len(known).bit_length())))
    table = np.zeros(2 ** (64 - int(shift)), dtype=bool)
    table[known >> shift] = True
    found: NDArray[np.bool_] = table[hashes >> shift]
    if len(known):
        few = hashes[found]
        found[found] = known[np.minimum(np.searchsorted(known, few), len(known) - 1)] == few
    return found


def shares(own: Words, other: Fingerprint, other_words: Words | None = None) -> list[Share]:
    """The rows of `own` that share a passage with `other`, in order. A fingerprint does not tell rows apart: without
    `other_words`, templates are those of `own` alone."""
    import numpy as np

    start_of_row = np.searchsorted(own.row, np.arange(own.count))
    rows: list[Share] = []
    for length in (RUN, SHORT_RUN):
        hashes, first = own.judged(length)
        known, bound = other.side(length)
        inside = hashes <= np.uint64(bound)
        hashes, first = hashes[inside], first[inside]
        is_found = _members(hashes, known)
        templates = own.templates(length, hashes[is_found])
        if other_words is not None:
            templates = other_words.templates(length, templates)
        is_found &= ~_members(hashes, templates)
        judged = np.bincount(own.row[first], minlength=own.count)
        firsts = first[is_found]
        found = np.bincount(own.row[firsts], minlength=own.count)
        leaking = np.flatnonzero(found > 0 if length == RUN else (found > 0) & (found == judged))
        begins = firsts[np.searchsorted(own.row[firsts], leaking)] - start_of_row[leaking]
        numbers = (leaking, found[leaking], judged[leaking], begins)
        rows += [Share(row, length, *rest) for row, *rest in zip(*(each.tolist() for each in numbers), strict=True)]
    return sorted(rows)


def partners(own: Words, other: Words, rows: Iterable[Share]) -> dict[int, int]:
    """For each row of `own`, the row of `other` that holds most of its runs; the first of several."""
    import numpy as np

    best: dict[int, int] = {}
    rows = list(rows)
    shares_by_length = {length: [share.row for share in rows if share.length == length] for length in (RUN, SHORT_RUN)}
    for length, wanted in shares_by_length.items():
        hashes, first = own.judged(length)
        chosen = np.isin(own.row[first], np.array(wanted, dtype=np.int64))
        hashes, mine = hashes[chosen], own.row[first[chosen]]
        known, where = other.units(length)
        common = _members(known, distinct(hashes))
        known, index = np.unique(known[common], return_index=True)
        where = where[common]
        if not len(known):
            continue
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        hit = known[at] == hashes
        rows_here, rows_there, counts = _pairs(mine[hit], other.row[where[index[at[hit]]]])
        order = np.lexsort((-rows_there, counts))  # of a row here, the last one stays
        best |= dict(zip(rows_here[order].tolist(), rows_there[order].tolist(), strict=True))
    return best


def _pairs(first: Any, second: Indices) -> tuple[Any, Indices, Indices]:
    """The different pairs of elements, ascending, and how often each occurs."""
    import numpy as np

    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    is_new = np.ones(len(first), dtype=bool)
    is_new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    starts = np.flatnonzero(is_new)
    return first[starts], second[starts], np.diff(starts, append=len(first))


def quote(text: str, first: int, length: int) -> str:
    """The run of words at `first`, as it is compared."""
    return " ".join(words(text)[first : first + length])
