"""Statistics against scipy, against brute force, and by their properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.shares import ShareDifference, mcnemar_p, retention, share_interval
from infopt.stats import (
    Bootstrap,
    PairedEffect,
    bootstrap_tail,
    cluster_mean_interval,
    hodges_lehmann,
    holm_levels,
    is_steady,
    log_ratio_sd,
    looks,
    min_pairs,
    paired_effect,
    percentile,
    signed_rank_cdf,
    signed_rank_interval,
    statistic,
    t_quantile,
    trend_slope_interval,
    unpaired_log_ratio,
    walsh_averages,
)

numbers = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 6))
times = st.floats(1e-4, 1e3, allow_nan=False)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# --- Description -----------------------------------------------------------------------------------------------------


def test_percentile_interpolates_linearly_and_knows_nothing_of_nothing() -> None:
    assert percentile([10, 20, 30, 40], 50) == 25
    assert percentile([10, 20], 90) == pytest.approx(19)
    assert percentile([], 50) is None
    assert [statistic([4, 1, 1], name) for name in ("mean", "min", "max", "p50")] == [2, 1, 4, 1]
    assert statistic([], "mean") is None


# --- Signed ranks ----------------------------------------------------------------------------------------------------


def test_null_distribution_equals_enumeration_of_all_signs() -> None:
    for n in (1, 2, 5, 8):
        sums = [sum(r for r, s in zip(range(1, n + 1), signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=n)]
        expected = np.cumsum(np.bincount(sums, minlength=n * (n + 1) // 2 + 1)) / 2**n
        np.testing.assert_allclose(signed_rank_cdf(n), expected, rtol=1e-12)


def test_null_distribution_stays_exact_for_many_pairs() -> None:
    cdf = signed_rank_cdf(200)
    assert cdf[0] == pytest.approx(2.0**-200, rel=1e-9)
    assert cdf[-1] == pytest.approx(1, abs=1e-12)
    assert cdf[10050] - 0.5 == pytest.approx((cdf[10050] - cdf[10049]) / 2, abs=1e-12), "symmetric about n(n+1)/4"


@pytest.mark.parametrize("n", [3, 6, 8, 13, 20, 40])
@pytest.mark.parametrize("shift", [-0.7, 0.0, 0.3])
def test_p_value_equals_scipys_exact_test(rng: np.random.Generator, n: int, shift: float) -> None:
    differences = rng.normal(0.2, 1, n)
    expected = scipy.stats.wilcoxon(differences - shift, method="exact").pvalue
    assert PairedEffect(tuple(differences), 0.05).p_value(shift) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "alpha"), [(6, 0.05), (10, 0.05), (10, 0.01), (20, 0.05), (20, 0.05 / 3)])
def test_interval_holds_exactly_the_shifts_that_scipy_does_not_reject(rng: np.random.Generator, n: int, alpha: float) -> None:
    differences = rng.normal(0, 1, n)
    interval = signed_rank_interval(differences, alpha)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.alpha is not None
    assert interval.alpha <= alpha
    for end, outwards in ((interval.low, -1), (interval.high, 1)):
        outside = scipy.stats.wilcoxon(differences - (end + outwards * 1e-7), method="exact").pvalue
        inside = scipy.stats.wilcoxon(differences - (end - outwards * 1e-7), method="exact").pvalue
        assert outside == pytest.approx(interval.alpha, rel=1e-9)
        assert inside > alpha


def test_interval_is_close_to_the_bootstrap_of_the_same_estimator(rng: np.random.Generator) -> None:
    differences = rng.normal(0.05, 0.03, 30)
    interval = signed_rank_interval(differences, 0.05)
    draws = scipy.stats.bootstrap((differences,), hodges_lehmann, vectorized=False, n_resamples=500, rng=1).confidence_interval
    assert interval.low == pytest.approx(draws.low, abs=0.006)
    assert interval.high == pytest.approx(draws.high, abs=0.006)


def test_too_few_pairs_give_an_estimate_and_no_bounds() -> None:
    interval = signed_rank_interval([1.0, 2.0, 3.0, 4.0, 5.0], 0.05)
    assert (interval.estimate, interval.low, interval.high, interval.alpha) == (3.0, None, None, None)
    six = signed_rank_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.05)
    assert (six.low, six.high, six.alpha) == (1.0, 6.0, 0.03125)


def test_min_pairs_agrees_with_the_interval() -> None:
    assert [min_pairs(alpha) for alpha in (0.05, 0.03125, 0.01)] == [6, 6, 8]
    for alpha in (0.2, 0.05, 0.05 / 7, 0.001):
        n = min_pairs(alpha)
        assert signed_rank_interval(range(n), alpha).low is not None
        assert signed_rank_interval(range(n - 1), alpha).low is None


def test_one_burst_does_not_move_the_estimate() -> None:
    quiet = [0.01, 0.02, 0.03, 0.02, 0.01, 0.02, 0.03, 0.02]
    assert hodges_lehmann([*quiet, 5.0]) == pytest.approx(0.02, abs=0.005)


@given(st.lists(numbers, min_size=1, max_size=25), numbers, st.floats(0.1, 10))
def test_estimate_and_interval_follow_shift_scale_and_sign(values: list[float], shift: float, scale: float) -> None:
    plain, tolerance = signed_rank_interval(values, 0.1), 1e-6
    moved = signed_rank_interval([scale * v + shift for v in values], 0.1)
    mirrored = signed_rank_interval([-v for v in values], 0.1)
    assert moved.estimate == pytest.approx(scale * plain.estimate + shift, abs=tolerance)
    assert mirrored.estimate == pytest.approx(-plain.estimate, abs=tolerance)
    if plain.low is None or plain.high is None:
        assert len(values) < min_pairs(0.1)
        assert mirrored.low is None
    else:
        assert plain.low <= plain.estimate <= plain.high
        assert moved.low == pytest.approx(scale * plain.low + shift, abs=tolerance)
        assert mirrored.low == pytest.approx(-plain.high, abs=tolerance)


@given(st.lists(numbers, min_size=6, max_size=20), numbers, st.sampled_from([0.05, 0.1, 0.3]))
def test_p_value_and_interval_never_disagree(values: list[float], at: float, alpha: float) -> None:
    effect = PairedEffect(tuple(values), alpha)
    assert effect.log.low is not None
    assert effect.log.high is not None
    is_outside = effect.log.low > at or effect.log.high <= at
    assert (effect.p_value(at) <= alpha * (1 + 1e-9)) == is_outside


def test_walsh_averages_are_all_pairs() -> None:
    assert walsh_averages([1, 2, 4]).tolist() == [1, 1.5, 2, 2.5, 3, 4]


@pytest.mark.parametrize("call", [hodges_lehmann, lambda none: signed_rank_interval(none, 0.05)])
def test_no_differences_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match="at least one"):
        call([])  # type: ignore[operator]


# --- Paired effects --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(times, times), min_size=1, max_size=15), st.floats(0.01, 100))
def test_swapping_the_arms_inverts_the_ratio_and_units_do_not_matter(pairs: list[tuple[float, float]], scale: float) -> None:
    baseline, candidate = [b for b, _ in pairs], [c for _, c in pairs]
    forward, backward = paired_effect(baseline, candidate, 0.05), paired_effect(candidate, baseline, 0.05)
    assert forward.ratio.estimate == pytest.approx(1 / backward.ratio.estimate, rel=1e-9)
    if forward.ratio.low is not None and backward.ratio.high is not None:
        assert forward.mde == pytest.approx(backward.mde, rel=1e-6, abs=1e-12)
        assert forward.ratio.low == pytest.approx(1 / backward.ratio.high, rel=1e-9)
    scaled = paired_effect([scale * b for b in baseline], [scale * c for c in candidate], 0.05)
    assert scaled.ratio.estimate == pytest.approx(forward.ratio.estimate, rel=1e-9)


def test_a_constant_ratio_is_found_exactly() -> None:
    baseline = [1.0, 2.0, 0.5, 3.0, 1.5, 1.1]
    effect = paired_effect(baseline, [1.1 * b for b in baseline], 0.05)
    for value in (effect.ratio.estimate, effect.ratio.low, effect.ratio.high):
        assert value == pytest.approx(1.1, rel=1e-12)
    assert effect.mde == pytest.approx(0, abs=1e-12)


def test_mde_is_detected_in_about_80_percent_of_repeats(rng: np.random.Generator) -> None:
    spread, n = 0.03, 20
    samples = rng.normal(0, spread, (800, n))
    mde = float(np.median([PairedEffect(tuple(row), 0.05).mde or np.nan for row in samples]))
    detected = np.mean([(PairedEffect(tuple(row + mde), 0.05).log.low or 0) > 0 for row in samples])
    assert 0.74 < detected < 0.88
    assert mde == pytest.approx(2.9 * spread / math.sqrt(n), rel=0.1)


def test_pairs_needed_brings_the_mde_down_to_the_threshold(rng: np.random.Generator) -> None:
    tau = 0.015
    needed = [PairedEffect(tuple(row), 0.05).pairs_needed(tau) or 0 for row in rng.normal(0, 0.03, (200, 20))]
    n = round(float(np.median(needed)))
    assert n == pytest.approx((2.8 * 0.03 / tau) ** 2, rel=0.25)
    mdes = [PairedEffect(tuple(row), 0.05).mde or np.nan for row in rng.normal(0, 0.03, (100, n))]
    assert float(np.median(mdes)) == pytest.approx(tau, rel=0.2)


def test_pairs_needed_exceeds_the_pairs_at_hand_while_the_mde_exceeds_the_threshold(rng: np.random.Generator) -> None:
    effect = PairedEffect(tuple(rng.normal(0, 0.03, 8)), 0.05)
    assert effect.mde is not None
    assert (effect.pairs_needed(effect.mde * 0.99) or 0) > 8
    assert effect.pairs_needed(10.0) == min_pairs(0.05), "never fewer than a verdict can rest on"
    assert effect.pairs_needed(0.0) is None
    assert PairedEffect((0.1, 0.2), 0.05).pairs_needed(0.03) is None


def test_mde_is_unknown_where_no_interval_exists() -> None:
    assert PairedEffect((0.01,) * 5, 0.05).mde is None


@pytest.mark.parametrize(("baseline", "candidate"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])])
def test_blocks_that_do_not_pair_are_refused(baseline: list[float], candidate: list[float]) -> None:
    with pytest.raises(ValueError, match=r"paired|above 0"):
        paired_effect(baseline, candidate, 0.05)


def test_noise_floor_and_unpaired_shift() -> None:
    assert log_ratio_sd([1, 1], [math.e, 1]) == pytest.approx(math.sqrt(0.5))
    assert log_ratio_sd([1], [1]) is None
    assert unpaired_log_ratio([1, 1, 9], [math.e] * 2) == pytest.approx(1)


# --- Warm-up and t ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 8, 30, 999])
def test_t_quantile_equals_scipy(df: int) -> None:
    for probability in (0.01, 0.3, 0.5, 0.8, 0.975, 0.9995):
        assert t_quantile(probability, df) == pytest.approx(scipy.stats.t.ppf(probability, df), rel=1e-7, abs=1e-9)


def test_slope_interval_equals_scipys_regression() -> None:
    values = [5.0, 4.1, 4.4, 3.6, 3.9]
    line = scipy.stats.linregress(range(5), values)
    half = scipy.stats.t.ppf(0.975, 3) * line.stderr
    slope = trend_slope_interval(values)
    assert [slope.estimate, slope.low, slope.high] == pytest.approx([line.slope, line.slope - half, line.slope + half])
    with pytest.raises(ValueError, match="at least 3"):
        trend_slope_interval([1, 2])


def test_warm_up_ends_when_the_last_five_show_no_trend() -> None:
    assert not is_steady([1.0, 1.0, 1.0, 1.0])
    assert is_steady([1.0] * 5)
    assert not is_steady([9.0, 8.0, 7.1, 6.0, 5.0])
    assert is_steady([90.0, 50.0, 20.0, 1.0, 1.1, 0.9, 1.1, 1.0])


# --- Shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("broken", "fixed"), [(0, 0), (0, 5), (6, 1), (5, 5), (40, 22), (900, 1100)])
def test_mcnemar_equals_the_binomial_test(broken: int, fixed: int) -> None:
    expected = scipy.stats.binomtest(broken, broken + fixed).pvalue if broken + fixed else 1.0
    assert mcnemar_p(broken, fixed) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_p(fixed, broken) == mcnemar_p(broken, fixed)


@pytest.mark.parametrize(("total", "flips", "points"), [(50, 4, 11), (100, 8, 8), (900, 54, 2.3)])
def test_mde_of_task_slices(total: int, flips: int, points: float) -> None:
    assert ShareDifference(flips // 2, flips - flips // 2, total, 0.05).mde * 100 == pytest.approx(points, rel=0.03)


def test_no_flips_are_not_certainty() -> None:
    same = ShareDifference(0, 0, 60, 0.05)
    assert same.mde > 0.05
    assert same.interval.low == pytest.approx(-(same.interval.high or 0))
    assert (same.interval.high or 0) > 0.02


def test_share_difference_covers_the_truth(rng: np.random.Generator) -> None:
    lost, won, total = 0.06, 0.02, 150
    counts = rng.multinomial(total, [lost, won, 1 - lost - won], size=2000)
    intervals = [ShareDifference(int(b), int(f), total, 0.05).interval for b, f, _ in counts]
    covered = np.mean([(i.low or 0) <= won - lost <= (i.high or 0) for i in intervals])
    assert 0.93 < covered < 0.98


@given(st.integers(0, 30), st.integers(0, 30), st.floats(-0.5, 0.5))
def test_share_difference_is_antisymmetric_and_dual_to_its_p(broken: int, fixed: int, at: float) -> None:
    one, other = ShareDifference(broken, fixed, 80, 0.05), ShareDifference(fixed, broken, 80, 0.05)
    assert one.interval.low == pytest.approx(-(other.interval.high or 0))
    assert one.p_value(at) == pytest.approx(other.p_value(-at))
    assert (one.p_value(at) < 0.05) == (at < (one.interval.low or 0) or at > (one.interval.high or 0))


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (3, 17), (450, 900)])
def test_wilson_equals_scipy(successes: int, total: int) -> None:
    expected = scipy.stats.binomtest(successes, total).proportion_ci(method="wilson")
    interval = share_interval(successes, total)
    assert [interval.low, interval.high] == pytest.approx([expected.low, expected.high], abs=1e-12)
    with pytest.raises(ValueError, match="at least one item"):
        share_interval(0, 0)


# --- Groups ----------------------------------------------------------------------------------------------------------


def test_singleton_clusters_are_the_plain_t_interval(rng: np.random.Generator) -> None:
    values = rng.normal(3, 1, 25)
    expected = scipy.stats.t.interval(0.95, 24, values.mean(), scipy.stats.sem(values))
    interval = cluster_mean_interval([[v] for v in values])
    assert [interval.low, interval.high] == pytest.approx(list(expected))


def test_clusters_widen_the_interval_until_it_covers(rng: np.random.Generator) -> None:
    hits, naive = 0, 0
    for _ in range(400):
        groups = rng.normal(0, 1, (20, 1)) + rng.normal(0, 1, (20, 30))
        interval = cluster_mean_interval(list(groups))
        plain = cluster_mean_interval([[v] for v in groups.ravel()])
        hits += (interval.low or 0) <= 0 <= (interval.high or 0)
        naive += (plain.low or 0) <= 0 <= (plain.high or 0)
    assert 0.91 < hits / 400 < 0.98
    assert naive / 400 < 0.6


def test_one_cluster_has_no_interval() -> None:
    interval = cluster_mean_interval([[1.0, 3.0], []])
    assert (interval.estimate, interval.low) == (2.0, None)
    with pytest.raises(ValueError, match="at least one value"):
        cluster_mean_interval([[]])


# --- Tails -----------------------------------------------------------------------------------------------------------


def test_bootstrap_draws_equal_percentiles_of_repeated_blocks(rng: np.random.Generator) -> None:
    blocks = [list(rng.lognormal(0, 1, size)) for size in (3, 5, 1, 4)]
    result = bootstrap_tail([blocks], 90, seed=3, resamples=50)
    times = np.random.default_rng(3).multinomial(4, [0.25] * 4, size=50)
    expected = [np.percentile([v for b, k in zip(blocks, row, strict=True) for v in b * k], 90) for row in times]
    np.testing.assert_allclose(result.draws, np.sort(np.log(expected)), rtol=1e-12)
    assert result.estimate == pytest.approx(math.log(np.percentile(np.concatenate(blocks), 90)))


def test_bootstrap_of_two_arms_is_paired_seeded_and_antisymmetric(rng: np.random.Generator) -> None:
    drift = np.exp(np.cumsum(rng.normal(0, 0.3, 20)))
    baseline = [list(level * rng.lognormal(0, 0.02, 10)) for level in drift]
    candidate = [[1.2 * value for value in block] for block in baseline]
    result = bootstrap_tail([baseline, candidate], 95)
    assert result.interval(0.05).low == pytest.approx(math.log(1.2)), "the drift is common to both arms of a round"
    assert result.interval(0.05) == bootstrap_tail([baseline, candidate], 95).interval(0.05)
    assert bootstrap_tail([candidate, baseline], 95).estimate == pytest.approx(-result.estimate)


@given(st.integers(0, 1000), st.floats(-4, 4))
@settings(max_examples=30)
def test_bootstrap_p_and_interval_never_disagree(seed: int, at: float) -> None:
    draws = Bootstrap(0.0, np.sort(np.random.default_rng(seed).normal(0, 1, 199)))
    interval = draws.interval(0.05)
    assert interval.low is not None
    assert interval.high is not None
    assert (draws.p_value(at) <= 0.05 + 1e-12) == (interval.low > at or interval.high <= at)
    assert draws.interval(0.001).low is None


def test_bootstrap_refuses_rounds_that_do_not_pair() -> None:
    for arms in ([[]], [[[1.0]], [[1.0], [2.0]]], [[[1.0], []]]):
        with pytest.raises(ValueError, match="same rounds"):
            bootstrap_tail(arms, 95)


# --- Many tests ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8, unique=True), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_levels_reject_what_holms_adjusted_p_values_reject(p_values: list[float], alpha: float) -> None:
    rejected = {i for i, (p, level) in enumerate(zip(p_values, holm_levels(p_values, alpha), strict=True)) if p <= level}
    order, running, expected = np.argsort(p_values), 0.0, set()
    for rank, index in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[index])
        if running <= alpha:
            expected.add(int(index))
    assert rejected == expected


def test_holm_by_hand() -> None:
    assert holm_levels([0.04, 0.001, 0.03], 0.06) == pytest.approx([0.06, 0.02, 0.03])
    assert holm_levels([0.9, 0.5], 0.05) == pytest.approx([0.025, 0.025])
    assert holm_levels([], 0.05) == []


def test_looks_split_alpha_and_skip_those_that_cannot_decide() -> None:
    plan = looks(0.05, 10, 30)
    assert [look.pairs for look in plan] == [10, 15, 20, 25, 30]
    assert sum(look.alpha for look in plan) == pytest.approx(0.05)
    early = looks(0.05, 6, 20)
    assert [look.pairs for look in early] == [11, 16, 20], "6 pairs reach 0.031, not 0.0125"
    assert all(look.pairs >= min_pairs(look.alpha) for look in early)
    assert [(look.pairs, look.alpha) for look in looks(0.05, 20, 20)] == [(20, 0.05)]
    assert [look.pairs for look in looks(0.05, 3, 4)] == [4], "too few for any verdict, which the judgement then says"


def test_the_interval_of_retention_holds_what_it_says() -> None:
    """Simulated pairs: the reference right in 80 %, the candidate in 74 %, most of them together; the floor at 50 %."""
    source, total, hits = np.random.default_rng(0), 300, 0
    for _ in range(400):
        old = source.random(total) < 0.8
        new = np.where(old, source.random(total) < 0.87, source.random(total) < 0.22)
        found = retention(int((old & ~new).sum()), int((~old & new).sum()), int(old.sum()), total, 0.5)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= (0.8 * 0.87 + 0.2 * 0.22 - 0.5) / 0.3 <= found.high
    assert 0.92 < hits / 400 < 0.98
