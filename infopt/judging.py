"""From measured arms to judgements: which judge serves which figure, live or stored, with Holm over the gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from infopt import figures, verdict
from infopt.errors import InputError
from infopt.gates import Gate
from infopt.judgement import DEFAULT_ALPHA, Judgement, apply_holm, undecided
from infopt.measure import latency
from infopt.result import Block, Sample, Value

#: Judged without a gate, to inform.
INFORMING = (
    "ttft_s.p50", "tpot_s.p50", "decode_tok_per_s.p50", "prefill_tok_per_s.p50", "e2e_s.p50",
    "weights_bytes", "resident_weights_bytes", "host_rss_peak_bytes",
    "kld.mean", "ppl_ratio", "top1_agreement", "mc.accuracy", "behaviour.pass_share",
)  # fmt: skip
#: What the reference scores against itself.
OF_ITSELF = {"top1_agreement": 1.0, "behaviour.same_share": 1.0}
TAILS = ("p90", "p95", "p99")
ONCE = ("load_s", "first_run_s", "optimize_s", "candidates_cost_ratio")
#: Figures that every block has its own value of.
PER_BLOCK = tuple(key for key in figures.all_keys() if figures.find(key)[0].kind in ("time", "energy") and key not in ONCE)


@dataclass(frozen=True)
class Evidence:
    """What is known of one arm, from a live run or a stored one."""

    samples: Sequence[Sample]
    blocks: Sequence[Block]
    figures: Mapping[str, Value]
    quality: Mapping[str, Any] = field(default_factory=dict)
    objectives: Mapping[str, float] = field(default_factory=dict)

    def series(self, key: str, indices: Sequence[int]) -> list[float | None]:
        """The figure of each block, in the order of `indices`."""
        found = latency.block_values(self.samples, key, self.blocks, self.objectives or None)
        return [found.get(index) for index in indices]

    def requests(self, name: str, indices: Sequence[int]) -> list[list[float]]:
        """A sampled figure of every request, by block."""
        return [latency.values([s for s in self.samples if s.block == index], name) for index in indices]

    def indices(self) -> list[int]:
        return sorted(block.index for block in self.blocks)


def judge(
    baseline: Evidence,
    candidate: Evidence,
    gates: Sequence[Gate],
    *,
    is_live: bool = True,
    noise: Mapping[str, float] | None = None,
    alpha: float = DEFAULT_ALPHA,
    informing: Sequence[str] = INFORMING,
    no_quality: str | None = None,
    pending: int = 0,
) -> tuple[Judgement, ...]:
    """Every gate, then every informing figure without one. `noise`: the stored A/A deviations, for stored runs.

    `no_quality`: why the candidate's quality says nothing about this baseline; its verdicts are then INCONCLUSIVE.
    `pending`: gates on figures that are still to be measured.
    """
    gated = {gate.figure for gate in gates}
    wanted: list[tuple[str, Gate | None]] = [(gate.figure, gate) for gate in gates]
    wanted += [(key, None) for key in informing if key not in gated and _is_known(key, candidate)]
    judges = [
        _quality(key, gate, candidate, no_quality)
        if figures.find(key)[0].kind == "quality"
        else _judge_for(key, gate, baseline, candidate, is_live, noise or {})
        for key, gate in wanted
    ]
    return apply_holm(judges, alpha, pending)


def _is_known(key: str, candidate: Evidence) -> bool:
    found = candidate.figures.get(key)
    return found is not None and found.value is not None


def _judge_for(
    key: str, gate: Gate | None, baseline: Evidence, candidate: Evidence, is_live: bool, noise: Mapping[str, float]
) -> Callable[[float], Judgement]:
    figure, statistic = figures.find(key)
    try:
        indices = candidate.indices() if is_live else []
        if not is_live:
            stored = baseline.series(key, baseline.indices()), candidate.series(key, candidate.indices())
            return lambda alpha: verdict.judge_stored(key, *stored, gate, noise.get(key), alpha)
        if statistic in TAILS:
            tails = baseline.requests(figure.name, indices), candidate.requests(figure.name, indices)
            return lambda alpha: verdict.judge_tail(key, *tails, gate, alpha)
        pairs = baseline.series(key, indices), candidate.series(key, indices)
        return lambda alpha: verdict.judge_paired(key, *pairs, gate, alpha)
    except InputError:  # one value per run, not per block
        before, after = _number(baseline, key), _number(candidate, key)
        if figure.kind == "memory" or (gate is not None and gate.is_absolute) or before is None or after is None:
            return lambda alpha: verdict.judge_point(key, before, after, gate)
        # Bytes repeat exactly; seconds, dollars and shares of a limit do not.
        reason = "one value per run, so nothing tells a change from noise; gate a figure that every block has"
        return lambda alpha: undecided(key, gate, reason, baseline=before, candidate=after)


def _quality(key: str, gate: Gate | None, candidate: Evidence, no_quality: str | None) -> Callable[[float], Judgement]:
    """From the candidate alone: its quality is measured against the reference, which must be the baseline itself."""
    found = candidate.figures.get(key)
    if found is None or found.value is None:
        reason = (found.reason if found else None) or "quality was not measured"
        return lambda alpha: undecided(key, gate, reason)
    if no_quality:
        return lambda alpha: undecided(key, gate, no_quality, candidate=found.value)
    items = candidate.quality.get("behaviour" if key.startswith("behaviour") else "tasks")
    # `mc.delta: {min: …}` limits the difference itself, not the share it is a difference of.
    is_limit_of_difference = key == "mc.delta" and gate is not None and gate.is_absolute
    if items and key in ("mc.accuracy", "mc.delta", "behaviour.pass_share") and not is_limit_of_difference:
        broken, fixed, kept, total = _flips(items)
        return lambda alpha: verdict.judge_accuracy(key, kept, broken, fixed, total, gate, alpha)
    return partial(verdict.judge_absolute, key, found.value, found.low, found.high, gate, baseline=OF_ITSELF.get(key))


def _flips(items: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(broken, fixed, right on both, all) of task items or of prompts with rules."""
    if "items" in items:
        broken, fixed = len(items["broken"]), len(items["fixed"])
        return broken, fixed, items["correct"] - fixed, items["items"]
    return items["broken"], items["fixed"], items["kept"], items["checked"]


def _number(evidence: Evidence, key: str) -> float | None:
    found = evidence.figures.get(key)
    return None if found is None else found.value
