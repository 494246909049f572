"""Shares of items: one share, and two arms' shares on the same items (accuracy, pass rates), with exact or score methods.

Two arms are compared by the items that changed: `broken` (right before, wrong now) and `fixed` (the other way round).
Equal accuracy can hide many of both (arXiv 2407.09141).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from infopt.stats import POWER, Interval, normal_p, normal_quantile


def mcnemar_p(broken: int, fixed: int) -> float:
    """Exact two-sided McNemar p: the discordant items as fair coin flips (binomial, doubled tail)."""
    flips = broken + fixed
    tail = sum(math.comb(flips, i) for i in range(min(broken, fixed) + 1))
    return min(1.0, float(2 * tail / 2**flips))


@dataclass(frozen=True)
class ShareDifference:
    """Candidate share − reference share on the same items, with `broken` and `fixed` the items that changed.

    Interval: Bonett & Price 2012 (doi:10.1111/j.2044-8317.2011.02012.x), Wald with one item added to each discordant
    cell, so that no flips at all does not read as certainty.
    """

    broken: int
    fixed: int
    total: int
    alpha: float

    @property
    def _adjusted(self) -> tuple[float, float]:
        """Centre and standard error."""
        n = self.total + 2
        lost, won = (self.broken + 1) / n, (self.fixed + 1) / n
        return won - lost, math.sqrt((won + lost - (won - lost) ** 2) / n)

    @property
    def interval(self) -> Interval:
        centre, error = self._adjusted
        half = normal_quantile(1 - self.alpha / 2) * error
        return Interval((self.fixed - self.broken) / self.total, max(-1.0, centre - half), min(1.0, centre + half), self.alpha)

    @property
    def mde(self) -> float:
        """Difference found with 80 % power: (z + 0.84)·√(flips/n). Fewer than 3 flips count as 3 (rule of three)."""
        quantiles = normal_quantile(1 - self.alpha / 2) + normal_quantile(POWER)
        return quantiles * math.sqrt(max(self.broken + self.fixed, 3)) / self.total

    def p_value(self, difference: float) -> float:
        """Two-sided p for "the true difference is `difference`", dual to the interval."""
        centre, error = self._adjusted
        return normal_p((centre - difference) / error)


def retention(broken: int, fixed: int, correct_reference: int, total: int, floor: float, alpha: float = 0.05) -> Interval | None:
    """(candidate's share right − `floor`) ÷ (the reference's − `floor`), on the same items; None where the reference has no lead.

    Interval: Fieller 1954 (the values r at which the paired mean of candidate − floor − r·(reference − floor) is compatible with
    0), without bounds where the reference's lead itself may be nothing.
    """
    lead, left = (right / total - floor for right in (correct_reference, correct_reference - broken + fixed))
    if lead <= 0:
        return None
    # An item more in each discordant cell, as for differences, so that no flips at all do not read as certainty.
    count, both = total + 2, correct_reference - broken
    old, new = (correct_reference + 1) / count, (both + fixed + 1) / count
    square = normal_quantile(1 - alpha / 2) ** 2 / count
    v_old, v_new, joint = square * old * (1 - old), square * new * (1 - new), square * (both / count - old * new)
    a, b, c = (old - floor) ** 2 - v_old, (old - floor) * (new - floor) - joint, (new - floor) ** 2 - v_new
    if a <= 0:
        return Interval(left / lead)
    half = math.sqrt(max(0.0, b**2 - a * c))
    return Interval(left / lead, (b - half) / a, (b + half) / a, alpha)


def share_interval(successes: int, total: int, alpha: float = 0.05) -> Interval:
    """Wilson's score interval of a share. Raises ValueError for no items."""
    if total < 1:
        raise ValueError("a share needs at least one item")
    z, share = normal_quantile(1 - alpha / 2), successes / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), alpha)
