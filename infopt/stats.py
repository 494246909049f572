"""Statistics for noisy machines: paired, rank-based and exact, in numpy alone.

The unit of replication is a block, and blocks of two arms that ran side by side form a pair. The effect of a pair is
its log-ratio; the Hodges–Lehmann estimate summarises them, and inverting the exact Wilcoxon signed-rank test gives the
interval, so one burst of foreign load moves neither far. Importing scipy.stats costs a second; it is the tests' oracle.

Every interval is two-sided: `alpha` 0.05 leaves at most 2.5 % beyond each end. A bound is None where the data are too few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
POWER = 0.8
"""Power at which a minimum detectable effect is stated."""
WARMUP_WINDOW = 5
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """`alpha` is the error level that the bounds attain (≤ the one asked for); None with the bounds."""

    estimate: float
    low: float | None = None
    high: float | None = None
    alpha: float | None = None

    def __neg__(self) -> Interval:
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Interval(-self.estimate, low, high, self.alpha)

    def exp(self) -> Interval:
        """From logs to ratios."""
        low, high = (None if end is None else math.exp(end) for end in (self.low, self.high))
        return Interval(math.exp(self.estimate), low, high, self.alpha)


# --- Description -----------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The `percent`-th percentile (0–100) by linear interpolation between order statistics; None for no values."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent)) if len(values) else None


def statistic(values: Sequence[float], name: str) -> float | None:
    """A statistic by its name in a figure's key: `mean`, `min`, `max` or `p` and a percent. None for no values."""
    if not len(values):
        return None
    if name == "mean":
        return math.fsum(values) / len(values)
    if name in ("min", "max"):
        return float(min(values) if name == "min" else max(values))
    return percentile(values, float(name.removeprefix("p")))


# --- Quantiles -------------------------------------------------------------------------------------------------------


def normal_quantile(probability: float) -> float:
    return _NORMAL.inv_cdf(probability)


def normal_p(z: float) -> float:
    """Two-sided p-value of a standard normal deviate."""
    return math.erfc(abs(z) / math.sqrt(2))


