"""Judges: each turns one kind of evidence into a `Judgement`.

    judge_paired     blocks of two arms that ran side by side        time, energy
    judge_tail       the same, for percentiles over requests         ttft_s.p95
    judge_stored     blocks of two stored runs                       time, energy
    judge_point      two numbers without noise                       memory
    judge_absolute   one number with its interval                    quality
    judge_accuracy   the same items on both arms                     task scores, pass rates

Judging is pure: the same numbers at another `alpha` give the verdict at that level, which is how `apply_holm` and
sequential looks use it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from infopt import figures, units
from infopt.gates import Gate
from infopt.judgement import DEFAULT_ALPHA, Judgement, Verdict, judgement, three_way, undecided
from infopt.shares import ShareDifference, share_interval
from infopt.stats import (
    POWER,
    Interval,
    PairedEffect,
    bootstrap_tail,
    min_pairs,
    normal_p,
    normal_quantile,
    paired_effect,
    percentile,
    repeats_needed,
    unpaired_log_ratio,
)

T = TypeVar("T")
DEFAULT_MARGIN = 0.02
"""Largest drop of a task's share that counts as no loss: 2 points."""
_FAR = 2.0
"""A figure of quality without an interval is decided only at twice its limit, or at half of it."""
_NO_INTERVAL = "no interval: another text could give another side of the limit; gate a mean over several windows"
_ROUNDING = 1e-9
"""Slack of point tests, so that 103 is not "more than 3 %" above 100 in binary."""


# --- Ratios to the baseline ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Harm:
    """Evidence about a harm, as a log-ratio that is positive when the candidate is worse."""

    log: Interval
    mde: float | None
    p: float | None = None
    pairs: int | None = None
    pairs_needed: int | None = None
    alpha: float | None = None
    blind: str = ""
    """What to say when there is no interval, and what to do when the threshold is below the minimum detectable effect."""


def judge_paired(
    key: str,
    baseline_values: Sequence[float | None],
    candidate_values: Sequence[float | None],
    gate: Gate | None = None,
    alpha: float = DEFAULT_ALPHA,
) -> Judgement:
    """Blocks of two arms that ran side by side, one pair per index; pairs with a missing value are left out.

    A `max` or `min` gate is judged on the candidate's blocks alone.
    """
    both = [(b, c) for b, c in zip(baseline_values, candidate_values, strict=True) if b is not None and c is not None]
    if not both:
        return undecided(key, gate, "no pair of blocks has this figure")
    if min(map(min, both)) <= 0:
        return undecided(key, gate, "a block's value is 0 or less, so it has no ratio")
    baseline, candidate = [b for b, _ in both], [c for _, c in both]
    if gate is not None and gate.is_absolute:
        return _judge_level(key, gate, baseline, candidate, alpha)
    effect = paired_effect(*_worse_last(key, baseline, candidate), alpha)
    limit = _log_limit(key, gate)
    needed = effect.pairs_needed(limit)
    harm = _Harm(effect.log, effect.mde, effect.p_value(limit), effect.pairs, needed, alpha, _few(effect.pairs, alpha))
    missing = len(baseline_values) - len(both)
    note = f"{missing} of {len(baseline_values)} pairs lack this figure" if missing else None
    return _judge_harm(key, gate, harm, percentile(baseline, 50), percentile(candidate, 50), note)


