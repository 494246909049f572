"""The catalogue of figures: what infopt measures, its unit, which way is better, and the definition behind its id.

A figure whose definition changes gets a new id (`tpot_s.v2`); `run.json` carries the ids it used. Gates, comparisons
and reports look a figure up here, so a misspelt one is refused with the nearest name before anything runs.

Keys are `name` for one value per run (`weights_bytes`, `kld.mean`) and `name.statistic` for samples (`tpot_s.p50`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infopt.errors import InputError, unknown
from infopt.units import Unit

Kind = Literal["time", "memory", "energy", "cost", "quality", "limit"]
STATISTICS = ("p50", "p90", "p95", "p99", "mean", "min", "max")
#: Threshold below which a change is nobody's business, per kind of figure (METRICS: time 3 %, energy 5 %, memory 2 %).
DEFAULT_THRESHOLD: dict[str, float] = {"time": 0.03, "energy": 0.05, "cost": 0.03, "memory": 0.02, "limit": 0.03}


@dataclass(frozen=True)
class Figure:
    """`sampled`: one value per request, so a statistic (`.p50`) must be named; otherwise one value per run."""

    name: str
    version: int
    unit: Unit
    better: Literal["lower", "higher"]
    kind: Kind
    sampled: bool
    about: str

    @property
    def id(self) -> str:
        return f"{self.name}.v{self.version}"


def _time(name: str, about: str, unit: Unit = "s", better: Literal["lower", "higher"] = "lower") -> Figure:
    return Figure(name, 1, unit, better, "time", True, about)


def _single(name: str, unit: Unit, better: Literal["lower", "higher"], kind: Kind, about: str) -> Figure:
    return Figure(name, 1, unit, better, kind, False, about)


FIGURES: dict[str, Figure] = {
    figure.name: figure
    for figure in (
        _time("ttft_s", "request submitted → first generated token id on the host, queueing included"),
        _time("prefill_s", "forward passes that consume the prompt, up to the logits of the first token"),
        _time("e2e_s", "submitted → last token id on the host"),
        _time("tpot_s", "(e2e − ttft)/(out − 1); undefined for out ≤ 1"),
        _time("itl_s", "gap between emission steps ÷ tokens emitted in the later step"),
        _time("tokens_per_step", "(out − 1)/(steps − 1)", "tokens", "higher"),
        _time("decode_tok_per_s", "batch · (out − 1)/decode seconds", "tok/s", "higher"),
        _time("prefill_tok_per_s", "batch · prompt/prefill_s, tokens that a prefix cache held included", "tok/s", "higher"),
        _time("scheduled_latency_s", "intended start → end, open-loop load only"),
        _single("throughput_tok_per_s", "tok/s", "higher", "time", "output tokens ÷ wall time of the measured window"),
        _single("goodput_req_per_s", "req/s", "higher", "time", "requests meeting all objectives ÷ window"),
        _single("goodput_share", "share", "higher", "time", "requests meeting all objectives ÷ all requests, errors included"),
        _single("candidates_cost_ratio", "ratio", "lower", "time", "seconds of a request with all candidates ÷ with 1"),
        _single("acceptance", "share", "higher", "time", "accepted ÷ drafted tokens of speculative decoding"),
        _single("load_s", "s", "lower", "time", "reading and placing the weights, libraries imported before"),
        _single("first_run_s", "s", "lower", "time", "first request after load, kept apart from steady state"),
        _single("optimize_s", "s", "lower", "time", "the recipe's weight steps, when the artifact was made"),
        _single("weights_bytes", "bytes", "lower", "memory", "weights as stored on disk, packed"),
        _single("resident_weights_bytes", "bytes", "lower", "memory", "parameters and buffers as held while running"),
        _single("kv_bytes", "bytes", "lower", "memory", "KV cache at the longest context of the workload, from shapes"),
        _single("host_rss_peak_bytes", "bytes", "lower", "memory", "peak resident memory of the measuring process"),
        _single("torch_peak_bytes", "bytes", "lower", "memory", "torch's peak allocated device memory"),
        _single("device_peak_bytes", "bytes", "lower", "memory", "device memory used by this process's run, from NVML"),
        _single("energy_j_per_token", "J/tok", "lower", "energy", "gross energy of the window ÷ output tokens"),
        _single("energy_net_j_per_token", "J/tok", "lower", "energy", "energy above idle ÷ output tokens"),
        _single("power_w", "W", "lower", "energy", "mean power over the window"),
        _single("usd_per_mtok_output", "usd/Mtok", "lower", "cost", "price per hour ÷ 3600 ÷ tok/s × 1e6 ÷ utilisation"),
        _single("usd_per_mtok_input", "usd/Mtok", "lower", "cost", "the same over prefill tokens"),
        _single("mbu", "share", "higher", "limit", "decode: limit ÷ measured step time"),
        _single("mfu", "share", "higher", "limit", "prefill: limit ÷ measured time"),
        _single("kld.mean", "nats", "lower", "quality", "KLD(reference ‖ candidate) per token, mean"),
        _single("kld.median", "nats", "lower", "quality", "KLD(reference ‖ candidate) per token, median"),
        _single("kld.p99", "nats", "lower", "quality", "KLD(reference ‖ candidate) per token, 99th percentile"),
        _single("kld.max", "nats", "lower", "quality", "KLD(reference ‖ candidate) per token, largest"),
        _single("ppl_ratio", "ratio", "lower", "quality", "exp(mean paired ΔNLL): perplexity ÷ the reference's"),
        _single("top1_agreement", "share", "higher", "quality", "positions whose most likely token is the reference's"),
        _single("rms_dp", "share", "lower", "quality", "RMS change of the true token's probability"),
        _single("behaviour.pass_share", "share", "higher", "quality", "prompts whose checks pass"),
        _single("behaviour.broken_share", "share", "lower", "quality", "prompts that the reference passes and this fails"),
        _single("behaviour.same_share", "share", "higher", "quality", "prompts answered with the reference's exact tokens"),
        _single("mc.accuracy", "share", "higher", "quality", "multiple choice by log-likelihood per byte"),
        _single("mc.delta", "share", "higher", "quality", "multiple-choice accuracy minus the reference's"),
        _single(
            "mc.retention",
            "ratio",
            "higher",
            "quality",
            "lead over the majority class ÷ the reference's, where there are classes",
        ),
        _single("mc.flips_share", "share", "lower", "quality", "items whose correctness changed against the reference"),
    )
}


def find(key: str) -> tuple[Figure, str | None]:
    """The figure and statistic that `key` names. Raises InputError with the nearest key."""
    if key in FIGURES:
        figure = FIGURES[key]
        if not figure.sampled:
            return figure, None
        raise InputError(f"{key} has one value per request; name a statistic", hint=f"e.g. {key}.p50; of {', '.join(STATISTICS)}")
    name, _, statistic = key.rpartition(".")
    if name in FIGURES and FIGURES[name].sampled and statistic in STATISTICS:
        return FIGURES[name], statistic
    raise InputError(unknown("figure", key, all_keys()), hint="docs/METRICS.md lists every figure")


def all_keys() -> list[str]:
    """Every key that a gate or a report may use."""
    keys: list[str] = []
    for figure in FIGURES.values():
        keys += [f"{figure.name}.{s}" for s in STATISTICS] if figure.sampled else [figure.name]
    return keys
