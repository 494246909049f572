"""Figures of the catalogue as result records: never NaN or infinite, and a null always says why."""

from __future__ import annotations

import math

from infopt.figures import find
from infopt.result import Value
from infopt.stats import Interval


def figure_value(
    key: str, number: float | None, samples: int, *, interval: Interval | None = None, reason: str | None = None
) -> tuple[str, Value]:
    """(key, record) of the figure `key`; `reason` is kept only where `number` is missing or not finite."""
    figure, _ = find(key)
    if number is None or not math.isfinite(number):
        return key, Value(value=None, unit=figure.unit, id=figure.id, samples=samples, reason=reason or f"not finite ({number})")
    low, high = (interval.low, interval.high) if interval else (None, None)
    return key, Value(value=number, unit=figure.unit, id=figure.id, samples=samples, low=_finite(low), high=_finite(high))


def _finite(bound: float | None) -> float | None:
    return bound if bound is not None and math.isfinite(bound) else None