def judge_tail(
    key: str,
    baseline_blocks: Sequence[Sequence[float]],
    candidate_blocks: Sequence[Sequence[float]],
    gate: Gate | None = None,
    alpha: float = DEFAULT_ALPHA,
    seed: int = 0,
) -> Judgement:
    """A percentile such as `ttft_s.p95` over pooled requests; whole rounds of blocks are bootstrapped. Needs `.pNN`."""
    percent = float(str(figures.find(key)[1]).removeprefix("p"))
    both = [(b, c) for b, c in zip(baseline_blocks, candidate_blocks, strict=True) if len(b) and len(c)]
    if not both:
        return undecided(key, gate, "no pair of blocks has this figure")
    arms = [b for b, _ in both], [c for _, c in both]
    if min(min(block) for arm in arms for block in arm) <= 0:
        return undecided(key, gate, "a request's value is 0 or less, so it has no ratio")
    baseline, candidate = (percentile([value for block in arm for value in block], percent) for arm in arms)
    is_enough = len(both) >= min_pairs(alpha)
    if gate is not None and gate.is_absolute:
        level = bootstrap_tail(arms[1:], percent, seed)
        log = level.interval(alpha) if is_enough else Interval(level.estimate)
        return _judge_limit(key, gate, log.exp(), level.p_value(_log(gate.limit)), alpha, baseline, _few(len(both), alpha))
    tail, limit = bootstrap_tail(_worse_last(key, *arms), percent, seed), _log_limit(key, gate)
    log = tail.interval(alpha) if is_enough else Interval(tail.estimate)
    mde = needed = None
    if log.low is not None and log.high is not None:
        mde = (log.high - log.low) / 2 + normal_quantile(POWER) * tail.standard_error
        needed = repeats_needed(len(both), mde / abs(limit)) if limit else None
    harm = _Harm(log, mde, tail.p_value(limit), len(both), needed, alpha, _few(len(both), alpha))
    return _judge_harm(key, gate, harm, baseline, candidate)


def judge_stored(
    key: str,
    baseline_values: Sequence[float | None],
    candidate_values: Sequence[float | None],
    gate: Gate | None = None,
    noise_sd: float | None = None,
    alpha: float = DEFAULT_ALPHA,
) -> Judgement:
    """Blocks of two stored runs, which are not paired: decided only when the effect clears τ by more than twice
    `noise_sd`, the standard deviation of the log-ratio in the baseline's stored A/A self-test.

    `alpha` serves `max` and `min` gates, which are judged on the candidate's blocks alone.
    """
    baseline = [value for value in baseline_values if value is not None]
    candidate = [value for value in candidate_values if value is not None]
    if not candidate or not (baseline or (gate is not None and gate.is_absolute)):
        return undecided(key, gate, f"the {'baseline' if candidate else 'candidate'} has no value")
    if min(*baseline, *candidate, math.inf) <= 0:
        return undecided(key, gate, "a block's value is 0 or less, so it has no ratio")
    if gate is not None and gate.is_absolute:
        return _judge_level(key, gate, baseline, candidate, alpha)
    shift = unpaired_log_ratio(*_worse_last(key, baseline, candidate))
    reach = None if noise_sd is None else 2 * noise_sd
    log = Interval(shift) if reach is None else Interval(shift, shift - reach, shift + reach)
    blind = "the baseline holds no A/A self-test, so its noise is unknown; compare live" if reach is None else "compare live"
    return _judge_harm(key, gate, _Harm(log, reach, blind=blind), percentile(baseline, 50), percentile(candidate, 50))


def judge_point(key: str, baseline: float | None, candidate: float | None, gate: Gate | None = None) -> Judgement:
    """A figure without noise, such as bytes: the values themselves against τ. A gain no larger than τ is a PASS."""
    if gate is not None and gate.is_absolute:
        return judge_absolute(key, candidate, None, None, gate, baseline=baseline)
    if baseline is None or candidate is None:
        lacking = "baseline" if baseline is None else "candidate"
        return undecided(key, gate, f"the {lacking} has no value", baseline=baseline, candidate=candidate)
    if baseline <= 0:
        return undecided(key, gate, "the baseline is 0, so there is no ratio to it", baseline=baseline, candidate=candidate)
    tau, ratio = _tau(key, gate), candidate / baseline
    harm = ratio - 1 if figures.find(key)[0].better == "lower" else 1 - ratio
    is_gain = tau < 0 or harm < -tau - _ROUNDING
    verdict = Verdict.FAIL if harm > tau + _ROUNDING else Verdict.IMPROVED if is_gain else Verdict.PASS
    return judgement(key, gate, verdict, baseline=baseline, candidate=candidate, effect=ratio, tau=tau)


