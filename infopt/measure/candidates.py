"""What several candidates cost against one: both answer the same prompts in this process, in turns, so that a machine that
slows down or speeds up meanwhile does so for both."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from infopt.measure.clock import Clock
from infopt.measure.value import value
from infopt.protocols import Engine, Request
from infopt.result import Value

KEY = "candidates_cost_ratio"


def not_asked() -> Value:
    return value(KEY, None, reason="the recipe draws 1 candidate")


def cost_ratio(many: Engine, one: Engine, batches: Sequence[Sequence[Request]], clock: Clock) -> Value:
    """Seconds of `many`'s requests ÷ seconds of `one`'s: the median over `batches`, one or more. Null where either fails.

    Each batch is answered many, one, one, many; `one` is warmed on the first before. `many` is taken to be warm.
    """
    try:
        _seconds(one, batches[0], clock)
        ratios = [_ratio(many, one, batch, clock) for batch in batches]
    except Exception as problem:  # a request that fails costs this figure, not the others
        return value(KEY, None, reason=f"{type(problem).__name__}: {problem}".split("\n")[0])
    return value(KEY, median(ratios), samples=len(ratios))


def _ratio(many: Engine, one: Engine, batch: Sequence[Request], clock: Clock) -> float:
    before, first, second, after = (_seconds(engine, batch, clock) for engine in (many, one, one, many))
    return (before + after) / (first + second)


def _seconds(engine: Engine, batch: Sequence[Request], clock: Clock) -> float:
    """Submission to the last token of the last row."""
    clock.synchronise()
    return engine.generate(batch).emission_s[-1]
