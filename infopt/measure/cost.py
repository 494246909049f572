"""Dollars per million tokens. The price is the user's; infopt knows none."""

from __future__ import annotations

import math

from infopt.errors import InputError
from infopt.measure.value import value
from infopt.result import Value


def usd_per_mtok(price_per_hour: float, tok_per_s: float, utilisation: float = 1.0) -> float:
    """price per hour ÷ 3600 ÷ tok/s × 10⁶ ÷ utilisation. `utilisation` in (0, 1]. Raises InputError."""
    if not 0 < price_per_hour < math.inf:
        raise InputError(f"price per hour is {price_per_hour}; allowed: above 0")
    if not 0 < utilisation <= 1:
        raise InputError(f"utilisation is {utilisation}; allowed: above 0, up to 1")
    return price_per_hour / 3600 / tok_per_s * 1e6 / utilisation


def cost_values(
    price_per_hour: float | None,
    utilisation: float = 1.0,
    *,
    throughput_tok_per_s: float | None,
    decode_tok_per_s: float | None = None,
    prefill_tok_per_s: float | None = None,
) -> dict[str, Value]:
    """Input and output priced apart when both phases were timed; otherwise the output carries the whole window."""
    output, prompt = "usd_per_mtok_output", "usd_per_mtok_input"
    if price_per_hour is None:
        reason = "no price was given"
        return {key: value(key, None, reason=reason) for key in (output, prompt)}
    is_apart = decode_tok_per_s is not None and prefill_tok_per_s is not None
    rates = {
        output: decode_tok_per_s if is_apart else throughput_tok_per_s,
        prompt: prefill_tok_per_s if is_apart else None,
    }
    reasons = {output: "no throughput was measured", prompt: "prefill and decode were not timed apart"}
    return {
        key: value(key, usd_per_mtok(price_per_hour, rate, utilisation) if rate else None, reason=reasons[key])
        for key, rate in rates.items()
    }
