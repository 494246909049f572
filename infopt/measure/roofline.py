"""How far a figure is from what the hardware allows: two resources, memory traffic and arithmetic.

With W the stored weight bytes that a step reads, k the KV bytes per token, n the context, b the batch, BW and F the
measured read and matrix-multiply rates (Williams et al. 2009, doi:10.1145/1498765.1498785):

    decode step ≥ max((W + b·k·n)/BW, b·(2·P + 4·L·H·d·n)/F)         P: parameters of the linears and the head
    prefill     ≥ max(b·(2·P_lin·(T − r) + 2·P_head + 2·L·H·d·(T² − r²))/F, W/BW)
                                                                      causal attention over T tokens, r of them cached
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infopt.measure.latency import decode_s, values
from infopt.measure.value import value
from infopt.protocols import Machine, Shapes
from infopt.result import Sample, Value
from infopt.stats import percentile


@dataclass(frozen=True)
class Limit:
    """The shortest time the hardware allows. A part is None when the rate it needs was not measured."""

    memory_s: float | None
    compute_s: float | None

    @property
    def seconds(self) -> float | None:
        parts = [part for part in (self.memory_s, self.compute_s) if part is not None]
        return max(parts) if parts else None

    @property
    def bound(self) -> str | None:
        """The resource that binds."""
        if self.seconds is None:
            return None
        return "memory" if self.seconds == self.memory_s else "compute"


def touched_weight_bytes(shapes: Shapes, stored_bytes: int, embedding_element_bytes: float) -> int:
    """Of all stored weights, those that a decode step reads: not the input embedding, which is a gather; a tied head once."""
    return stored_bytes - (0 if shapes.is_head_tied else math.ceil(shapes.embedding * embedding_element_bytes))


def kv_bytes(samples: Sequence[Sample], shapes: Shapes, element_bytes: int) -> Value:
    """KV cache of the longest request that was run, warm-up included."""
    longest = max((s.batch * (s.prompt_tokens + s.out_tokens) for s in samples), default=0)
    return value("kv_bytes", float(longest * shapes.kv_bytes_per_token(element_bytes)))


def decode_limit(
    shapes: Shapes,
    machine: Machine,
    *,
    weights_bytes: float,
    kv_element_bytes: int,
    batch: int,
    context: float,
    dtype: str,
) -> Limit:
    """One decode step of `batch` rows at `context` tokens. `weights_bytes`: touched ones; `dtype`: of the arithmetic."""
    kv = batch * shapes.kv_bytes_per_token(kv_element_bytes) * context
    attention = 4 * shapes.layers * shapes.heads * shapes.head_dim * context
    flops = batch * (2 * (shapes.linear_parameters + shapes.head_parameters) + attention)
    return _limit(machine, weights_bytes + kv, flops, dtype)


def prefill_limit(
    shapes: Shapes, machine: Machine, *, weights_bytes: float, batch: int, prompt: int, dtype: str, reused: int = 0
) -> Limit:
    """Forward passes over `batch` prompts of `prompt` tokens, the first `reused` of which a prefix cache held; logits of
    the last one only."""
    attention = 2 * shapes.layers * shapes.heads * shapes.head_dim * (prompt**2 - reused**2)
    flops = batch * (2 * shapes.linear_parameters * (prompt - reused) + 2 * shapes.head_parameters + attention)
    return _limit(machine, weights_bytes, flops, dtype)


def _limit(machine: Machine, traffic_bytes: float, flops: float, dtype: str) -> Limit:
    rate = machine.flops.get(dtype)
    return Limit(traffic_bytes / machine.read_bytes_per_s if machine.read_bytes_per_s else None, flops / rate if rate else None)


def step_s(sample: Sample) -> float | None:
    """Mean time of a decode step."""
    seconds = decode_s(sample)
    return None if seconds is None else seconds / (len(sample.emission_s) - 1)


def shares_of_limit(
    samples: Sequence[Sample],
    shapes: Shapes,
    machine: Machine,
    *,
    weights_bytes: float,
    kv_element_bytes: int,
    dtype: str,
) -> tuple[dict[str, Value], dict[str, Any]]:
    """`mbu` and `mfu`, each the median over requests of limit ÷ measured, and the inputs they came from.

    `dtype`: what the layers multiply in.
    """
    good = [sample for sample in samples if not sample.warmup and sample.error is None]
    decode, prefill = list[tuple[Limit, float]](), list[tuple[Limit, float]]()
    for sample in good:
        if (seconds := step_s(sample)) is not None:
            context = sample.prompt_tokens + sample.out_tokens / 2
            limit = decode_limit(
                shapes,
                machine,
                weights_bytes=weights_bytes,
                kv_element_bytes=kv_element_bytes,
                batch=sample.batch,
                context=context,
                dtype=dtype,
            )
            decode.append((limit, seconds))
        if sample.prefill_s:
            limit = prefill_limit(
                shapes,
                machine,
                weights_bytes=weights_bytes,
                batch=sample.batch,
                prompt=sample.prompt_tokens,
                dtype=dtype,
                reused=sample.reused_tokens or 0,
            )
            prefill.append((limit, sample.prefill_s))
    in_cache = _fits_in_cache(machine, weights_bytes)
    found = {
        "mbu": _share("mbu", decode, in_cache or (None if machine.read_bytes_per_s else "no read rate was measured")),
        "mfu": _share("mfu", prefill, None if machine.flops.get(dtype) else f"no {dtype} matrix-multiply rate was measured"),
    }
    details = {
        "weights_touched_bytes": weights_bytes,
        "dtype": dtype,
        "read_bytes_per_s": machine.read_bytes_per_s,
        "flops": dict(machine.flops),
        "decode_limit_s": _median([limit.seconds for limit, _ in decode]),
        "decode_bound": decode[0][0].bound if decode else None,
        "decode_step_s": _median([seconds for _, seconds in decode]),
        "prefill_limit_s": _median([limit.seconds for limit, _ in prefill]),
        "prefill_bound": prefill[0][0].bound if prefill else None,
        "prefill_s": percentile(values(good, "prefill_s"), 50),
    }
    return found, details


def _fits_in_cache(machine: Machine, weights_bytes: float) -> str | None:
    cache = machine.last_level_cache_bytes
    if not cache or weights_bytes > cache:
        return None
    return f"the weights ({weights_bytes:.0f} bytes) fit in the last-level cache ({cache} bytes), so no memory limit holds"


def _share(key: str, pairs: Sequence[tuple[Limit, float]], reason: str | None) -> Value:
    if reason or not pairs:
        return value(key, None, reason=reason or "no request timed this phase")
    share = _median([limit.seconds / seconds for limit, seconds in pairs if limit.seconds is not None])
    if share is not None and share > 1:
        why = f"measured at {share:.2f} of the limit: the peak was measured too low, or a cache did part of the work"
        return value(key, None, reason=why)
    return value(key, share, samples=len(pairs))


def _median(numbers: Sequence[float | None]) -> float | None:
    return percentile([number for number in numbers if number is not None], 50)