@lru_cache(maxsize=4096)
def t_quantile(probability: float, df: int) -> float:
    """Quantile of Student's t for integer `df` ≥ 1, by bisection of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    if probability < 0.5:
        return -t_quantile(1 - probability, df)
    target = 2 * probability - 1
    steps = np.arange(2, df - 1, 2) if df % 2 == 0 else np.arange(3, df - 1, 2)
    coefficients = np.concatenate([[1.0], np.cumprod((steps - 1) / steps)])
    powers = 2 * np.arange(len(coefficients)) + df % 2

    def inside(angle: float) -> float:
        series = float(np.sum(coefficients * np.cos(angle) ** powers)) * math.sin(angle) if df > 1 else 0.0
        return series if df % 2 == 0 else 2 / math.pi * (angle + series)

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < target else (low, middle)
    return math.sqrt(df) * math.tan(low)


# --- Signed ranks ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def signed_rank_cdf(n: int) -> Array:
    """P(T ≤ t) for t = 0 … n(n+1)/2, T the Wilcoxon signed-rank sum of n differences when none has an effect.

    Exact: each rank 1 … n joins the sum with probability ½, one rank at a time.
    """
    density = np.zeros(n * (n + 1) // 2 + 1)
    density[0] = 1.0
    for rank in range(1, n + 1):
        density[rank:] = (density[rank:] + density[:-rank]) / 2
        density[:rank] /= 2
    return np.cumsum(density)


@lru_cache(maxsize=256)
def _upper_triangle(n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    rows, columns = np.triu_indices(n)
    return rows, columns


def walsh_averages(differences: Sequence[float] | Array) -> Array:
    """Sorted means of every pair of differences, each with itself included: n(n+1)/2 of them."""
    values = np.asarray(differences, dtype=np.float64)
    rows, columns = _upper_triangle(len(values))
    return np.sort((values[rows] + values[columns]) / 2)


def hodges_lehmann(differences: Sequence[float] | Array) -> float:
    """Median of the Walsh averages. Raises ValueError for no differences."""
    if not len(differences):
        raise ValueError("Hodges–Lehmann needs at least one difference")
    return float(np.median(walsh_averages(differences)))


def _rank_interval(walsh: Array, n: int, alpha: float) -> Interval:
    cdf = signed_rank_cdf(n)
    # The k-th smallest and k-th largest average exclude the values that a test with rejection region T ≤ k − 1 rejects.
    k = int(np.searchsorted(cdf, alpha / 2 * (1 + 1e-12), side="right"))
    if k == 0:
        return Interval(float(np.median(walsh)))
    return Interval(float(np.median(walsh)), float(walsh[k - 1]), float(walsh[-k]), float(2 * cdf[k - 1]))


def signed_rank_interval(differences: Sequence[float] | Array, alpha: float) -> Interval:
    """Hodges–Lehmann estimate and the interval of all shifts that the exact signed-rank test does not reject.

    Raises ValueError for no differences; bounds are None when `alpha` cannot be reached with so few.
    """
    if not len(differences):
        raise ValueError("an interval needs at least one difference")
    return _rank_interval(walsh_averages(differences), len(differences), alpha)


def min_pairs(alpha: float) -> int:
    """Fewest pairs whose smallest two-sided signed-rank p, 2/2ⁿ, reaches `alpha`: 6 for 0.05, 8 for 0.01."""
    return math.ceil(1 - math.log2(alpha) - 1e-12)


def repeats_needed(repeats: int, excess: float) -> int | None:
    """Repeats that shrink an effect `excess` times too wide, as √n does; None when that is more than a million."""
    needed = repeats * excess * excess
    return math.ceil(needed) if needed <= 1e6 else None


@dataclass(frozen=True)
class PairedEffect:
    """Candidate ÷ baseline from paired blocks, judged at level `alpha`. Logs are natural."""

    log_ratios: tuple[float, ...]
    alpha: float

    @cached_property
    def _walsh(self) -> Array:
        return walsh_averages(self.log_ratios)

    @property
    def pairs(self) -> int:
        return len(self.log_ratios)

    @cached_property
    def log(self) -> Interval:
        """Interval of the log-ratio."""
        return _rank_interval(self._walsh, self.pairs, self.alpha)

    @property
    def ratio(self) -> Interval:
        return self.log.exp()

    @cached_property
    def standard_error(self) -> float | None:
        """Standard error of the estimate from a central interval, so that bursts do not inflate it; None below 3 pairs."""
        central = _rank_interval(self._walsh, self.pairs, 1 / 3)
        if central.low is None or central.high is None or central.alpha is None:
            return None
        return (central.high - central.low) / 2 / normal_quantile(1 - central.alpha / 2)

    @property
    def mde(self) -> float | None:
        """Minimum detectable effect, as a log-ratio: a true change of this size leaves the interval clear of zero in
        80 % of repeats (half-width + 0.84 standard errors). None when no interval exists.
        """
        if self.log.low is None or self.log.high is None or self.standard_error is None:
            return None
        return (self.log.high - self.log.low) / 2 + normal_quantile(POWER) * self.standard_error

    def pairs_needed(self, log_tau: float) -> int | None:
        """Pairs at which the minimum detectable effect would be |log_tau|, the spread staying as observed.

        None for a threshold of 0, when the spread is unknown, or when no practical number would do.
        """
        if log_tau == 0 or self.standard_error is None:
            return None
        quantiles = normal_quantile(1 - self.alpha / 2) + normal_quantile(POWER)
        needed = repeats_needed(self.pairs, quantiles * self.standard_error / abs(log_tau))
        if needed is not None and self.mde is not None and self.mde > abs(log_tau):
            needed = max(needed, self.pairs + 1)
        return None if needed is None else max(needed, min_pairs(self.alpha))

    def p_value(self, log_tau: float) -> float:
        """Exact two-sided p for "the log-ratio is `log_tau`"; it is ≤ alpha exactly when the interval excludes it."""
        cdf = signed_rank_cdf(self.pairs)
        at_most = int(np.searchsorted(self._walsh, log_tau, side="right"))
        return min(1.0, 2 * float(min(cdf[at_most], cdf[len(self._walsh) - at_most])))


def paired_effect(baseline: Sequence[float], candidate: Sequence[float], alpha: float) -> PairedEffect:
    """The effect from block values (> 0) of two arms, one pair per index. Raises ValueError."""
    if len(baseline) != len(candidate) or not len(baseline):
        raise ValueError(f"paired blocks wanted, got {len(baseline)} and {len(candidate)}")
    if min(*baseline, *candidate) <= 0:
        raise ValueError("a log-ratio needs values above 0")
    return PairedEffect(tuple(math.log(c) - math.log(b) for b, c in zip(baseline, candidate, strict=True)), alpha)


def log_ratio_sd(baseline: Sequence[float], candidate: Sequence[float]) -> float | None:
    """Standard deviation of the paired log-ratios: the noise floor when both arms are the same. None below 2 pairs."""
    logs = paired_effect(baseline, candidate, 1.0).log_ratios
    return float(np.std(logs, ddof=1)) if len(logs) > 1 else None


def unpaired_log_ratio(baseline: Sequence[float], candidate: Sequence[float]) -> float:
    """Two-sample Hodges–Lehmann shift of the logs: the median of all candidate − baseline differences."""
    return float(np.median(np.subtract.outer(np.log(candidate), np.log(baseline))))


# --- Warm-up ---------------------------------------------------------------------------------------------------------


def trend_slope_interval(values: Sequence[float], alpha: float = 0.05) -> Interval:
    """Least-squares slope per iteration with its t interval. Raises ValueError below 3 values."""
    n = len(values)
    if n < 3:
        raise ValueError(f"a slope's interval needs at least 3 values, got {n}")
    y = np.asarray(values, dtype=np.float64)
    x = np.arange(n) - (n - 1) / 2
    slope = float(x @ y / (x @ x))
    residuals = y - y.mean() - slope * x
    half = t_quantile(1 - alpha / 2, n - 2) * math.sqrt(float(residuals @ residuals) / (n - 2) / float(x @ x))
    return Interval(slope, slope - half, slope + half, alpha)


def is_steady(values: Sequence[float]) -> bool:
    """The warm-up rule: the last five iterations show no trend, their slope's 95 % interval contains 0."""
    if len(values) < WARMUP_WINDOW:
        return False
    slope = trend_slope_interval(values[-WARMUP_WINDOW:])
    return slope.low is not None and slope.high is not None and slope.low <= 0 <= slope.high


