"""Hand-made results with numbers of the size that a small model on two CPU cores gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from infopt import figures
from infopt.comparison import ArmResult, Comparison
from infopt.judgement import Judgement, Verdict
from infopt.result import Arm, Block, Run, Value

REFERENCE = "SmolLM2-135M-Instruct, dequantized from Q4_1/Q8_0"
ENVIRONMENT: dict[str, Any] = {
    "fingerprint": "3f9a1c",
    "device": "cpu",
    "cpu": "AMD EPYC 9R14",
    "cores": 2,
    "threads": 2,
    "memory_bytes": 25_200_000_000,
    "libraries": {"torch": "2.13.0+cpu", "transformers": "5.23.0"},
}
WORKLOAD: dict[str, Any] = {
    "kind": "fixed_shape", "name": "128+64x1", "prompt_tokens": 128, "new_tokens": 64, "batch": 1,
    "requests": 3, "prompts_hash": "c0ffee",
}  # fmt: skip
PAIRS = 10

# label: tok/s, TTFT (s), TPOT (s), MBU, weights, peak, KLD, perplexity ratio, top-1, choice Δ, flips
NUMBERS = {
    "baseline": (14.2, 0.380, 0.0704, 0.162, 538_090_000, 1_034e6, 0.0, (1.0, 1.0, 1.0), 1.0, 0.0, 0.0),
    "int8": (15.6, 0.402, 0.0641, 0.058, 163_400_000, 741e6, 0.0021, (1.003, 1.001, 1.005), 0.978, 0.0, 0.017),
    "nf4": (19.7, 0.391, 0.0508, 0.049, 110_200_000, 909e6, 0.0312, (1.041, 1.030, 1.052), 0.911, -0.017, 0.083),
    "rtn_int4+prompt_lookup": (16.1, 0.377, 0.0622, None, 98_700_000, 722e6, 0.0644, (1.083, 1.069, 1.097), 0.874, -0.033, 0.1),
    "int8_naive": (36.9, 0.160, 0.0271, None, 135_000_000, 1_610e6, 1.0512, (3.229, 3.011, 3.463), 0.482, -0.1, 0.3),
}  # fmt: skip


def arm(label: str) -> Arm:
    recipe = {"version": 1, "name": label, "steps": [] if label == "baseline" else [{label.split("+")[0]: {}}]}
    return Arm(
        label=label, model="demo", reference=REFERENCE, reference_hash="ab12", recipe=recipe, engine="transformers",
        dtype="float32", device="cpu",
    )  # fmt: skip


def value(
    key: str, number: float | None, low: float | None = None, high: float | None = None, reason: str | None = None
) -> Value:
    figure, statistic = figures.find(key)
    samples = PAIRS * 3 if statistic else None
    return Value(value=number, unit=figure.unit, id=figure.id, samples=samples, low=low, high=high, reason=reason)


def arm_result(label: str) -> ArmResult:
    rate, ttft, tpot, mbu, weights, peak, kld, ppl, top1, delta, flips = NUMBERS[label]
    found = {
        "decode_tok_per_s.p50": value("decode_tok_per_s.p50", rate),
        "ttft_s.p50": value("ttft_s.p50", ttft),
        "tpot_s.p50": value("tpot_s.p50", tpot),
        "tpot_s.p95": value("tpot_s.p95", tpot * 1.12),
        "mbu": value("mbu", mbu, reason=None if mbu else "packed weights are not read as stored"),
        "weights_bytes": value("weights_bytes", weights),
        "host_rss_peak_bytes": value("host_rss_peak_bytes", peak),
        "energy_j_per_token": value("energy_j_per_token", None, reason="no energy counter is readable here"),
        "kld.mean": value("kld.mean", kld, kld * 0.94, kld * 1.06),
        "ppl_ratio": value("ppl_ratio", *ppl),
        "top1_agreement": value("top1_agreement", top1),
        "mc.delta": value("mc.delta", delta, delta - 0.06, delta + 0.06),
        "mc.flips_share": value("mc.flips_share", flips),
    }
    drift = [1 + 0.06 * math.sin(1.3 * i) for i in range(PAIRS)]
    own = [1 + 0.02 * math.cos(2.1 * i + len(label)) for i in range(PAIRS)]
    blocks = {
        key: tuple(base * d * o for d, o in zip(drift, own, strict=True))
        for key, base in (("tpot_s.p50", tpot), ("ttft_s.p50", ttft))
    }
    return ArmResult(label=label, arm=arm(label), figures=found, limits={"decode_s": 0.0114}, blocks=blocks)


def judged(key: str, gate: str | None, verdict: Verdict | None, **fields: Any) -> Judgement:
    figure, _ = figures.find(key)
    return Judgement(figure=key, id=figure.id, unit=figure.unit, gate=gate, verdict=verdict, **fields)


def timed(
    key: str, label: str, gate: str | None, tau: float, verdict: Verdict, spread: float = 0.018, note: str | None = None
) -> Judgement:
    base, own = (NUMBERS[name][1 if key.startswith("ttft") else 2] for name in ("baseline", label))
    effect = own / base
    return judged(
        key, gate, verdict, baseline=base, candidate=own, effect=effect, low=effect * (1 - spread), high=effect * (1 + spread),
        alpha=0.05 if gate is None else 0.025, p=0.001, pairs=PAIRS, mde=spread * 1.3, tau=tau, note=note,
        pairs_needed=38 if note else None,
    )  # fmt: skip


def limited(key: str, label: str, gate: str, limit: float, verdict: Verdict) -> Judgement:
    own = arm_result(label).figures[key]
    return judged(
        key, gate, verdict, comparison="value", baseline=NUMBERS["baseline"][6], candidate=own.value, effect=own.value,
        low=own.low, high=own.high, alpha=0.05, tau=limit,
    )  # fmt: skip


def judgements(label: str, tpot: Verdict, ttft: Verdict, kld: Verdict) -> tuple[Judgement, ...]:
    weights = NUMBERS[label][4]
    unsure = "this machine cannot see 3.0 %; needs about 38 pairs" if ttft is Verdict.INCONCLUSIVE else None
    return (
        timed("tpot_s.p50", label, "max_regress 3.0 %", 0.03, tpot),
        timed("ttft_s.p50", label, "max_regress 3.0 %", 0.03, ttft, 0.045 if unsure else 0.018, unsure),
        judged(
            "weights_bytes", None, Verdict.IMPROVED, baseline=NUMBERS["baseline"][4], candidate=weights,
            effect=weights / NUMBERS["baseline"][4], tau=0.02,
        ),
        limited("kld.mean", label, "max 0.0500 nats", 0.05, kld),
        scored(NUMBERS[label][9]),
    )  # fmt: skip


def scored(delta: float) -> Judgement:
    """Sixty multiple-choice items: enough to see a collapse, too few to show that nothing was lost."""
    verdict = Verdict.FAIL if delta + 0.06 < -0.02 else Verdict.INCONCLUSIVE
    note = "60 items cannot show a drop of 2.0 %; needs about 1592 items"
    return judged(
        "mc.accuracy", None, verdict, comparison="difference", baseline=0.45, candidate=0.45 + delta, effect=delta,
        low=delta - 0.06, high=delta + 0.06, alpha=0.05, mde=0.103, tau=0.02, note=note,
    )  # fmt: skip


@pytest.fixture
def comparison() -> Comparison:
    good, unsure, bad = Verdict.IMPROVED, Verdict.INCONCLUSIVE, Verdict.FAIL
    same = timed("tpot_s.p50", "baseline", None, 0.03, Verdict.PASS)
    return Comparison(
        id="20261122T101500Z-demo-9c1d", created_utc="2026-11-22T10:15:00Z", is_complete=True, mode="live",
        infopt_version="0.1.0",
        environment=ENVIRONMENT, workload=WORKLOAD, settings={"seed": 0, "pairs": PAIRS, "threads": 2}, baseline="baseline",
        arms=tuple(map(arm_result, NUMBERS)),
        judgements={
            "int8": judgements("int8", good, bad, Verdict.PASS),
            "nf4": judgements("nf4", good, unsure, Verdict.PASS),
            "rtn_int4+prompt_lookup": judgements("rtn_int4+prompt_lookup", good, unsure, bad),
            "int8_naive": judgements("int8_naive", good, good, bad),
        },
        self_test=(same,),
        warnings=("other processes took up to 0.31 cores during 2 of 50 blocks (limit 0.15): stop other work and measure again",),
        pairs=PAIRS, exit_code=3,
    )  # fmt: skip


@pytest.fixture
def passing(comparison: Comparison) -> Comparison:
    """Two arms, every gate reached."""
    both = comparison.arms[:2]
    passed = judgements("int8", Verdict.IMPROVED, Verdict.PASS, Verdict.PASS)
    return comparison.model_copy(update={"arms": both, "judgements": {"int8": passed}, "warnings": (), "exit_code": 0})


@pytest.fixture
def run() -> Run:
    result = arm_result("int8")
    more = {
        f"ttft_s.{name}": value("ttft_s." + name, 0.402 * factor) for name, factor in (("p90", 1.05), ("p95", 1.08), ("p99", 1.2))
    }
    blocks = tuple(Block(arm="int8", index=i, round=i, position=0, wall_s=14.0, other_cpu_cores=0.02) for i in range(3))
    return Run(
        id="20261122T100000Z-int8-77aa", name="int8", created_utc="2026-11-22T10:00:00Z", is_complete=True,
        infopt_version="0.1.0", arm=arm("int8"), workload=WORKLOAD, workload_hash="beef",
        environment=ENVIRONMENT, settings={"seed": 0},
        figures={**result.figures, **more}, blocks=blocks, limits=result.limits, noise={"tpot_s.p50": 0.011},
        warnings=("warm-up stopped at its cap of 20 iterations while the times still showed a trend: raise the cap",),
    )  # fmt: skip


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Any:
    """Compares text with `golden/NAME`; INFOPT_UPDATE_GOLDEN=1 writes it instead."""
    import os

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if os.environ.get("INFOPT_UPDATE_GOLDEN") == "1":
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return check
