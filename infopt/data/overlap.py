"""Which rows share a passage with other text: by hashed runs of words, exactly, or from a small fingerprint of that text.

A run of 13 words in common is contamination in GPT-3's analysis (arXiv 2005.14165, appendix C). Words are lower-cased runs of
letters and digits after Unicode's NFKC; a Chinese or Japanese character is a word. A piece that has no 13 words shares a passage
when all its runs of 8 words, the least length in that analysis, occur in the other text. A piece of fewer than 8 words, not a
passage of plain text, does when it is a piece of the other set too. Runs in more than ten rows of both sides are a template, not
content, and do not count (ten as there).

A row shares a passage when one of its pieces does. A question with its answer is a piece, and the question is another, so that
it is found beside other answers and in other layouts. A question of one or two words alone says too little to be one.

A word's 64-bit hash is blake2b; a run's is the polynomial Σ wᵢ·Bⁿ⁻ⁱ mod 2⁶⁴ of its words'. Two different runs have the same hash
with probability 2⁻⁶⁴: comparing 10⁵ runs with 10⁵ finds one that is not there with probability 5·10⁻¹⁰.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infopt.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint64]
    Indices = NDArray[np.int64]

RUN, SHORT_RUN = 13, 8
QUESTION = 3
"""Words of a question that is compared without its answer."""
TEMPLATE_ROWS = 10
KEPT = 2**16
"""Hashes of a fingerprint per length of run: 512 KiB each at most."""
_BASE = 0x9E3779B97F4A7C15
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


class Piece(NamedTuple):
    """What is judged of a row. Runs of words cross from one piece to the next of the same `stretch` and no other."""

    row: int
    stretch: int
    text: str


def words(text: str) -> list[str]:
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).lower())


def pieces(text: str, question: str | None = None) -> tuple[str, ...]:
    """What is compared of a row that says `text`, which opens with `question`, or is it where there is no answer."""
    if question is None:
        return (text,)
    count = len(words(question))
    if text == question:
        return (question,) if count >= QUESTION else ()
    return (text, question) if QUESTION <= count < RUN else (text,)  # the runs of a longer one decide


class _Vocabulary(dict[str, int]):
    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = value = int.from_bytes(digest, "little")
        return value


@dataclass(frozen=True)
class Words:
    """The words of many rows: `hashes` and `piece` [words]; of each piece its `row` and its `stretch` [pieces]."""

    hashes: Hashes
    piece: Indices
    row: Indices
    stretch: Indices

    @staticmethod
    def of(found: Iterable[Piece]) -> Words:
        import numpy as np

        vocabulary = _Vocabulary()
        hashes: list[int] = []
        places: list[tuple[int, int, int]] = []
        for piece in found:
            before = len(hashes)
            hashes.extend(map(vocabulary.__getitem__, words(piece.text)))
            places.append((piece.row, piece.stretch, len(hashes) - before))
        rows, stretches, lengths = np.array(places, dtype=np.int64).reshape(-1, 3).T
        return Words(np.array(hashes, dtype=np.uint64), np.repeat(np.arange(len(rows)), lengths), rows, stretches)

    @property
    def count(self) -> int:
        """The pieces."""
        return len(self.row)

    def runs(self, length: int) -> tuple[Hashes, Indices]:
        """(hash, index of its first word) of every run of `length` words inside a stretch."""
        import numpy as np

        starts = max(0, len(self.hashes) - length + 1)
        base, total = np.uint64(_BASE), self.hashes[:starts].copy()
        for offset in range(1, length):
            total = total * base + self.hashes[offset : starts + offset]
        stretch = self.stretch[self.piece]
        inside = np.flatnonzero(stretch[:starts] == stretch[length - 1 : length - 1 + starts])
        return total[inside], inside

    def wholes(self) -> tuple[Hashes, Indices]:
        """(hash, index of its first word) of every piece of 1 to 7 words in a stretch of its own."""
        import numpy as np

        length = np.bincount(self.piece, minlength=self.count)
        first = np.cumsum(length) - length
        is_alone = np.bincount(self.stretch)[self.stretch] == 1 if self.count else np.zeros(0, dtype=bool)
        chosen = (length > 0) & (length < SHORT_RUN) & is_alone
        first, length = first[chosen], length[chosen]
        total = self.hashes[first].copy()
        for offset in range(1, SHORT_RUN - 1):
            more = offset < length
            total[more] = total[more] * np.uint64(_BASE) + self.hashes[first[more] + offset]
        return total, first

    def units(self, length: int) -> tuple[Hashes, Indices]:
        """What is compared at a length of run: the runs, and with those of 8 words the pieces that are shorter."""
        import numpy as np

        hashes, first = self.runs(length)
        if length == RUN:
            return hashes, first
        more, where = self.wholes()
        order = np.argsort(np.concatenate([first, where]), kind="stable")
        return np.concatenate([hashes, more])[order], np.concatenate([first, where])[order]

    def judged(self, length: int) -> tuple[Hashes, Indices]:
        """Runs that decide: all of 13 words; those of 8 words only where the piece has none of 13."""
        import numpy as np

        hashes, first = self.units(length)
        if length == RUN:
            return hashes, first
        has_long = np.zeros(self.count, dtype=bool)
        has_long[self.piece[self.runs(RUN)[1]]] = True
        mine = ~has_long[self.piece[first]]
        return hashes[mine], first[mine]

    def templates(self, length: int, among: Hashes) -> Hashes:
        """Those `among` the hashes whose run occurs in more than ten rows."""
        import numpy as np

        hashes, first = self.units(length)
        chosen = _members(hashes, distinct(among))
        in_rows, _, _ = _pairs(hashes[chosen], self.row[self.piece[first[chosen]]])
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

    @staticmethod
    def joined(known: Sequence[Fingerprint]) -> Fingerprint:
        """Of several texts: their runs up to the largest hash that all would hold."""
        import numpy as np

        sides: list[Any] = []
        for length in (RUN, SHORT_RUN):
            parts = [each.side(length) for each in known]
            bound = min(most for _, most in parts)
            every = distinct(np.concatenate([hashes for hashes, _ in parts]))
            sides.append((every[every <= bound], bound))
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
            with path.open("rb") as file:
                found = np.lib.format.read_array(file, allow_pickle=False)
            long_bound, short_bound, count = (int(number) for number in found[:3])
            long, short = found[3 : 3 + count].astype(np.uint64), found[3 + count :].astype(np.uint64)
        except (OSError, ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
            message = f"{path}: the fingerprint of the calibration text cannot be read ({error})"
            raise InputError(message, hint="make the artifact again: infopt optimize") from None
        return Fingerprint(long, short, long_bound, short_bound)

    def side(self, length: int) -> tuple[Hashes, int]:
        """Its runs of that length, and the largest hash that it would hold."""
        return (self.long, self.long_bound) if length == RUN else (self.short, self.short_bound)


class Share(NamedTuple):
    """How much of a row occurs in the other text: `found` of the `judged` runs of `length` words of its piece number `piece`;
    `first` is the number, in the piece, of the first word of the first one found."""

    row: int
    piece: int
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
    """The rows of `own` that share a passage with `other`, in order, each by the first of its pieces that does. A fingerprint
    does not tell rows apart: without `other_words`, templates are those of `own` alone."""
    import numpy as np

    start = np.searchsorted(own.piece, np.arange(own.count))
    found: list[Share] = []
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
        judged = np.bincount(own.piece[first], minlength=own.count)
        firsts = first[is_found]
        hits = np.bincount(own.piece[firsts], minlength=own.count)
        leaking = np.flatnonzero(hits > 0 if length == RUN else (hits > 0) & (hits == judged))
        begins = firsts[np.searchsorted(own.piece[firsts], leaking)] - start[leaking]
        lengths = np.full(len(leaking), length)
        numbers = (own.row[leaking], leaking, lengths, hits[leaking], judged[leaking], begins)
        found += map(Share._make, zip(*(each.tolist() for each in numbers), strict=True))
    return list({share.row: share for share in sorted(found, reverse=True)}.values())[::-1]


def partners(own: Words, other: Words, rows: Iterable[Share]) -> dict[int, int]:
    """For each row of `own`, the row of `other` that holds most of its piece's runs; the first of several."""
    import numpy as np

    best: dict[int, int] = {}
    rows = list(rows)
    pieces_by_length = {length: [share.piece for share in rows if share.length == length] for length in (RUN, SHORT_RUN)}
    for length, wanted in pieces_by_length.items():
        hashes, first = own.judged(length)
        chosen = np.isin(own.piece[first], np.array(wanted, dtype=np.int64))
        hashes, mine = hashes[chosen], own.row[own.piece[first[chosen]]]
        known, where = other.units(length)
        common = _members(known, distinct(hashes))
        known, index = np.unique(known[common], return_index=True)
        where = where[common]
        if not len(known):
            continue
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        hit = known[at] == hashes
        rows_here, rows_there, counts = _pairs(mine[hit], other.row[other.piece[where[index[at[hit]]]]])
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
