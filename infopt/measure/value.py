"""Figures as the result stores them: a number with unit and definition, or nothing with a reason."""

from __future__ import annotations

from collections.abc import Sequence

from infopt import figures, stats
from infopt.result import Value


def value(key: str, number: float | None, *, reason: str | None = None, samples: int | None = None) -> Value:
    """The figure `key` with its unit and id. `reason` is kept only when there is no number. Raises InputError."""
    figure, _ = figures.find(key)
    if number is None:
        return Value(value=None, unit=figure.unit, id=figure.id, samples=samples, reason=reason or "not measured")
    return Value(value=number, unit=figure.unit, id=figure.id, samples=samples)


def statistics(name: str, numbers: Sequence[float], reason: str) -> dict[str, Value]:
    """Every statistic of a sampled figure, keyed `name.p50` …; all null with `reason` when there are no numbers."""
    return {
        f"{name}.{statistic}": value(
            f"{name}.{statistic}", stats.statistic(numbers, statistic), reason=reason, samples=len(numbers)
        )
        for statistic in figures.STATISTICS
    }
