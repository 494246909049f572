"""From measurements to a verdict, one figure at a time, with direction and threshold.

Harm is the change in the figure's bad direction. With its interval and the threshold τ:

    FAIL          the lower bound of harm is above τ
    PASS          the upper bound of harm is at most τ
    IMPROVED      the same, and the upper bound is below 0: wholly on the good side
    INCONCLUSIVE  otherwise: more pairs, or a quieter machine

A judgement on a declared gate decides; without a gate it informs, at the default threshold of its kind of figure.
Judging is pure: the same numbers at another `alpha` give the same figure another verdict, which is how `apply_holm`
and sequential looks use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any, Literal

from infopt import figures
from infopt.errors import Exit
from infopt.gates import Gate
from infopt.result import Record
from infopt.stats import Interval, holm_levels

DEFAULT_ALPHA = 0.05


class Verdict(StrEnum):
    PASS = "PASS"
    IMPROVED = "IMPROVED"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_COMPARABLE = "NOT_COMPARABLE"


class Judgement(Record):
    """One figure of one candidate against the baseline. What does not apply is None.

    `effect`, `low` and `high` are of the kind that `comparison` names: candidate ÷ baseline ("ratio"), candidate −
    baseline ("difference"), or the candidate itself ("value").
    """

    figure: str
    id: str
    unit: str
    gate: str | None = None
    """The condition as text; None when the judgement only informs."""
    comparison: Literal["ratio", "difference", "value"] = "ratio"
    baseline: float | None = None
    candidate: float | None = None
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    alpha: float | None = None
    """Two-sided level of the interval, after looks and Holm."""
    p: float | None = None
    """Two-sided p for "exactly at the threshold"; Holm orders the gates by it."""
    pairs: int | None = None
    pairs_needed: int | None = None
    mde: float | None = None
    """Smallest true harm that would show in 80 % of repeats: a share of the baseline for "ratio" (0.03 is 3 %)."""
    tau: float | None = None
    """Largest harm that passes, in the terms of `mde`; for "value" the limit itself."""
    verdict: Verdict | None
    """None: neither a gate nor a default threshold, so there is nothing to decide."""
    note: str | None = None


def three_way(harm: Interval, limit: float) -> Verdict:
    """The rule itself: where the interval of harm lies between 0 and `limit`."""
    if harm.low is None or harm.high is None:
        return Verdict.INCONCLUSIVE
    if harm.low > limit:
        return Verdict.FAIL
    if harm.high > limit:
        return Verdict.INCONCLUSIVE
    return Verdict.IMPROVED if harm.high < 0 else Verdict.PASS


def judgement(key: str, gate: Gate | None, verdict: Verdict | None, **fields: Any) -> Judgement:
    """A `Judgement` with the catalogue's id and unit filled in."""
    figure, _ = figures.find(key)
    text = None if gate is None else gate.text
    return Judgement(figure=key, id=figure.id, unit=figure.unit, gate=text, verdict=verdict, **fields)


def undecided(
    key: str, gate: Gate | None, reason: str, *, baseline: float | None = None, candidate: float | None = None
) -> Judgement:
    """A figure that could not be measured: INCONCLUSIVE with the reason, never PASS."""
    return judgement(key, gate, Verdict.INCONCLUSIVE, baseline=baseline, candidate=candidate, note=reason)


def not_comparable(key: str, gate: Gate | None, reason: str) -> Judgement:
    """A figure of two runs whose machine or method differ."""
    return judgement(key, gate, Verdict.NOT_COMPARABLE, note=reason)


def apply_holm(
    judges: Sequence[Callable[[float], Judgement]], alpha: float = DEFAULT_ALPHA, pending: int = 0
) -> tuple[Judgement, ...]:
    """Judges everything so that a wrong FAIL or PASS among the gates together has probability at most `alpha`.

    Each judge takes a level and returns its judgement. The m gated judgements that carry a p-value form the family, in
    Holm's order: the one with the smallest p is judged with an interval at alpha/m, the next at alpha/(m − 1), and so
    on; from the first that stays undecided the level no longer rises. Point tests and ungated figures keep `alpha`.
    `pending` gates that are still to be measured count as the last of the family: what is decided now stays decided then.
    """
    first = [judge(alpha) for judge in judges]
    family = [i for i, each in enumerate(first) if each.gate is not None and each.p is not None]
    levels = holm_levels([p for i in family if (p := first[i].p) is not None] + [1.0] * pending, alpha)
    adjusted = dict(zip(family, levels, strict=False))
    return tuple(judges[i](adjusted[i]) if adjusted.get(i, alpha) != alpha else first[i] for i in range(len(judges)))


def exit_code(judgements: Iterable[Judgement], strict: bool = False) -> Exit:
    """Not comparable beats a failed gate, which beats an inconclusive one (an error only when `strict`).

    Only gated judgements can fail or be inconclusive.
    """
    judgements = tuple(judgements)
    gated = {each.verdict for each in judgements if each.gate is not None}
    if any(each.verdict is Verdict.NOT_COMPARABLE for each in judgements):
        return Exit.NOT_COMPARABLE
    if Verdict.FAIL in gated:
        return Exit.GATE_FAILED
    return Exit.INCONCLUSIVE if strict and Verdict.INCONCLUSIVE in gated else Exit.OK
