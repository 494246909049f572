"""Every chosen layer of a model rounded to the nearest points of one grid, without data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from infopt.layers import packing, small_floats
from infopt.layers.grid import Grid

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle
    from infopt.protocols import Progress


def round_layers(bundle: Bundle, ignore: Iterable[str], grid: Grid, step: str, progress: Progress) -> Bundle:
    """The linear layers that `ignore` does not name: rounded in memory, packed for the file, inputs rounded as `grid` says.

    Consumes `bundle`. Raises what `packing.linears` and `packing.fit` raise.
    """
    layers = packing.linears(bundle, ignore)
    overall = shared_scales(layers) if grid.kind == "nvfp4" else {}
    packed = {}
    for done, (name, layer) in enumerate(layers.items(), 1):
        progress(f"{step} {done}/{len(layers)} {name}")
        packed[name], layer.weight.data = packing.pack(layer.weight, grid, overall.get(name))
    return packing.finish(bundle, packed, grid) if packed else bundle


def shared_scales(layers: Mapping[str, nn.Linear]) -> dict[str, torch.Tensor]:
    """NVFP4's scale of each layer, [1], the same for all layers of one attention or one feed-forward.

    Engines run q, k and v, and gate and up, as one matrix, which has one such scale; E4M3 has room for the difference.
    """
    found: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        parent, scale = name.rpartition(".")[0], small_floats.global_scale(layer.weight)
        found[parent] = torch.minimum(found[parent], scale) if parent in found else scale
    return {name: found[name.rpartition(".")[0]] for name in layers}
