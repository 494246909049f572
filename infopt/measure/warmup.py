"""Warm-up: until the last iterations show no trend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from infopt.settings import WARMUP_CAP, WARMUP_LATER
from infopt.stats import is_steady


@dataclass(frozen=True)
class Warmup:
    iterations: int
    is_steady: bool
    """False when the cap ended it: a warning."""


def warm_up(iterate: Callable[[], float], *, is_first_block: bool, cap: int = WARMUP_CAP, later: int = WARMUP_LATER) -> Warmup:
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