# --- Grouped values --------------------------------------------------------------------------------------------------


def cluster_mean_interval(groups: Sequence[Sequence[float] | Array], alpha: float = 0.05) -> Interval:
    """Mean over all values, with a t interval whose variance is summed by group (CR1), df = groups − 1.

    Tokens of one window share a context, so their errors go together; a plain standard error would be too small.
    Bounds are None for a single group. Raises ValueError for no values.
    """
    filled = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not filled:
        raise ValueError("a mean needs at least one value")
    count, n = len(filled), sum(len(group) for group in filled)
    mean = math.fsum(float(group.sum()) for group in filled) / n
    if count < 2:
        return Interval(mean)
    residuals = math.fsum(float((group - mean).sum()) ** 2 for group in filled)
    half = t_quantile(1 - alpha / 2, count - 1) * math.sqrt(count / (count - 1) * residuals) / n
    return Interval(mean, mean - half, mean + half, alpha)


# --- Tails -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bootstrap:
    """A statistic and its sorted bootstrap draws."""

    estimate: float
    draws: Array

    def interval(self, alpha: float) -> Interval:
        k = math.floor((len(self.draws) + 1) * alpha / 2 * (1 + 1e-12))
        if k == 0:
            return Interval(self.estimate)
        return Interval(self.estimate, float(self.draws[k - 1]), float(self.draws[-k]), 2 * k / (len(self.draws) + 1))

    def p_value(self, value: float) -> float:
        """Two-sided p for `value`; it is ≤ alpha exactly when the interval excludes it."""
        at_most = int(np.searchsorted(self.draws, value, side="right"))
        return min(1.0, 2 * (min(at_most, len(self.draws) - at_most) + 1) / (len(self.draws) + 1))

    @property
    def standard_error(self) -> float:
        return float(np.std(self.draws, ddof=1))


