"""How many tokens to draft: as many as pay, by what was accepted so far and what verifying was seen to cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Drafts accepted and refused that are taken to have been seen at the start.
PRIOR = (1.0, 1.0)
#: What a further token is taken to add to a step, before it was measured.
FIRST_SLOPE = 0.08
#: Weight of the newest measurement of a step's time.
NEWEST = 0.2
#: Steps between two tries of one token while drafting does not pay.
RETRY = 24
#: What a first measurement counts at most, over what was expected, and after how many steps it counts no longer: one that was
#: slow by chance would keep its size from being tried again.
SURPRISE, FORGOTTEN = 2.0, 200
#: What is left of older acceptances after each one.
FADING = 0.98


@dataclass
class Record:
    """Acceptances of drafts of one kind, fading, so that a text that turns repetitive is noticed."""

    kept: float = PRIOR[0]
    refused: float = PRIOR[1]

    @property
    def rate(self) -> float:
        return self.kept / (self.kept + self.refused)

    def add(self, kept: int, refused: int) -> None:
        self.kept = self.kept * FADING + kept
        self.refused = self.refused * FADING + refused


@dataclass
class DraftLength:
    """`most`: the longest draft; `is_fixed`: always that many.

    Expected tokens of a step with γ drafted and each accepted with probability α are (1 − α^(γ+1)) / (1 − α) (Leviathan et
    al., arXiv 2211.17192); the γ with most of them per second is chosen, 0 being plain decoding.
    """

    most: int
    is_fixed: bool = False
    records: dict[int, Record] = field(default_factory=lambda: defaultdict(Record))
    seconds: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    """Seconds of a step by its rows, and by the tokens in it of all rows."""
    seen: dict[tuple[int, int], int] = field(default_factory=dict)
    """Number of the last step of so many rows and tokens."""
    steps: int = 0
    draft_s: float = 0.0
    """Seconds to draft a token."""
    drafted: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """By kind, number of the last step with a draft of it."""

    def choose(self, kind: int, rows: int = 1) -> int:
        """Tokens to draft of this kind, at most, for each of so many rows."""
        if self.is_fixed:
            return self.most
        if self.seconds[rows] and rows not in self.seconds[rows]:
            return 0  # all else is held against a plain step: one is due
        rate, plain = self.records[kind].rate, self.cost(rows, rows)
        best, paying = 1 / plain, 0
        for count in range(1, self.most + 1):
            speed = expected(rate, count) / (self.cost(rows * (1 + count), rows) + count * self.draft_s)
            if speed > best:
                best, paying = speed, count
        if paying == 0 and self.steps - self.drafted[kind] >= RETRY:
            return 1
        return paying

    def cost(self, count: int, rows: int = 1) -> float:
        """Seconds of a step of `count` tokens in so many rows, between and beyond what was measured."""
        seconds = self.seconds[rows]
        known = sorted(seconds)
        if not known:
            return 1 + FIRST_SLOPE * (count - 1)
        if count in seconds:
            return seconds[count]
        below = max((n for n in known if n < count), default=None)
        above = min((n for n in known if n > count), default=None)
        if below is not None and above is not None:
            share = (count - below) / (above - below)
            return seconds[below] * (1 - share) + seconds[above] * share
        nearest = above if below is None else below
        assert nearest is not None
        return seconds[nearest] * (1 + FIRST_SLOPE * (count - 1)) / (1 + FIRST_SLOPE * (nearest - 1))

    def saw(self, drafts: Sequence[tuple[int, int, int]], seconds: float, draft_s: float = 0.0) -> None:
        """A step: each row's kind, tokens drafted and tokens kept; how long it took, and how long drafting for it."""
        longest, tokens = max(drafted for _, drafted, _ in drafts), sum(1 + drafted for _, drafted, _ in drafts)
        self._measured(len(drafts), tokens, seconds)
        for kind, drafted, kept in drafts:
            if drafted:
                self.drafted[kind] = self.steps
                self.records[kind].add(kept, int(kept < drafted))
        if longest:
            self.draft_s += NEWEST * (draft_s / longest - self.draft_s)

    def _measured(self, rows: int, tokens: int, seconds: float) -> None:
        known, self.steps = self.seconds[rows], self.steps + 1
        if tokens in known:
            known[tokens] += NEWEST * (seconds - known[tokens])
        else:
            known[tokens] = min(seconds, SURPRISE * self.cost(tokens, rows)) if known else seconds
        self.seen[rows, tokens] = self.steps
        for old in [size for size in known if self.steps - self.seen[rows, size] > FORGOTTEN]:
            del known[old]


def expected(rate: float, count: int) -> float:
    """Tokens of a step that verifies `count` drafted ones, each accepted with probability `rate` < 1 if all before it were."""
    return (1 - rate ** (count + 1)) / (1 - rate)
