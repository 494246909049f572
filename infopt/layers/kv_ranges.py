"""How large keys and values get, seen where the cache would take them; and caches that a loader wraps, left alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


class Ranges:
    """Stands in for a KV cache while a block runs: holds nothing, and remembers the largest magnitude per key/value head.

    `largest`: `k_scale` and `v_scale` → float32 [kv heads].
    """

    def __init__(self) -> None:
        self.largest: dict[str, torch.Tensor] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """`keys`, after rotary embedding, and `values`: [batch, kv heads, tokens, head_dim], handed back as they are."""
        for name, states in (("k_scale", keys), ("v_scale", values)):
            size = states.abs().amax((0, 2, 3)).float()
            self.largest[name] = size.maximum(self.largest[name]) if name in self.largest else size
        return keys, values


def attention_of(block: nn.Module) -> str | None:
    """The name of a decoder block's attention; None where there is not exactly one whose keys can be seen on their way."""
    found: list[str] = [
        name
        for name, module in block.named_modules()
        if "attention" in type(module).__name__.lower() and hasattr(module, "layer_idx") and hasattr(module, "k_proj")
    ]
    return found[0] if len(found) == 1 and "past_key_values" in inspect.signature(block.forward).parameters else None


def leave_cache_alone(model: nn.Module) -> bool:
    """Stops compressed-tensors from rounding keys and values, which it does in a model that was loaded with KV scales.

    Returns whether it was going to.
    """
    found = [m for m in model.modules() if type(getattr(m, "kv_cache", None)).__name__ == "QuantizedKVCache"]
    for module in found:
        module.quantization_enabled = False  # type: ignore[assignment]
    return bool(found)
