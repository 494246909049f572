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


def resolution(key: str, mde: float | None, tau: float | None, pairs_needed: int | None) -> Check | None:
    """`mde` and `tau` are shares of the baseline; a threshold of 0 has no resolution to reach."""
    if mde is None or not tau or mde <= abs(tau):
        return None
    step = f"use about {pairs_needed} pairs, or a quieter machine" if pairs_needed else "use a quieter machine"
    message = (
        f"{key}: the smallest change seen reliably is {units.percent(mde)}, above the threshold of {units.percent(abs(tau))}"
    )
    return Check(level="warning", message=message, next_step=step)


def cache_fit(weights_bytes: int | None, last_level_cache_bytes: int | None) -> Check | None:
    """Weights that stay in the last-level cache are not read from memory at each step."""
    if weights_bytes is None or last_level_cache_bytes is None or weights_bytes > last_level_cache_bytes:
        return None
    return Check(
        level="note",
        message=f"the weights ({units.size(weights_bytes)}) fit in the last-level cache "
        f"({units.size(last_level_cache_bytes)}), so the memory limit does not hold and mbu is not given",
        next_step="measure a larger model to learn about memory bandwidth",
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


def aa_noise(key: str, log_ratio_sd: float | None, tau: float) -> Check | None:
    """A stored comparison decides only beyond twice the A/A standard deviation; above `tau` it cannot PASS."""
    if log_ratio_sd is None:
        text = f"{key}: no A/A self-test, so this run cannot serve as a stored baseline"
        return Check(level="note", message=text, next_step="run the bench with its A/A self-test")
    if tau <= 0 or 2 * log_ratio_sd <= tau:
        return None
    sd, threshold = units.percent(log_ratio_sd), units.percent(tau)
    text = f"{key}: the same code differs from itself by {sd} (sd), so stored runs cannot show {threshold}"
    return Check(level="warning", message=text, next_step="compare live, with interleaved pairs")


def undefined_tpot(undefined: int, requests: int) -> Check | None:
    """Time per output token needs at least two tokens."""
    if not undefined:
        return None
    text = f"tpot_s is undefined for {undefined} of {requests} requests: they gave at most one token"
    level: Literal["note", "warning"] = "warning" if undefined == requests else "note"
    return Check(level=level, message=text, next_step="ask for at least 2 new tokens")
