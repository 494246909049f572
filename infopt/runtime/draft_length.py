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
    seconds: dict[int, float] = field(default_factory=dict)
    """Seconds of a step by the tokens in it, of all rows."""
    draft_s: float = 0.0
    """Seconds to draft a token."""
    since: int = 0
    """Steps since something was drafted."""

    def choose(self, kind: int, rows: int = 1) -> int:
        """Tokens to draft of this kind, at most, for each of so many rows."""
        if self.is_fixed:
            return self.most
        rate, plain = self.records[kind].rate, self.cost(rows)
        best, paying = 1 / plain, 0
        for count in range(1, self.most + 1):
            speed = expected(rate, count) / (self.cost(rows * (1 + count)) + count * self.draft_s)
            if speed > best:
                best, paying = speed, count
        if paying == 0 and self.since >= RETRY:
            return 1
        return paying

    def cost(self, count: int) -> float:
        """Seconds of a step of `count` tokens, between and beyond what was measured."""
        known = sorted(self.seconds)
        if not known:
            return 1 + FIRST_SLOPE * (count - 1)
        if count in self.seconds:
            return self.seconds[count]
        below = max((n for n in known if n < count), default=None)
        above = min((n for n in known if n > count), default=None)
        if below is not None and above is not None:
            share = (count - below) / (above - below)
            return self.seconds[below] * (1 - share) + self.seconds[above] * share
        nearest = above if below is None else below
        assert nearest is not None
        return self.seconds[nearest] * (1 + FIRST_SLOPE * (count - 1)) / (1 + FIRST_SLOPE * (nearest - 1))

    def saw(self, drafts: Sequence[tuple[int, int, int]], seconds: float, draft_s: float = 0.0) -> None:
        """A step: each row's kind, tokens drafted and tokens kept; how long it took, and how long drafting for it."""
        longest, tokens = max(drafted for _, drafted, _ in drafts), sum(1 + drafted for _, drafted, _ in drafts)
        self.since = 0 if longest else self.since + 1
        before = self.seconds.get(tokens)
        self.seconds[tokens] = seconds if before is None else before + NEWEST * (seconds - before)
        for kind, drafted, kept in drafts:
            if drafted:
                self.records[kind].add(kept, int(kept < drafted))
        if longest:
            self.draft_s += NEWEST * (draft_s / longest - self.draft_s)


def expected(rate: float, count: int) -> float:
    """Tokens of a step that verifies `count` drafted ones, each accepted with probability `rate` < 1 if all before it were."""
    return (1 - rate ** (count + 1)) / (1 - rate)
