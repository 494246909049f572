"""Which judge serves which figure: live, stored and quality evidence made by hand, and Holm over the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from infopt import figures
from infopt.errors import InputError
from infopt.gates import parse_gates
from infopt.judgement import Judgement, Verdict
from infopt.judging import INFORMING, PER_BLOCK, Evidence, judge
from infopt.result import Block, Sample, Value

WOBBLE = (0.0, 0.004, -0.003, 0.002, -0.004, 0.001, 0.003, -0.001, -0.002, 0.0025)


def sample(block: int, step_s: float, *, first_s: float = 0.1, out: int = 5, index: int = 0) -> Sample:
    """`out` tokens: the first after `first_s`, the others `step_s` apart, so that TPOT is `step_s`."""
    times = tuple(first_s + step_s * i for i in range(out))
    return Sample(
        arm="a", block=block, index=index, batch=1, prompt_tokens=8, out_tokens=out, emission_s=times,
        emission_tokens=(1,) * out, prefill_s=first_s / 2,
    )  # fmt: skip


def value(
    key: str, number: float | None, *, low: float | None = None, high: float | None = None, reason: str | None = None
) -> Value:
    found, _ = figures.find(key)
    return Value(value=number, unit=found.unit, id=found.id, low=low, high=high, reason=reason)


def evidence(
    steps: Sequence[float | None],
    values: Mapping[str, Value] | None = None,
    quality: Mapping[str, Any] | None = None,
    requests: int = 2,
) -> Evidence:
    """A block of `requests` equal requests per step time; None: one-token outputs, so no TPOT."""
    samples = [
        sample(block, step or 0.0, out=1 if step is None else 5, index=i)
        for block, step in enumerate(steps)
        for i in range(requests)
    ]
    blocks = [Block(arm="a", index=i, round=i, position=0, wall_s=1.0) for i in range(len(steps))]
    known = {"tpot_s.p50": value("tpot_s.p50", 0.01), "ttft_s.p50": value("ttft_s.p50", 0.1)}
    return Evidence(samples, blocks, known | dict(values or {}), quality or {})


def times(factor: float, pairs: int = 10, base_s: float = 0.010) -> list[float]:
    return [base_s * factor * (1 + WOBBLE[i % len(WOBBLE)] * (1 if factor == 1 else -1)) for i in range(pairs)]


def one(found: Sequence[Judgement], key: str) -> Judgement:
    (each,) = [each for each in found if each.figure == key]
    return each


def gates(text: Mapping[str, Mapping[str, Any]]) -> Any:
    return parse_gates(text, "gates")


# --- Live ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "verdict"), [(0.8, Verdict.IMPROVED), (1.0, Verdict.PASS), (1.03, Verdict.INCONCLUSIVE), (1.2, Verdict.FAIL)]
)
def test_live_blocks_are_judged_in_pairs(factor: float, verdict: Verdict) -> None:
    found = judge(evidence(times(1)), evidence(times(factor)), gates({"tpot_s.p50": {"max_regress": "3%"}}), informing=())
    (each,) = found
    assert each.verdict is verdict
    assert each.effect == pytest.approx(factor, rel=0.01)
    assert each.pairs == 10
    assert each.baseline == pytest.approx(0.010, rel=0.01)


def test_higher_is_better_turns_the_harm_round() -> None:
    rule = gates({"decode_tok_per_s.p50": {"max_regress": "3%"}})
    assert judge(evidence(times(1)), evidence(times(1.2)), rule, informing=())[0].verdict is Verdict.FAIL
    assert judge(evidence(times(1)), evidence(times(0.8)), rule, informing=())[0].verdict is Verdict.IMPROVED


def test_pairs_go_by_block_and_a_missing_block_drops_its_pair() -> None:
    drifting = [0.010 * 1.3**i for i in range(10)]
    slower = [each * 1.1 for each in drifting]
    rule = gates({"tpot_s.p50": {"max_regress": "3%"}})
    candidate = evidence([*slower[:9], None])
    each = one(judge(evidence(drifting), candidate, rule), "tpot_s.p50")
    assert each.verdict is Verdict.FAIL, "unpaired, the drift would hide 10 %"
    assert each.pairs == 9
    assert "1 of 10 pairs" in str(each.note)


def test_one_token_outputs_leave_tpot_open_and_never_pass() -> None:
    found = judge(evidence(times(1)), evidence([None] * 10), gates({"tpot_s.p50": {"max_regress": "300%"}}), informing=())
    assert found[0].verdict is Verdict.INCONCLUSIVE
    assert found[0].note == "no pair of blocks has this figure"


def test_percentiles_over_requests_pool_the_requests() -> None:
    rule = gates({"tpot_s.p95": {"max_regress": "3%"}})
    found = judge(evidence(times(1), requests=8), evidence(times(1.2), requests=8), rule, informing=())
    assert found[0].verdict is Verdict.FAIL
    assert found[0].effect == pytest.approx(1.2, rel=0.02)


def test_figures_of_a_window_have_a_value_per_block() -> None:
    rule = gates({"throughput_tok_per_s": {"max_regress": "3%"}})
    (each,) = judge(evidence(times(1)), evidence(times(1)), rule, informing=())
    assert (each.pairs, each.effect) == (10, pytest.approx(1.0))


def test_one_number_per_run_is_a_point() -> None:
    rule = gates({"weights_bytes": {"max_regress": "0%"}})
    for after, verdict in ((50.0, Verdict.IMPROVED), (100.0, Verdict.PASS), (101.0, Verdict.FAIL)):
        before, candidate = ({"weights_bytes": value("weights_bytes", number)} for number in (100.0, after))
        (each,) = judge(evidence(times(1), before), evidence(times(1), candidate), rule, informing=())
        assert each.verdict is verdict
        assert each.p is None


def test_a_gate_on_a_null_figure_is_inconclusive() -> None:
    nothing = {"torch_peak_bytes": value("torch_peak_bytes", None, reason="torch keeps no peak for the CPU")}
    rule = gates({"torch_peak_bytes": {"max_regress": "2%"}, "device_peak_bytes": {"max": "1GiB"}})
    found = judge(evidence(times(1), nothing), evidence(times(1), nothing), rule, informing=())
    assert [each.verdict for each in found] == [Verdict.INCONCLUSIVE] * 2


def test_what_is_not_gated_informs_where_it_was_measured() -> None:
    found = judge(evidence(times(1)), evidence(times(1)), gates({"tpot_s.p50": {"max_regress": "3%"}}))
    assert [each.figure for each in found] == ["tpot_s.p50", "ttft_s.p50"]
    assert [each.gate is None for each in found] == [False, True]


def test_two_conditions_on_a_figure_are_two_judgements() -> None:
    rule = gates({"tpot_s.p50": {"max_regress": "3%", "max": 0.001}})
    found = judge(evidence(times(1)), evidence(times(1)), rule, informing=())
    assert [each.verdict for each in found] == [Verdict.PASS, Verdict.FAIL]


def test_every_informing_figure_is_in_the_catalogue() -> None:
    assert [figures.find(key)[0].name for key in INFORMING]


def test_blocks_have_a_value_of_every_per_block_figure_and_of_no_other() -> None:
    arm = evidence(times(1))
    for key in PER_BLOCK:
        assert len(arm.series(key, arm.indices())) == 10
    for key in ("load_s", "first_run_s", "weights_bytes", "mbu"):
        assert key not in PER_BLOCK
        with pytest.raises(InputError, match="no value per block"):
            arm.series(key, arm.indices())


# --- Holm ------------------------------------------------------------------------------------------------------------


def test_gates_share_the_error_and_figures_without_a_gate_do_not() -> None:
    rule = gates({"tpot_s.p50": {"max_regress": "3%"}, "ttft_s.p50": {"max_regress": "3%"}, "e2e_s.p50": {"max_regress": "3%"}})
    alone = judge(evidence(times(1)), evidence(times(1.2)), rule[:1], informing=("decode_tok_per_s.p50",))
    found = judge(
        evidence(times(1), {"decode_tok_per_s.p50": value("decode_tok_per_s.p50", 100.0)}),
        evidence(times(1.2), {"decode_tok_per_s.p50": value("decode_tok_per_s.p50", 100.0)}),
        rule,
        informing=("decode_tok_per_s.p50",),
    )
    assert one(alone, "tpot_s.p50").alpha == pytest.approx(0.05)
    assert min(each.alpha or 1 for each in found if each.gate) == pytest.approx(0.05 / 3)
    assert one(found, "decode_tok_per_s.p50").alpha == pytest.approx(0.05)


def test_six_pairs_settle_one_gate_and_not_many() -> None:
    rule = gates({key: {"max_regress": "3%"} for key in ("tpot_s.p50", "e2e_s.p50", "decode_tok_per_s.p50")})
    base, slow = evidence(times(1, 6)), evidence(times(1.5, 6))
    assert judge(base, slow, rule[:1], informing=())[0].verdict is Verdict.FAIL
    verdicts = {each.verdict for each in judge(base, slow, rule, informing=())}
    assert verdicts == {Verdict.INCONCLUSIVE}, "6 pairs reach p = .031 at best, and 3 gates need .0167"


def test_a_look_at_a_lower_level_asks_for_more() -> None:
    rule = gates({"tpot_s.p50": {"max_regress": "3%"}})
    base, slow = evidence(times(1, 6)), evidence(times(1.5, 6))
    assert judge(base, slow, rule, alpha=0.025, informing=())[0].verdict is Verdict.INCONCLUSIVE


# --- Stored ----------------------------------------------------------------------------------------------------------


def stored(factor: float, noise: Mapping[str, float] | None, key: str = "tpot_s.p50") -> Judgement:
    rule = gates({key: {"max_regress": "3%"}})
    (each,) = judge(evidence(times(1)), evidence(times(factor, 7)), rule, is_live=False, noise=noise, informing=())
    return each


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"),
    [
        (1.0, 0.005, Verdict.PASS),
        (0.9, 0.005, Verdict.IMPROVED),
        (1.1, 0.005, Verdict.FAIL),
        (1.1, 0.05, Verdict.INCONCLUSIVE),
        (1.0, 0.02, Verdict.INCONCLUSIVE),
    ],
)
def test_stored_blocks_must_clear_twice_the_noise(factor: float, noise: float, verdict: Verdict) -> None:
    found = stored(factor, {"tpot_s.p50": noise})
    assert found.verdict is verdict
    assert found.pairs is None


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_without_a_self_test_nothing_stored_is_decided(factor: float) -> None:
    found = stored(factor, None)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "A/A" in str(found.note)


def test_the_noise_of_another_figure_does_not_serve() -> None:
    assert stored(2.0, {"ttft_s.p50": 0.001}).verdict is Verdict.INCONCLUSIVE
    assert stored(2.0, {"tpot_s.p95": 0.001}, "tpot_s.p95").verdict is Verdict.FAIL


def test_stored_memory_is_a_point_all_the_same() -> None:
    before, after = ({"weights_bytes": value("weights_bytes", number)} for number in (100.0, 110.0))
    rule = gates({"weights_bytes": {"max_regress": "2%"}})
    (each,) = judge(evidence(times(1), before), evidence(times(1), after), rule, is_live=False, informing=())
    assert each.verdict is Verdict.FAIL


# --- Quality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.0, 1.01, Verdict.PASS), (1.0, 1.04, Verdict.INCONCLUSIVE), (1.03, 1.05, Verdict.FAIL)]
)
@pytest.mark.parametrize("is_live", [True, False])
def test_quality_is_judged_by_its_own_interval(low: float, high: float, verdict: Verdict, is_live: bool) -> None:
    found = {"ppl_ratio": value("ppl_ratio", (low + high) / 2, low=low, high=high)}
    rule = gates({"ppl_ratio": {"max": 1.02}})
    (each,) = judge(evidence(times(1)), evidence(times(1), found), rule, is_live=is_live, informing=())
    assert each.verdict is verdict


def test_quality_that_was_not_measured_is_inconclusive_with_its_reason() -> None:
    rule = gates({"ppl_ratio": {"max": 1.02}, "kld.mean": {"max": 1.0}})
    nothing = {"kld.mean": value("kld.mean", None, reason="no text")}
    found = judge(evidence(times(1)), evidence(times(1), nothing), rule, informing=())
    assert [(each.verdict, each.note) for each in found] == [
        (Verdict.INCONCLUSIVE, "quality was not measured"),
        (Verdict.INCONCLUSIVE, "no text"),
    ]


def items(broken: int, fixed: int, kept: int, total: int) -> dict[str, Any]:
    return {"tasks": {"items": total, "correct": kept + fixed, "broken": ["b"] * broken, "fixed": ["f"] * fixed}}


@pytest.mark.parametrize(
    ("broken", "fixed", "kept", "total", "verdict"),
    [
        (0, 0, 4000, 5000, Verdict.PASS),
        (40, 45, 4000, 5000, Verdict.PASS),
        (600, 0, 3400, 5000, Verdict.FAIL),
        (1, 1, 30, 60, Verdict.INCONCLUSIVE),
    ],
)
def test_task_scores_are_judged_by_their_flips(broken: int, fixed: int, kept: int, total: int, verdict: Verdict) -> None:
    known = {"mc.accuracy": value("mc.accuracy", (kept + fixed) / total)}
    rule = gates({"mc.accuracy": {"max_drop": "2%"}})
    candidate = evidence(times(1), known, items(broken, fixed, kept, total))
    (each,) = judge(evidence(times(1)), candidate, rule, informing=())
    assert each.verdict is verdict
    assert each.candidate == pytest.approx((kept + fixed) / total)
    assert each.baseline == pytest.approx((kept + broken) / total)
    assert each.effect == pytest.approx((fixed - broken) / total)


@pytest.mark.parametrize(("low", "high", "verdict"), [(-0.01, 0.01, Verdict.PASS), (-0.3, -0.1, Verdict.FAIL)])
def test_a_limit_of_the_difference_is_about_the_difference(low: float, high: float, verdict: Verdict) -> None:
    known = {"mc.delta": value("mc.delta", (low + high) / 2, low=low, high=high)}
    rule = gates({"mc.delta": {"min": -0.02}})
    (each,) = judge(evidence(times(1)), evidence(times(1), known, items(100, 0, 500, 1000)), rule, informing=())
    assert each.verdict is verdict
    assert each.candidate == pytest.approx((low + high) / 2)


def test_a_drop_of_the_difference_is_judged_by_the_flips() -> None:
    known = {"mc.delta": value("mc.delta", -0.1)}
    rule = gates({"mc.delta": {"max_drop": "2%"}})
    (each,) = judge(evidence(times(1)), evidence(times(1), known, items(100, 0, 500, 1000)), rule, informing=())
    assert each.verdict is Verdict.FAIL
    assert each.effect == pytest.approx(-0.1)


def test_pass_shares_are_judged_by_their_prompts() -> None:
    known = {"behaviour.pass_share": value("behaviour.pass_share", 0.4)}
    quality = {"behaviour": {"broken": 500, "fixed": 0, "kept": 400, "checked": 1000}}
    rule = gates({"behaviour.pass_share": {"max_drop": "2%"}})
    (each,) = judge(evidence(times(1)), evidence(times(1), known, quality), rule, informing=())
    assert each.verdict is Verdict.FAIL
    assert (each.baseline, each.candidate) == (0.9, 0.4)


def test_a_share_of_agreement_drops_from_the_reference_against_itself() -> None:
    rule = gates({"top1_agreement": {"max_drop": "2%"}})
    for share, verdict in ((0.99, Verdict.PASS), (0.95, Verdict.FAIL)):
        known = {"top1_agreement": value("top1_agreement", share, low=share - 0.005, high=share + 0.005)}
        (each,) = judge(evidence(times(1)), evidence(times(1), known), rule, informing=())
        assert each.verdict is verdict
        assert each.effect == pytest.approx(share - 1)


def test_other_shares_of_behaviour_are_plain_values() -> None:
    known = {"behaviour.same_share": value("behaviour.same_share", 0.4, low=0.35, high=0.45)}
    quality = {"behaviour": {"broken": 5, "fixed": 0, "kept": 4, "checked": 10}}
    rule = gates({"behaviour.same_share": {"min": 0.5}})
    (each,) = judge(evidence(times(1)), evidence(times(1), known, quality), rule, informing=())
    assert each.verdict is Verdict.FAIL
