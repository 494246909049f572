"""The verdict of each kind of evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.gates import Gate
from infopt.judgement import Judgement, Verdict
from infopt.verdict import judge_absolute, judge_accuracy, judge_paired, judge_point, judge_stored, judge_tail

PASS, IMPROVED, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.IMPROVED, Verdict.FAIL, Verdict.INCONCLUSIVE


def gate(condition: str, limit: float, key: str = "tpot_s.p50") -> Gate:
    return Gate.model_validate({"figure": key, "condition": condition, "limit": limit})


def arms(ratio: float, pairs: int = 20, noise: float = 0.005, seed: int = 0) -> tuple[list[float], list[float]]:
    """Drifting baseline blocks and a candidate that takes `ratio` times as long, within `noise`."""
    generator = np.random.default_rng(seed)
    baseline = 0.02 * np.exp(np.cumsum(generator.normal(0, 0.05, pairs)))
    return baseline.tolist(), (baseline * ratio * np.exp(generator.normal(0, noise, pairs))).tolist()


# --- Pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "ratio", "condition", "limit", "verdict"),
    [
        ("tpot_s.p50", 1.10, "max_regress", 0.03, FAIL),
        ("tpot_s.p50", 1.00, "max_regress", 0.03, PASS),
        ("tpot_s.p50", 1.03, "max_regress", 0.03, INCONCLUSIVE),
        ("tpot_s.p50", 0.90, "max_regress", 0.03, IMPROVED),
        ("decode_tok_per_s.p50", 0.90, "max_regress", 0.03, FAIL),
        ("decode_tok_per_s.p50", 1.10, "max_regress", 0.03, IMPROVED),
        ("tpot_s.p50", 0.80, "min_improve", 0.10, IMPROVED),
        ("tpot_s.p50", 0.95, "min_improve", 0.10, FAIL),
        ("decode_tok_per_s.p50", 1.25, "min_improve", 0.20, IMPROVED),
        ("decode_tok_per_s.p50", 1.15, "min_improve", 0.20, FAIL),
    ],
)
def test_paired_verdict_knows_direction(key: str, ratio: float, condition: str, limit: float, verdict: Verdict) -> None:
    result = judge_paired(key, *arms(ratio), gate(condition, limit, key))
    assert result.verdict is verdict
    assert result.effect == pytest.approx(ratio, rel=0.01)
    assert result.low is not None
    assert result.high is not None
    assert result.low < ratio < result.high
    assert (result.pairs, result.id) == (20, key.split(".")[0] + ".v1")


def test_without_a_gate_the_default_threshold_informs() -> None:
    result = judge_paired("tpot_s.p50", *arms(1.10))
    assert (result.verdict, result.gate, result.tau) == (FAIL, None, 0.03)
    assert judge_paired("energy_j_per_token", *arms(1.10)).tau == 0.05


def test_a_noisy_machine_says_what_it_cannot_see() -> None:
    noisy = [math.exp(step) for step in (-0.1, 0.12, -0.08, 0.09, -0.11, 0.1, -0.04, 0.05, -0.02, 0.02)]
    result = judge_paired("tpot_s.p50", [1.0] * 10, noisy, gate("max_regress", 0.03))
    assert result.verdict is INCONCLUSIVE
    assert result.mde is not None
    assert result.mde > 0.03
    assert result.pairs_needed is not None
    assert result.pairs_needed > 10
    assert result.note == f"this machine cannot see 3.0 %; needs about {result.pairs_needed} pairs"


def test_an_absurd_threshold_asks_for_no_absurd_number_of_pairs() -> None:
    result = judge_paired("tpot_s.p50", *arms(1.0), gate("max_regress", 1e-200))
    assert (result.pairs_needed, "no practical number" in (result.note or "")) == (None, True)
    assert accuracy(1, 1, 100, limit=1e-200).note == "100 items cannot show a drop of 0.0 %"


def test_five_pairs_can_never_decide() -> None:
    result = judge_paired("tpot_s.p50", *arms(2.0, pairs=5), gate("max_regress", 0.03))
    assert (result.verdict, result.low, result.mde) == (INCONCLUSIVE, None, None)
    assert result.effect == pytest.approx(2.0, rel=0.02)
    assert "needs at least 6" in (result.note or "")


def test_missing_and_impossible_blocks() -> None:
    baseline, candidate = arms(1.0)
    gappy: list[float | None] = [None, *candidate[1:]]
    result = judge_paired("tpot_s.p50", baseline, gappy, gate("max_regress", 0.03))
    assert (result.verdict, result.pairs, result.note) == (PASS, 19, "1 of 20 pairs lack this figure")
    nothing = judge_paired("tpot_s.p50", [None] * 6, candidate[:6], gate("max_regress", 0.03))
    assert (nothing.verdict, nothing.note) == (INCONCLUSIVE, "no pair of blocks has this figure")
    zero = judge_paired("tpot_s.p50", baseline, [0.0, *candidate[1:]], gate("max_regress", 0.03))
    assert zero.verdict is INCONCLUSIVE
    with pytest.raises(ValueError, match="shorter"):
        judge_paired("tpot_s.p50", baseline, candidate[1:])


def test_an_absolute_gate_judges_the_candidates_blocks() -> None:
    slow, steady = [1.0] * 10, [0.021, 0.02, 0.019, 0.02, 0.0205, 0.0195, 0.02, 0.0201, 0.0199, 0.02]
    assert judge_paired("tpot_s.p50", slow, steady, gate("max", 0.025)).verdict is PASS
    assert judge_paired("tpot_s.p50", slow, steady, gate("max", 0.015)).verdict is FAIL
    result = judge_paired("tpot_s.p50", slow, steady, gate("max", 0.02))
    assert (result.verdict, result.comparison, result.tau, result.baseline) == (INCONCLUSIVE, "value", 0.02, 1.0)
    assert judge_paired("tpot_s.p50", slow[:4], steady[:4], gate("max", 0.1)).note is not None
    assert judge_paired("tpot_s.p50", slow, steady, gate("max", 0.0)).verdict is FAIL


times = st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=6, max_size=20)
ORDER = {FAIL: 0, INCONCLUSIVE: 1, PASS: 2, IMPROVED: 2}


@given(times, st.floats(0, 0.9), st.floats(0, 0.9))
def test_a_looser_threshold_never_makes_the_verdict_worse(pairs: list[tuple[float, float]], one: float, other: float) -> None:
    baseline, candidate = [b for b, _ in pairs], [c for _, c in pairs]
    for key in ("tpot_s.p50", "decode_tok_per_s.p50"):
        strict, loose = (judge_paired(key, baseline, candidate, gate("max_regress", t, key)) for t in sorted((one, other)))
        assert strict.verdict is not None
        assert loose.verdict is not None
        assert ORDER[strict.verdict] <= ORDER[loose.verdict]


@given(times, st.floats(0.1, 10))
def test_seconds_and_their_reciprocal_rate_agree_at_zero_threshold(pairs: list[tuple[float, float]], scale: float) -> None:
    baseline, candidate = [b for b, _ in pairs], [c for _, c in pairs]
    time = judge_paired("tpot_s.p50", baseline, candidate, gate("max_regress", 0.0))
    rate = judge_paired(
        "decode_tok_per_s.p50", [scale / b for b in baseline], [scale / c for c in candidate], gate("max_regress", 0)
    )
    assert rate.effect == pytest.approx(1 / (time.effect or math.nan), rel=1e-9)
    assert rate.low == pytest.approx(1 / (time.high or math.nan), rel=1e-9)


@given(times)
def test_swapping_the_arms_turns_harm_into_gain(pairs: list[tuple[float, float]]) -> None:
    baseline, candidate = [b for b, _ in pairs], [c for _, c in pairs]
    forward = judge_paired("tpot_s.p50", baseline, candidate, gate("max_regress", 0))
    backward = judge_paired("tpot_s.p50", candidate, baseline, gate("max_regress", 0))
    assert (forward.verdict is FAIL) == (backward.verdict is IMPROVED)
    assert forward.effect == pytest.approx(1 / (backward.effect or math.nan))


# --- Tails -----------------------------------------------------------------------------------------------------------


def test_tail_verdicts_pool_requests_and_bootstrap_rounds() -> None:
    generator = np.random.default_rng(0)
    level = np.exp(np.cumsum(generator.normal(0, 0.05, 20)))
    baseline = [(x * generator.lognormal(-3, 0.01, 8)).tolist() for x in level]
    for ratio, verdict in ((1.2, FAIL), (1.0, PASS), (0.8, IMPROVED)):
        candidate = [[ratio * value for value in block] for block in baseline]
        result = judge_tail("ttft_s.p95", baseline, candidate, gate("max_regress", 0.05, "ttft_s.p95"))
        assert result.verdict is verdict
        assert result.effect == pytest.approx(ratio)
        assert result.baseline == pytest.approx(np.percentile(np.concatenate(baseline), 95))
    assert judge_tail("ttft_s.p95", baseline, baseline, gate("max", 1.0, "ttft_s.p95")).verdict is PASS
    assert judge_tail("ttft_s.p95", baseline, baseline, gate("max", 0.01, "ttft_s.p95")).verdict is FAIL


def test_tails_without_enough_blocks_are_undecided() -> None:
    blocks = [[1.0, 2.0], [1.0, 3.0]]
    few = judge_tail("ttft_s.p95", blocks, blocks, gate("max_regress", 0.05, "ttft_s.p95"))
    assert (few.verdict, few.low) == (INCONCLUSIVE, None)
    assert "needs at least 6" in (few.note or "")
    assert judge_tail("ttft_s.p95", [[]], [[1.0]]).note == "no pair of blocks has this figure"
    assert judge_tail("ttft_s.p95", [[0.0]], [[1.0]]).verdict is INCONCLUSIVE


# --- Stored runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [(1.10, 0.02, FAIL), (1.10, 0.04, INCONCLUSIVE), (1.0, 0.01, PASS), (1.0, 0.02, INCONCLUSIVE), (0.9, 0.02, IMPROVED)],
)
def test_stored_runs_must_clear_the_threshold_by_twice_the_noise(ratio: float, noise: float, verdict: Verdict) -> None:
    result = judge_stored("tpot_s.p50", [0.02, 0.02, 0.021], [ratio * 0.02] * 4, gate("max_regress", 0.03), noise)
    assert result.verdict is verdict
    assert (result.p, result.pairs) == (None, None)


def test_stored_runs_without_a_self_test_or_values_are_undecided() -> None:
    quiet = judge_stored("tpot_s.p50", [1.0], [2.0], gate("max_regress", 0.03), None)
    assert quiet.verdict is INCONCLUSIVE
    assert "A/A" in (quiet.note or "")
    assert judge_stored("tpot_s.p50", [None], [2.0], None, 0.1).note == "the baseline has no value"
    assert judge_stored("tpot_s.p50", [1.0], [], None, 0.1).note == "the candidate has no value"
    assert judge_stored("tpot_s.p50", [1.0], [0.0], None, 0.1).verdict is INCONCLUSIVE
    assert judge_stored("tpot_s.p50", [], [1.0, 1.1, 1.0, 1.0, 1.1, 1.2], gate("max", 2.0)).verdict is PASS
    assert "compare live" in (judge_stored("tpot_s.p50", [1.0], [1.0], None, 0.1).note or "")


# --- Points and limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "declared", "verdict"),
    [
        (103, gate("max_regress", 0.03, "weights_bytes"), PASS),
        (103.1, gate("max_regress", 0.03, "weights_bytes"), FAIL),
        (99, None, PASS),
        (97, None, IMPROVED),
        (103, None, FAIL),
        (60, gate("min_improve", 0.4, "weights_bytes"), IMPROVED),
        (61, gate("min_improve", 0.4, "weights_bytes"), FAIL),
        (60, gate("max", 60, "weights_bytes"), PASS),
        (60.5, gate("max", 60, "weights_bytes"), FAIL),
        (None, gate("max", 60, "weights_bytes"), INCONCLUSIVE),
        (None, gate("max_regress", 60, "weights_bytes"), INCONCLUSIVE),
    ],
)
def test_memory_is_a_point_test(candidate: float | None, declared: Gate | None, verdict: Verdict) -> None:
    result = judge_point("weights_bytes", 100, candidate, declared)
    assert result.verdict is verdict
    assert (result.low, result.p, result.mde) == (None, None, None)


def test_a_point_without_a_baseline_is_undecided() -> None:
    assert judge_point("torch_peak_bytes", None, 5).note == "the baseline has no value"
    assert judge_point("torch_peak_bytes", 0, 5).verdict is INCONCLUSIVE


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.02, 0.01, 0.03, PASS),
        (0.04, 0.03, 0.06, INCONCLUSIVE),
        (0.06, 0.051, 0.07, FAIL),
        (0.049, None, None, INCONCLUSIVE),
        (0.051, None, None, INCONCLUSIVE),
        (None, None, None, INCONCLUSIVE),
    ],
)
def test_a_quality_limit(value: float | None, low: float | None, high: float | None, verdict: Verdict) -> None:
    assert judge_absolute("kld.mean", value, low, high, gate("max", 0.05, "kld.mean")).verdict is verdict
    if value is not None:
        mirrored = judge_absolute(
            "mc.delta", -value, None if high is None else -high, None if low is None else -low, gate("min", -0.05, "mc.delta")
        )
        assert mirrored.verdict is verdict


@pytest.mark.parametrize(("value", "verdict"), [
    (0.0, PASS), (0.025, PASS), (0.026, INCONCLUSIVE), (0.05, INCONCLUSIVE), (0.099, INCONCLUSIVE), (0.1, FAIL),
])  # fmt: skip
@pytest.mark.parametrize("key", ["kld.mean", "kld.p99", "kld.max"])
def test_quality_without_an_interval_is_decided_only_far_from_its_limit(key: str, value: float, verdict: Verdict) -> None:
    found = judge_absolute(key, value, None, None, gate("max", 0.05, key))
    assert found.verdict is verdict
    assert ("no interval" in str(found.note)) == (verdict is INCONCLUSIVE)


def test_bytes_are_exact() -> None:
    assert judge_absolute("weights_bytes", 99.0, None, None, gate("max", 100, "weights_bytes")).verdict is PASS
    assert judge_absolute("weights_bytes", 101.0, None, None, gate("max", 100, "weights_bytes")).verdict is FAIL


def test_a_null_figure_is_inconclusive_with_its_reason() -> None:
    result = judge_absolute("kld.mean", None, None, None, gate("max", 0.05, "kld.mean"), reason="no reference was loaded")
    assert (result.verdict, result.note) == (INCONCLUSIVE, "no reference was loaded")


def test_quality_without_a_gate_has_nothing_to_decide() -> None:
    result = judge_absolute("kld.mean", 0.3, 0.2, 0.4, None)
    assert (result.verdict, result.candidate, result.low, result.high) == (None, 0.3, 0.2, 0.4)


def test_the_interval_of_a_limit_widens_with_the_level() -> None:
    declared = gate("max", 0.05, "kld.mean")
    usual, strict = (judge_absolute("kld.mean", 0.04, 0.03, 0.049, declared, alpha) for alpha in (0.05, 0.01))
    assert (usual.low, usual.high, usual.verdict) == (pytest.approx(0.03), pytest.approx(0.049), PASS)
    assert strict.high == pytest.approx(0.04 + 0.009 * 2.5758 / 1.96, rel=1e-4)
    assert strict.verdict is INCONCLUSIVE
    assert usual.p == pytest.approx(0.0294, rel=0.01), "0.05 lies 1.96 · 0.010/0.009 standard errors away"


@pytest.mark.parametrize(("value", "verdict"), [(0.99, PASS), (0.98, INCONCLUSIVE), (0.97, FAIL)])
def test_a_drop_from_an_exact_baseline(value: float, verdict: Verdict) -> None:
    declared = gate("max_drop", 0.02, "top1_agreement")
    result = judge_absolute("top1_agreement", value, value - 0.005, value + 0.005, declared, baseline=1.0)
    assert (result.verdict, result.comparison, result.tau) == (verdict, "difference", 0.02)
    assert result.effect == pytest.approx(value - 1)
    assert judge_absolute("top1_agreement", value, 0.9, 1.0, declared).verdict is INCONCLUSIVE


def test_a_verdict_that_is_clear_asks_for_no_more_pairs() -> None:
    """Bursts of noise: the machine cannot see 0.1 %, and need not."""
    generator = np.random.default_rng(0)
    base = (0.01 * np.exp(generator.normal(0, 0.02, 10))).tolist()
    for factor, verdict in ((0.5, IMPROVED), (2.0, FAIL), (1.0, INCONCLUSIVE)):
        other = (factor * 0.01 * np.exp(generator.normal(0, 0.02, 10))).tolist()
        found = judge_paired("tpot_s.p50", base, other, gate("max_regress", 0.001))
        assert found.verdict is verdict
        assert (found.note is None) == (verdict is not INCONCLUSIVE)


# --- Accuracy --------------------------------------------------------------------------------------------------------


def accuracy(broken: int, fixed: int, total: int, limit: float = 0.02) -> Judgement:
    return judge_accuracy("mc.accuracy", total // 2, broken, fixed, total, gate("max_drop", limit, "mc.accuracy"))


def test_pass_is_refused_while_the_items_could_not_show_the_loss() -> None:
    result = accuracy(0, 0, 60)
    assert result.verdict is INCONCLUSIVE
    assert "60 items cannot show a drop of 2.0 %" in (result.note or "")
    assert accuracy(0, 8, 100).verdict is INCONCLUSIVE, "a gain on few items is refused too"
    assert accuracy(20, 20, 3000).verdict is PASS


def test_a_large_loss_fails_on_few_items_and_a_gain_improves_on_many() -> None:
    loss = accuracy(20, 1, 60)
    assert loss.verdict is FAIL
    assert (loss.baseline, loss.candidate) == (50 / 60, 31 / 60)
    assert loss.effect == pytest.approx(-19 / 60)
    assert accuracy(10, 60, 4000).verdict is IMPROVED
    assert judge_accuracy("mc.accuracy", 30, 20, 1, 60).verdict is FAIL, "the default margin"
    assert judge_accuracy("mc.accuracy", 0, 0, 0, 0).note == "no item was scored"


def test_an_absolute_gate_on_accuracy_uses_its_own_interval() -> None:
    floor = gate("min", 0.5, "mc.accuracy")
    assert judge_accuracy("mc.accuracy", 85, 5, 5, 100, floor).verdict is PASS
    assert judge_accuracy("mc.accuracy", 50, 5, 5, 100, floor).verdict is INCONCLUSIVE
    assert judge_accuracy("mc.accuracy", 20, 5, 5, 100, floor).verdict is FAIL


@given(st.integers(0, 40), st.integers(0, 40), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_wider_margin_never_hurts(broken: int, fixed: int, one: float, other: float) -> None:
    strict, loose = (accuracy(broken, fixed, 200, limit).verdict for limit in sorted((one, other)))
    assert strict is not None
    assert loose is not None
    assert ORDER[strict] <= ORDER[loose]
