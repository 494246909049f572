"""Figures of time from raw samples: one definition each, as METRICS section 1 gives them.

A static batch is one sample: its rows share every emission, so a latency is that of each row, and a rate counts all rows.
Nothing is removed as an outlier. What is undefined for a sample is None and takes no part in a statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from infopt import figures, stats
from infopt.errors import InputError, unknown
from infopt.measure.value import statistics, value
from infopt.result import Block, Sample, Value


def ttft_s(sample: Sample) -> float | None:
    """Submission to the first token on the host."""
    return sample.emission_s[0] if sample.emission_s else None


def prefill_s(sample: Sample) -> float | None:
    """The forward passes that consumed the prompt."""
    return sample.prefill_s


def e2e_s(sample: Sample) -> float | None:
    """Submission to the last token on the host."""
    return sample.emission_s[-1] if sample.emission_s else None


def decode_s(sample: Sample) -> float | None:
    """First to last token; None for one token, or when all tokens came in one emission: no gap was seen."""
    if sample.out_tokens <= 1 or len(sample.emission_s) < 2:
        return None
    return sample.emission_s[-1] - sample.emission_s[0]


def tpot_s(sample: Sample) -> float | None:
    """(e2e − ttft)/(out − 1)."""
    seconds = decode_s(sample)
    return None if seconds is None else seconds / (sample.out_tokens - 1)


def step_gaps_s(sample: Sample) -> list[float]:
    """Raw gaps between emissions."""
    return [later - earlier for earlier, later in pairwise(sample.emission_s)]


def itl_s(sample: Sample) -> list[float]:
    """Each gap divided by the tokens that the later step emitted."""
    return [gap / tokens for gap, tokens in zip(step_gaps_s(sample), sample.emission_tokens[1:], strict=True)]


def tokens_per_step(sample: Sample) -> float | None:
    """(out − 1)/(steps − 1)."""
    steps = len(sample.emission_s)
    return None if decode_s(sample) is None else (sample.out_tokens - 1) / (steps - 1)


def decode_tok_per_s(sample: Sample) -> float | None:
    """batch · (out − 1)/decode seconds."""
    seconds = decode_s(sample)
    return sample.batch * (sample.out_tokens - 1) / seconds if seconds else None


def prefill_tok_per_s(sample: Sample) -> float | None:
    """batch · prompt/prefill seconds."""
    return sample.batch * sample.prompt_tokens / sample.prefill_s if sample.prefill_s else None


def scheduled_latency_s(sample: Sample) -> float | None:
    """Intended start to end, so that time spent waiting for a busy engine counts. None in a closed loop."""
    end = e2e_s(sample)
    if sample.scheduled_s is None or end is None:
        return None
    return sample.submitted_s + end - sample.scheduled_s


PER_REQUEST: dict[str, Callable[[Sample], float | None]] = {
    "ttft_s": ttft_s,
    "prefill_s": prefill_s,
    "e2e_s": e2e_s,
    "tpot_s": tpot_s,
    "tokens_per_step": tokens_per_step,
    "decode_tok_per_s": decode_tok_per_s,
    "prefill_tok_per_s": prefill_tok_per_s,
    "scheduled_latency_s": scheduled_latency_s,
}
_UNDEFINED = {
    "prefill_s": "the engine does not tell prefill apart",
    "prefill_tok_per_s": "the engine does not tell prefill apart",
    "scheduled_latency_s": "no request had a scheduled time",
}
_NO_STEP = "no request had a second emission"


def values(samples: Sequence[Sample], name: str) -> list[float]:
    """The values of a sampled figure over `samples`, warm-up and failed requests left out. Raises InputError."""
    good = _good(samples)
    if name == "itl_s":
        return [gap for sample in good for gap in itl_s(sample)]
    if name not in PER_REQUEST:
        raise InputError(unknown("sampled figure", name, [*PER_REQUEST, "itl_s"]))
    return [number for sample in good if (number := PER_REQUEST[name](sample)) is not None]


def _good(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if not sample.warmup and sample.error is None]


def _measured(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if not sample.warmup]


# --- Objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goodput:
    """Requests by what became of them. `errors` met nothing; `undetermined` broke no objective but had an undefined one."""

    met: int
    missed: int
    errors: int
    undetermined: int

    @property
    def total(self) -> int:
        return self.met + self.missed + self.errors + self.undetermined


def goodput(samples: Sequence[Sample], objectives: Mapping[str, float]) -> Goodput:
    """Counts requests against upper limits such as {"ttft_s": 0.5, "tpot_s": 0.05}. Raises InputError for another figure."""
    allowed = [name for name in PER_REQUEST if name.endswith("_s") and not name.endswith("per_s")]
    for name in objectives:
        if name not in allowed:
            raise InputError(unknown("objective", name, allowed), hint="objectives are upper limits in seconds")
    counts = {"met": 0, "missed": 0, "errors": 0, "undetermined": 0}
    for sample in _measured(samples):
        counts[_outcome(sample, objectives)] += sample.batch
    return Goodput(**counts)


def _outcome(sample: Sample, objectives: Mapping[str, float]) -> str:
    if sample.error is not None:
        return "errors"
    numbers = [(PER_REQUEST[name](sample), limit) for name, limit in objectives.items()]
    if any(number is not None and number > limit for number, limit in numbers):
        return "missed"
    return "undetermined" if any(number is None for number, _ in numbers) else "met"


# --- Whole windows ---------------------------------------------------------------------------------------------------


def output_tokens(samples: Sequence[Sample]) -> int:
    """Tokens of all rows, warm-up left out."""
    return sum(sample.batch * sample.out_tokens for sample in _good(samples))


def _per_window(
    samples: Sequence[Sample], blocks: Sequence[Block], objectives: Mapping[str, float] | None
) -> dict[str, tuple[float | None, str]]:
    """Figures of the window that `blocks` make up, each with the reason that holds when it is None."""
    window = math.fsum(block.wall_s for block in blocks)
    good, tokens = _good(samples), output_tokens(samples)
    none = "no request was answered"
    found: dict[str, tuple[float | None, str]] = {
        "throughput_tok_per_s": (tokens / window if tokens and window else None, none),
        "acceptance": _acceptance(good),
    }
    outcome = goodput(samples, objectives) if objectives else None
    if outcome is None or not outcome.total:
        reason = "no objectives were given" if outcome is None else none
        return found | {"goodput_req_per_s": (None, reason), "goodput_share": (None, reason)}
    if outcome.undetermined == outcome.total:
        reason = "an objective is undefined for every request"
        return found | {"goodput_req_per_s": (None, reason), "goodput_share": (None, reason)}
    return found | {
        "goodput_req_per_s": (outcome.met / window if window else None, none),
        "goodput_share": (outcome.met / outcome.total, none),
    }


def _acceptance(good: Sequence[Sample]) -> tuple[float | None, str]:
    counted = [sample for sample in good if sample.drafted is not None and sample.accepted is not None]
    drafted = sum(sample.drafted or 0 for sample in counted)
    if not drafted:
        return None, "nothing was drafted" if counted else "no speculation, or the engine does not count drafts"
    return sum(sample.accepted or 0 for sample in counted) / drafted, ""


def _energy(samples: Sequence[Sample], blocks: Sequence[Block]) -> dict[str, tuple[float | None, str]]:
    """Joules over all blocks; one block without them makes the whole undefined."""
    keys = ("energy_j_per_token", "energy_net_j_per_token", "power_w")
    joules = [block.energy_j for block in blocks if block.energy_j is not None]
    tokens, window = output_tokens(samples), math.fsum(block.wall_s for block in blocks)
    if len(joules) < len(blocks) or not blocks or not tokens or not window:
        reasons = [
            flag.removeprefix(ENERGY_MISSING) for block in blocks for flag in block.flags if flag.startswith(ENERGY_MISSING)
        ]
        return dict.fromkeys(keys, (None, reasons[0] if reasons else "energy was not measured in every block"))
    gross = math.fsum(joules)
    idle = [block.idle_power_w * block.wall_s for block in blocks if block.idle_power_w is not None]
    net = gross - math.fsum(idle) if len(idle) == len(blocks) else None
    return {
        "energy_j_per_token": (gross / tokens, ""),
        "energy_net_j_per_token": (None if net is None else net / tokens, "idle power was not measured"),
        "power_w": (gross / window, ""),
    }


#: Opens the block flag that says why `Block.energy_j` is null.
ENERGY_MISSING = "energy.missing: "


def summarise(
    samples: Sequence[Sample], blocks: Sequence[Block], objectives: Mapping[str, float] | None = None
) -> dict[str, Value]:
    """Every figure that samples and blocks hold, by its key: latencies with all statistics, throughput, goodput, energy."""
    answered = "no request was answered" if not _good(samples) else None
    found: dict[str, Value] = {}
    for name in [*PER_REQUEST, "itl_s"]:
        found |= statistics(name, values(samples, name), answered or _UNDEFINED.get(name, _NO_STEP))
    for key, (number, reason) in (_per_window(samples, blocks, objectives) | _energy(samples, blocks)).items():
        found[key] = value(key, number, reason=answered or reason)
    return found


def block_values(
    samples: Sequence[Sample],
    key: str,
    blocks: Sequence[Block] = (),
    objectives: Mapping[str, float] | None = None,
) -> dict[int, float]:
    """The figure `key` of each block of one arm, by block index; blocks for which it is undefined are left out.

    `tpot_s.p50` is the median over the block's requests; figures of a window, such as throughput, need `blocks`.
    Raises InputError for an unknown key, or one that requests do not have.
    """
    figure, statistic = figures.find(key)
    by_block = {index: list(group) for index, group in groupby(sorted(samples, key=_block_index), key=_block_index)}
    found: dict[int, float | None] = {}
    if statistic is not None:
        found = {index: stats.statistic(values(group, figure.name), statistic) for index, group in by_block.items()}
    else:
        for block in blocks:
            group = by_block.get(block.index, [])
            numbers = _per_window(group, [block], objectives) | _energy(group, [block])
            if key not in numbers:
                raise InputError(f"{key} has no value per block", hint=f"per block: {', '.join(numbers)}")
            found[block.index] = numbers[key][0]
    return {index: number for index, number in found.items() if number is not None}


def _block_index(sample: Sample) -> int:
    return sample.block