def bootstrap_tail(arms: Sequence[Sequence[Sequence[float]]], percent: float, seed: int = 0, resamples: int = 3999) -> Bootstrap:
    """Log of a percentile over pooled requests; for two arms the candidate's log minus the baseline's.

    `arms`: one arm, or (baseline, candidate) with the same rounds; each arm a sequence of blocks of requests (> 0).
    Whole rounds are drawn with replacement, since requests of a block are not independent. Raises ValueError.
    """
    rounds = len(arms[0])
    if not rounds or any(len(arm) != rounds or not all(len(block) for block in arm) for arm in arms):
        raise ValueError("every arm needs the same rounds, each with at least one request")
    times = np.random.default_rng(seed).multinomial(rounds, [1 / rounds] * rounds, size=resamples)
    once = np.ones((1, rounds), dtype=times.dtype)
    estimates = [math.log(_pooled_percentiles(arm, percent, once)[0]) for arm in arms]
    draws = [np.log(_pooled_percentiles(arm, percent, times)) for arm in arms]
    if len(arms) == 1:
        return Bootstrap(estimates[0], np.sort(draws[0]))
    return Bootstrap(estimates[1] - estimates[0], np.sort(draws[1] - draws[0]))


def _pooled_percentiles(blocks: Sequence[Sequence[float]], percent: float, times: NDArray[np.int64]) -> Array:
    """Percentile of the pooled values with block b taken `times[:, b]` times: [draws]. Sorting once serves all draws."""
    values = np.concatenate([np.asarray(block, dtype=np.float64) for block in blocks])
    owner = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(times[:, owner[order]], axis=1)
    position = (reached[:, -1] - 1) * percent / 100
    below = np.floor(position)
    low = values[order][np.argmax(reached > below[:, None], axis=1)]
    high = values[order][np.argmax(reached > np.minimum(below + 1, reached[:, -1] - 1)[:, None], axis=1)]
    return np.asarray(low + (position - below) * (high - low), dtype=np.float64)


# --- Many tests ------------------------------------------------------------------------------------------------------


def holm_levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """The level at which each hypothesis is tested so that any false rejection has probability ≤ alpha (Holm 1979).

    The smallest p is tested at alpha/m, the next at alpha/(m − 1), and so on; from the first that is not rejected the
    level stays, which rejects none of the rest.
    """
    levels, level, is_open = [alpha] * len(p_values), 0.0, True
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        level = alpha / (len(p_values) - rank) if is_open else level
        levels[index] = level
        is_open = is_open and p_values[index] <= level
    return levels


@dataclass(frozen=True)
class Look:
    """Decide after `pairs` pairs, at level `alpha`."""

    pairs: int
    alpha: float


def looks(alpha: float, first_pairs: int, cap: int, step: int = 5) -> tuple[Look, ...]:
    """When to look while pairs are added, `alpha` split evenly over the looks.

    Early looks whose share of alpha so few pairs can never reach are left out; they would only dilute the others.
    """
    pairs = [*range(first_pairs, cap, step), cap]
    while len(pairs) > 1 and pairs[0] < min_pairs(alpha / len(pairs)):
        pairs.pop(0)
    return tuple(Look(count, alpha / len(pairs)) for count in pairs)
