"""Which way each product of a model takes on this GPU: timed on the model's own weights, once for a number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from infopt.kernels.gpu.choices import Choice, Table, bucket, enough, key, race
from infopt.kernels.gpu.ops import multiply
from infopt.kernels.gpu.weight import Weight
from infopt.runtime.device_weights import DeviceModel

#: Assumed of a GPU that does not say what its second-level cache holds.
CACHE_BYTES = 50_000_000


@dataclass(frozen=True)
class Role:
    """A product that every layer has, and what is fused with it."""

    weights: Sequence[Weight]
    has_norm: bool = False
    activation: int | None = None
    dtype: torch.dtype | None = None


def roles(model: DeviceModel) -> list[Role]:
    qkv, output, gate_up, down = zip(*(layer.weights for layer in model.layers), strict=True)
    return [
        Role(qkv, has_norm=True), Role(output), Role(gate_up, has_norm=True, activation=model.activation), Role(down),
        Role([model.outside.head], has_norm=True, dtype=torch.float32),
    ]  # fmt: skip


def tune(model: DeviceModel, rows: int, table: Table) -> None:
    """Finds the way of every product of `rows` rows that `table` does not know, and keeps it there. Needs a GPU."""
    if not table.is_timed:
        return
    device, dtype = model.outside.head.data.device, model.dtype
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or CACHE_BYTES)
    for role in roles(model):
        for weights in _alike(role.weights):
            first = weights[0]
            if key(first, rows, dtype, role.has_norm, role.activation) in table.chosen:
                continue
            x = torch.randn(bucket(rows), first.inner, device=device).to(dtype)
            gain = torch.ones(first.inner, device=device, dtype=dtype) if role.has_norm else None
            timing = _Timing(x, gain, enough(weights, cache), role)
            table.tune(first, rows, dtype, role.has_norm, role.activation, timing.race)


@dataclass(frozen=True)
class _Timing:
    x: torch.Tensor
    gain: torch.Tensor | None
    weights: Sequence[Weight]
    role: Role

    def race(self, choices: Sequence[Choice]) -> tuple[dict[Choice, float], dict[Choice, str]]:
        return race({choice: partial(self.run, choice) for choice in choices}, self.weights)

    def run(self, choice: Choice, weight: Weight) -> torch.Tensor:
        return multiply(
            choice, self.x, weight, gain=self.gain, epsilon=1e-5, activation=self.role.activation, residual=None,
            dtype=self.role.dtype or self.x.dtype,
        )  # fmt: skip


def _alike(weights: Sequence[Weight]) -> list[list[Weight]]:
    """By kind and grid: recipes may treat layers differently."""
    found: dict[tuple[str, int, bool], list[Weight]] = {}
    for weight in weights:
        found.setdefault((weight.kind, weight.group, weight.zeros is not None), []).append(weight)
    return list(found.values())
