"""The rule, Holm over many gates, exit codes and the stored form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from infopt.errors import Exit
from infopt.gates import Gate
from infopt.judgement import Judgement, Verdict, apply_holm, exit_code, not_comparable, three_way, undecided
from infopt.result import dump
from infopt.stats import Interval
from infopt.verdict import judge_paired, judge_point

PASS, IMPROVED, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.IMPROVED, Verdict.FAIL, Verdict.INCONCLUSIVE


def gate(condition: str, limit: float, key: str = "tpot_s.p50") -> Gate:
    return Gate.model_validate({"figure": key, "condition": condition, "limit": limit})


def arms(ratio: float, pairs: int = 20, noise: float = 0.005, seed: int = 0) -> tuple[list[float], list[float]]:
    """Drifting baseline blocks and a candidate that takes `ratio` times as long, within `noise`."""
    generator = np.random.default_rng(seed)
    baseline = 0.02 * np.exp(np.cumsum(generator.normal(0, 0.05, pairs)))
    return baseline.tolist(), (baseline * ratio * np.exp(generator.normal(0, noise, pairs))).tolist()


# --- The rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "limit", "verdict"),
    [
        (0.04, 0.06, 0.03, FAIL),
        (0.02, 0.06, 0.03, INCONCLUSIVE),
        (-0.01, 0.02, 0.03, PASS),
        (-0.01, 0.03, 0.03, PASS),
        (-0.05, -0.01, 0.03, IMPROVED),
        (-0.05, -0.01, -0.1, FAIL),
        (-0.2, -0.05, -0.1, INCONCLUSIVE),
        (-0.3, -0.15, -0.1, IMPROVED),
        (None, None, 0.03, INCONCLUSIVE),
    ],
)
def test_three_way(low: float | None, high: float | None, limit: float, verdict: Verdict) -> None:
    assert three_way(Interval(0.0, low, high), limit) is verdict


# --- Many gates ------------------------------------------------------------------------------------------------------


def judges(ratios: Sequence[float], noise: float = 0.01, declared: bool = True) -> list[partial[Judgement]]:
    limit = gate("max_regress", 0.03) if declared else None
    return [partial(judge_paired, "tpot_s.p50", *arms(r, noise=noise, seed=i), limit) for i, r in enumerate(ratios)]


def test_holm_steps_down_through_the_gates() -> None:
    results = apply_holm(judges([1.0, 1.2, 1.031]))
    assert [r.verdict for r in results] == [PASS, FAIL, INCONCLUSIVE]
    assert sorted(r.alpha or 0 for r in results) == pytest.approx([0.05 / 3, 0.05 / 2, 0.05])


def test_holm_stops_rising_at_the_first_open_gate() -> None:
    results = apply_holm(judges([1.03, 1.03, 1.03]))
    assert {r.verdict for r in results} == {INCONCLUSIVE}
    assert [r.alpha for r in results] == pytest.approx([0.05 / 3] * 3)


def test_what_is_decided_before_the_last_gates_are_measured_stays_decided() -> None:
    for early in ([1.2], [1.0, 1.2], [1.03, 1.2]):
        for late in ([1.0], [1.2, 1.03], [1.03, 1.03]):
            now = apply_holm(judges(early), pending=len(late))
            then = apply_holm([*judges(early), *judges(late)])
            for before, after in zip(now, then, strict=False):
                assert before.verdict in (after.verdict, INCONCLUSIVE)
    (alone,) = apply_holm(judges([1.2]), pending=3)
    assert alone.alpha == pytest.approx(0.05 / 4)


def test_point_tests_and_ungated_figures_do_not_cost_level() -> None:
    memory = partial(_memory, 100.0, 90.0)
    results = apply_holm([*judges([1.2]), *judges([1.0, 1.0], declared=False), memory])
    assert [r.alpha for r in results] == [0.05, 0.05, 0.05, None]
    assert apply_holm([]) == ()


def _memory(baseline: float, candidate: float, alpha: float) -> Judgement:
    return judge_point("weights_bytes", baseline, candidate, gate("max_regress", 0.02, "weights_bytes"))


def test_more_gates_need_more_pairs() -> None:
    short = [partial(judge_paired, "tpot_s.p50", *arms(2.0, pairs=6, seed=i), gate("max_regress", 0.03)) for i in range(3)]
    assert [r.verdict for r in apply_holm(short[:1])] == [FAIL]
    results = apply_holm(short)
    assert {r.verdict for r in results} == {INCONCLUSIVE}
    assert "needs at least 7" in (results[0].note or "")


def test_holm_keeps_wrong_verdicts_of_the_family_below_alpha() -> None:
    wrong = 0
    for trial in range(150):
        family = [
            partial(judge_paired, "tpot_s.p50", *arms(1.03, 12, 0.02, 10 * trial + i), gate("max_regress", 0.03))
            for i in range(4)
        ]
        wrong += any(r.verdict is not INCONCLUSIVE for r in apply_holm(family))
    assert wrong / 150 < 0.09


# --- Exit codes and records ------------------------------------------------------------------------------------------


def outcome(verdict: Verdict, gated: bool = True) -> Judgement:
    return Judgement(figure="kld.mean", id="kld.mean.v1", unit="nats", gate="max 1" if gated else None, verdict=verdict)


@pytest.mark.parametrize(
    ("results", "strict", "code"),
    [
        ([], False, Exit.OK),
        ([outcome(PASS), outcome(IMPROVED)], True, Exit.OK),
        ([outcome(INCONCLUSIVE)], False, Exit.OK),
        ([outcome(INCONCLUSIVE)], True, Exit.INCONCLUSIVE),
        ([outcome(INCONCLUSIVE, False), outcome(FAIL, False)], True, Exit.OK),
        ([outcome(FAIL), outcome(INCONCLUSIVE)], True, Exit.GATE_FAILED),
        ([outcome(FAIL), outcome(Verdict.NOT_COMPARABLE, False)], False, Exit.NOT_COMPARABLE),
    ],
)
def test_exit_code(results: list[Judgement], strict: bool, code: Exit) -> None:
    assert exit_code(results, strict) is code
    assert exit_code(iter(results), strict) is code


def test_judgements_are_json_without_nan() -> None:
    result = judge_paired("tpot_s.p50", *arms(1.1), gate("max_regress", 0.03))
    stored = json.loads(dump(result))
    assert stored["verdict"] == "FAIL"
    assert Judgement.model_validate(stored) == result
    assert undecided("kld.mean", None, "why").note == "why"
    assert not_comparable("kld.mean", None, "another CPU").verdict is Verdict.NOT_COMPARABLE
