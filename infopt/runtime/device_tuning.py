"""Which way each product of a model takes on this GPU: timed on the model's own weights, once for a number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from infopt.kernels.gpu.choices import Asked, Choice, Table, bucket, enough, race
from infopt.kernels.gpu.ops import multiply
from infopt.kernels.gpu.products import Behind, Feed
from infopt.kernels.gpu.weight import Weight
from infopt.runtime.device_weights import DeviceModel

#: Assumed of a GPU that does not say what its second-level cache holds.
CACHE_BYTES = 50_000_000
#: Inputs whose squares are one part of a feed's: what most products leave.
PARTS = 16


@dataclass(frozen=True)
class Role:
    """A product that every layer has, and what stands around it (`choices.Asked`); `has_norm`: what it is fed is still to be
    divided by its root mean square."""

    weights: Sequence[Weight]
    activation: int | None = None
    has_norm: bool = False
    feeds_norm: bool = False
    dtype: torch.dtype | None = None

    def asked(self, weight: Weight, rows: int, dtype: torch.dtype) -> Asked:
        return Asked(weight, rows, dtype, self.activation, self.feeds_norm)


def roles(model: DeviceModel) -> list[Role]:
    qkv, output, gate_up, down = zip(*(layer.weights for layer in model.layers), strict=True)
    fused = model.fuses_norms
    return [
        Role(qkv, has_norm=fused), Role(output, feeds_norm=fused),
        Role(gate_up, model.activation, has_norm=fused), Role(down, feeds_norm=fused),
        Role([model.outside.head], has_norm=fused, dtype=torch.float32),
    ]  # fmt: skip


def tune(model: DeviceModel, rows: int, table: Table) -> None:
    """Finds the way of every product of `rows` rows that `table` does not know, and keeps it there. Needs a GPU."""
    if not table.is_timed:
        return
    device, dtype = model.outside.head.data.device, model.dtype
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or CACHE_BYTES)
    for role in roles(model):
        for weights in _alike(role.weights):
            asked = role.asked(weights[0], rows, dtype)
            if asked.key not in table.chosen:
                table.tune(asked, _Timing(asked, enough(weights, cache), role).race)


class _Timing:
    """Of a product as a step has it, on activations of normal size."""

    def __init__(self, asked: Asked, weights: Sequence[Weight], role: Role) -> None:
        rows, inner, device = bucket(asked.rows), asked.weight.inner, asked.weight.data.device
        x, squares = torch.randn(rows, inner, device=device).to(asked.dtype), None
        if role.has_norm:
            squares = torch.full((max(1, inner // PARTS), rows), float(PARTS), device=device)
        gain = torch.ones(asked.weight.rows, device=device, dtype=asked.dtype) if asked.feeds_norm else None
        residual = torch.zeros(rows, asked.weight.rows, device=device, dtype=asked.dtype) if asked.feeds_norm else None
        self.feed, self.weights = Feed(x, squares, 1e-5), weights
        self.behind = Behind(asked.activation, residual, gain, 1e-5, role.dtype)

    def race(self, choices: Sequence[Choice]) -> tuple[dict[Choice, float], dict[Choice, str]]:
        return race({choice: partial(self.run, choice) for choice in choices}, self.weights)

    def run(self, choice: Choice, weight: Weight) -> torch.Tensor:
        return multiply(choice, self.feed, weight, self.behind)[0]


def _alike(weights: Sequence[Weight]) -> list[list[Weight]]:
    """By kind and grid: recipes may treat layers differently."""
    found: dict[tuple[str, int, bool], list[Weight]] = {}
    for weight in weights:
        found.setdefault((weight.kind, weight.group, weight.zeros is not None), []).append(weight)
    return list(found.values())