def _judge_harm(
    key: str, gate: Gate | None, harm: _Harm, baseline: float | None, candidate: float | None, note: str | None = None
) -> Judgement:
    limit, tau = _log_limit(key, gate), _tau(key, gate)
    is_lower_better = figures.find(key)[0].better == "lower"
    ratio = (harm.log if is_lower_better else -harm.log).exp()
    notes = [note] if note else []
    verdict = three_way(harm.log, limit)
    if harm.log.low is None:
        notes.append(harm.blind)
    elif verdict in (Verdict.PASS, Verdict.INCONCLUSIVE) and (harm.mde or 0) > abs(limit) > 0:
        what = harm.blind if harm.pairs is None else "no practical number of pairs would do"
        what = f"needs about {harm.pairs_needed} pairs" if harm.pairs_needed else what
        notes.append(f"this machine cannot see {units.percent(abs(tau))}; {what}")
    mde = None if harm.mde is None else math.expm1(harm.mde) if is_lower_better else -math.expm1(-harm.mde)
    return judgement(
        key,
        gate,
        verdict,
        baseline=baseline,
        candidate=candidate,
        effect=ratio.estimate,
        low=ratio.low,
        high=ratio.high,
        alpha=harm.alpha,
        p=harm.p,
        pairs=harm.pairs,
        pairs_needed=harm.pairs_needed,
        mde=mde,
        tau=tau,
        note="; ".join(notes) or None,
    )


def _worse_last(key: str, baseline: T, candidate: T) -> tuple[T, T]:
    """The arms such that second ÷ first is above 1 when the candidate is worse."""
    return (baseline, candidate) if figures.find(key)[0].better == "lower" else (candidate, baseline)


def _tau(key: str, gate: Gate | None) -> float:
    return figures.DEFAULT_THRESHOLD[figures.find(key)[0].kind] if gate is None else gate.tau


def _log_limit(key: str, gate: Gate | None) -> float:
    """The harm, as a log-ratio, at τ: 1.03 × the seconds or 0.97 × the tokens per second for 3 %."""
    tau = _tau(key, gate)
    return math.log1p(tau) if figures.find(key)[0].better == "lower" else -math.log1p(-tau)


def _few(pairs: int, alpha: float) -> str:
    return f"{pairs} pairs cannot reach significance {alpha:.2g}; needs at least {min_pairs(alpha)}"


# --- Limits and shares -----------------------------------------------------------------------------------------------


def judge_absolute(
    key: str,
    value: float | None,
    low: float | None,
    high: float | None,
    gate: Gate | None,
    alpha: float = DEFAULT_ALPHA,
    *,
    baseline: float | None = None,
    reason: str | None = None,
) -> Judgement:
    """A figure of the candidate with its 95 % interval, or without one as a point, against `max`, `min` or `max_drop`.
    Quality always depends on the text: without an interval it is decided only far from the limit.

    For another `alpha` each side of the interval is scaled by the ratio of normal quantiles. `max_drop` takes the
    baseline's value as exact; two measured shares go to `judge_accuracy`. `reason` says why `value` is null.
    """
    if value is None:
        return undecided(key, gate, reason or "the candidate has no value", baseline=baseline)
    if gate is None:
        bounds = {"low": low, "high": high, "alpha": None if low is None else DEFAULT_ALPHA}
        return judgement(key, gate, None, comparison="value", baseline=baseline, candidate=value, effect=value, **bounds)
    if gate.condition == "max_drop" and baseline is None:
        return undecided(key, gate, "the baseline has no value", candidate=value)
    if low is None or high is None:
        is_exact = figures.find(key)[0].kind != "quality" or _is_far(value, _limit(gate, baseline))
        found = _judge_limit(key, gate, Interval(value, value, value), None, alpha, baseline)
        return found if is_exact else found.model_copy(update={"verdict": Verdict.INCONCLUSIVE, "note": _NO_INTERVAL})
    quantile = normal_quantile(1 - DEFAULT_ALPHA / 2)
    scale = normal_quantile(1 - alpha / 2) / quantile
    limit = _limit(gate, baseline)
    side = high - value if limit > value else value - low
    p = normal_p((limit - value) / side * quantile) if side > 0 else float(limit == value)
    return _judge_limit(
        key, gate, Interval(value, value - (value - low) * scale, value + (high - value) * scale), p, alpha, baseline
    )


