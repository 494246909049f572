"""Warm-up: until the last iterations show no trend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infopt.stats import t_quantile

WINDOW = 5
CAP = 20
LATER = 1
"""Iterations of every block but an arm's first, whose warm-up already brought caches and clocks to rest."""


def slope_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Least-squares slope per iteration with its t interval. Needs 3 values or more."""
    n = len(values)
    centre, mean = (n - 1) / 2, math.fsum(values) / n
    spread = math.fsum((i - centre) ** 2 for i in range(n))
    slope = math.fsum((i - centre) * (value - mean) for i, value in enumerate(values)) / spread
    residual = math.fsum((value - mean - slope * (i - centre)) ** 2 for i, value in enumerate(values))
    half = t_quantile((1 + level) / 2, n - 2) * math.sqrt(residual / (n - 2) / spread)
    return slope - half, slope + half


def is_steady(values: Sequence[float]) -> bool:
    """True when the slope over the last five values cannot be told from 0."""
    if len(values) < WINDOW:
        return False
    low, high = slope_interval(values[-WINDOW:])
    return low <= 0 <= high


@dataclass(frozen=True)
class Warmup:
    iterations: int
    is_steady: bool
    """False when the cap ended it: a warning."""


def warm_up(iterate: Callable[[], float], *, is_first_block: bool, cap: int = CAP, later: int = LATER) -> Warmup:
    """Calls `iterate`, which returns its seconds, until steady or `cap`; exactly `later` times in later blocks."""
    if not is_first_block:
        for _ in range(later):
            iterate()
        return Warmup(later, True)
    seconds: list[float] = []
    while len(seconds) < cap:
        seconds.append(iterate())
        if is_steady(seconds):
            return Warmup(len(seconds), True)
    return Warmup(len(seconds), False)
