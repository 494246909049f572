"""Warnings about weak measurements, as data: what is weak, and what to do next.

Each check takes numbers or records and returns a `Check`, or None when all is well; `found` drops the Nones.
Nothing is removed as an outlier: a weak measurement is shown, with its weakness beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from infopt import units
from infopt.result import Block, Record
from infopt.stats import min_pairs

OTHER_CPU_LIMIT_CORES = 0.15
"""Foreign CPU time beside a block above which the block is flagged."""
GATE_PAIRS = 20
"""Pairs that a gate should rest on."""


class Check(Record):
    """`note`: worth knowing. `warning`: a figure may mislead."""

    level: Literal["note", "warning"]
    message: str
    next_step: str


def found(checks: Iterable[Check | None]) -> tuple[Check, ...]:
    """The checks that have something to say."""
    return tuple(check for check in checks if check is not None)


def other_load(blocks: Sequence[Block]) -> Check | None:
    """`blocks`: those whose values are used. Blocks without a reading of the other processes are not judged."""
    loads = [block.other_cpu_cores for block in blocks if block.other_cpu_cores is not None]
    loaded = [load for load in loads if load > OTHER_CPU_LIMIT_CORES]
    if not loaded:
        return None
    text = f"other processes took up to {units.significant(max(loaded), 2)} cores during {len(loaded)} of {len(loads)} blocks"
    return Check(
        level="warning", message=f"{text} (limit {OTHER_CPU_LIMIT_CORES})", next_step="stop other work and measure again"
    )


def warm_up(reached_cap: bool, iterations: int) -> Check | None:
    """`reached_cap`: warm-up ended without five iterations in a row that show no trend."""
    if not reached_cap:
        return None
    return Check(
        level="warning",
        message=f"warm-up stopped at its cap of {iterations} iterations while the times still showed a trend",
        next_step="raise the warm-up cap, or look for throttling",
    )


def few_pairs(pairs: int, alpha: float, is_gated: bool) -> Check | None:
    """Too few pairs for any verdict at `alpha`, or fewer than a gate should rest on."""
    least = min_pairs(alpha)
    if pairs < least:
        text = f"{pairs} pairs can never reach significance {alpha:.2g}, so every timing verdict is inconclusive"
        return Check(level="warning", message=text, next_step=f"use at least {least} pairs")
    if is_gated and pairs < GATE_PAIRS:
        return Check(level="note", message=f"gates rest on {pairs} pairs", next_step=f"use {GATE_PAIRS} pairs for a gate")
    return None


def undefined_tpot(undefined: int, requests: int) -> Check | None:
    """Time per output token needs at least two tokens."""
    if not undefined:
        return None
    text = f"tpot_s is undefined for {undefined} of {requests} requests: they gave at most one token"
    level: Literal["note", "warning"] = "warning" if undefined == requests else "note"
    return Check(level=level, message=text, next_step="ask for at least 2 new tokens")