def judge_accuracy(
    key: str, both_right: int, broken: int, fixed: int, total: int, gate: Gate | None = None, alpha: float = DEFAULT_ALPHA
) -> Judgement:
    """Non-inferiority of a share of right items, from the same items on both arms (default margin 2 points).

    FAIL when the whole interval of the drop is above the margin; PASS and IMPROVED are refused while the minimum
    detectable effect exceeds the margin: so few items could not have shown the loss.
    """
    if not total:
        return undecided(key, gate, "no item was scored")
    change = ShareDifference(broken, fixed, total, alpha)
    before, after = (both_right + broken) / total, (both_right + fixed) / total
    if gate is not None and gate.is_absolute:
        level = share_interval(both_right + fixed, total)
        return judge_absolute(key, after, level.low, level.high, gate, alpha, baseline=before)
    margin, interval = DEFAULT_MARGIN if gate is None else gate.limit, change.interval
    verdict, note = three_way(-interval, margin), None
    if change.mde > margin:
        items = repeats_needed(total, change.mde / margin) if margin else None
        needs = f"; needs about {items} items" if items else ""
        note = f"{total} items cannot show a drop of {units.percent(margin)}{needs}"
        verdict = verdict if verdict is Verdict.FAIL else Verdict.INCONCLUSIVE
    return judgement(
        key, gate, verdict, comparison="difference", baseline=before, candidate=after, effect=interval.estimate,
        low=interval.low, high=interval.high, alpha=alpha, p=change.p_value(-margin), mde=change.mde, tau=margin, note=note,
    )  # fmt: skip


def _is_far(value: float, limit: float) -> bool:
    """Whether a number without an interval lies a factor of two or more from a limit above 0."""
    return limit > 0 and not limit / _FAR < value < limit * _FAR


def _judge_level(key: str, gate: Gate, baseline: Sequence[float], candidate: Sequence[float], alpha: float) -> Judgement:
    """The candidate's own blocks (> 0), in logs, against `max` or `min`."""
    level = PairedEffect(tuple(map(math.log, candidate)), alpha)
    blind = _few(level.pairs, alpha).replace("pairs", "blocks")
    return _judge_limit(key, gate, level.ratio, level.p_value(_log(gate.limit)), alpha, percentile(baseline, 50), blind)


def _judge_limit(
    key: str, gate: Gate, level: Interval, p: float | None, alpha: float, baseline: float | None, blind: str | None = None
) -> Judgement:
    """`level` against the gate's limit; a point has bounds equal to it and no `p`."""
    limit = _limit(gate, baseline)
    verdict = three_way(level, limit) if gate.condition == "max" else three_way(-level, -limit)
    verdict = Verdict.PASS if verdict is Verdict.IMPROVED else verdict
    note = blind if level.low is None else None
    low, high = (None, None) if p is None else (level.low, level.high)
    shared: dict[str, Any] = {"baseline": baseline, "candidate": level.estimate, "p": p, "note": note}
    shared["alpha"] = None if p is None else alpha
    if gate.condition != "max_drop" or baseline is None:
        return judgement(key, gate, verdict, comparison="value", effect=level.estimate, low=low, high=high, tau=limit, **shared)
    drop = [None if end is None else end - baseline for end in (level.estimate, low, high)]
    shared |= {"effect": drop[0], "low": drop[1], "high": drop[2], "tau": gate.limit}
    return judgement(key, gate, verdict, comparison="difference", **shared)


def _limit(gate: Gate, baseline: float | None) -> float:
    return gate.limit if gate.condition != "max_drop" or baseline is None else baseline - gate.limit - _ROUNDING


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
