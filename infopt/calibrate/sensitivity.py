"""How much each part of a model hurts when it alone is rounded: KLD of the final distribution, measured, not modelled.

A part is rounded, the model runs from that block on (the hidden states before it are known and kept), and the part is put
back. So a part costs half a pass on average, and nothing is approximated but the sum: parts are measured one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from infopt.calibrate.blocks import Block
from infopt.calibrate.calls import (
    Arguments,
    Forms,
    beside,
    capture,
    decoder_blocks,
    lent,
    standing_in,
    tensors,
    understood,
)
from infopt.kernels.onednn import OneDnn

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

#: Positions whose logits are turned into probabilities at a time.
CHUNK = 128


@dataclass
class Probe:
    """A model's own next-token distributions on a few windows, and the way from any block to them.

    Blocks are on `device` one at a time. `inputs[i]` are the hidden states that enter block i, [windows, tokens, hidden].
    """

    model: nn.Module
    name: str
    blocks: nn.ModuleList
    device: torch.device
    ids: torch.Tensor
    inputs: list[torch.Tensor]
    arguments: list[dict[int, Arguments]]
    reference: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Log-probabilities [positions, vocabulary], float32."""
    forms: Forms = field(default_factory=dict)
    rounded: bool = False

    @staticmethod
    @torch.no_grad()
    def of(bundle: Bundle, windows: tuple[tuple[int, ...], ...], device: torch.device, *, rounded: bool = False) -> Probe:
        """`rounded`: products as calibration has them, see `OneDnn`; those of its own answers too."""
        name, found = decoder_blocks(bundle.model)
        (hidden,), arguments = capture(bundle.model, found, windows, device, rows=len(windows))
        ids = torch.tensor(windows).to(device)
        probe = Probe(bundle.model, name, found, device, ids, [hidden.to(device)], arguments, rounded=rounded)
        with OneDnn(rounded=rounded):
            for index in range(len(found)):
                probe.inputs.append(probe.step(index, probe.inputs[-1]))
            probe.reference = probe.tail(probe.inputs[-1]).log_softmax(-1)
        return probe

    @contextmanager
    def block(self, index: int, ignore: tuple[str, ...] = ()) -> Iterator[Block]:
        """One block on the device, as the runner of calibrated methods sees it."""
        module = self.blocks[index]
        with lent(tensors(module), self.device):
            yield Block(index, f"{self.name}.{index}", module, [self.inputs[index]], self.arguments[index], self.device, ignore)

    def step(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Through one block."""
        with self.block(index) as block:
            return block.run(hidden)

    def tail(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of the last block's output: float32 logits [positions, vocabulary]."""
        last = len(self.blocks) - 1
        handing_on = standing_in(self.blocks, self.forms, lambda index, x, named: hidden if index == last else x)
        with lent(beside(self.model, self.blocks), self.device), understood(self.model), handing_on:
            logits: torch.Tensor = self.model(input_ids=self.ids, use_cache=False).logits
        return logits.flatten(0, 1).float()

    @torch.no_grad()
    def kld(self, first: int = 0, hidden: torch.Tensor | None = None, without: Collection[int] = ()) -> float:
        """Mean KLD(reference ‖ model as it is now), in nats, when no block before `first` has changed.

        `hidden`: what enters block `first`, where blocks before it did change. `without`: blocks that are left out.
        """
        with OneDnn(rounded=self.rounded):
            hidden = self.inputs[first] if hidden is None else hidden
            for index in range(first, len(self.blocks)):
                if index not in without:
                    hidden = self.step(index, hidden)
            logits, total = self.tail(hidden), 0.0
        for start in range(0, len(logits), CHUNK):
            wanted, found = self.reference[start : start + CHUNK], logits[start : start + CHUNK].log_softmax(-1)
            # Σ p − 1 is not quite 0 in float32: differences of log-probabilities keep that from being multiplied by logits.
            total += float((wanted.exp() * (wanted - found)).sum())
        return max(0.0, total / len(logits))


@torch.no_grad()
def measure(probe: Probe, index: int, rounded: Mapping[nn.Linear, torch.Tensor]) -> float:
    """KLD with the weights of some layers of block `index` replaced by `rounded`; they are put back."""
    kept = {layer: layer.weight.data for layer in rounded}
    try:
        for layer, weight in rounded.items():
            layer.weight.data = weight
        return probe.kld(index)
    finally:
        for layer, weight in kept.items():
            layer.weight.data = weight


@dataclass
class Unit:
    """Layers that share a width, with what each width costs: KLD alone (nats) and stored bytes."""

    layers: tuple[str, ...]
    kld: dict[int, float]
    bytes: dict[int, int]
    bits: int = 0


def allot(units: list[Unit], budget_bytes: float = math.inf, max_kld: float = 0.0) -> None:
    """Sets each unit's `bits`: from the narrowest up, always the step that saves most KLD per byte.

    It ends when the KLDs add up to `max_kld` or less, or no step saves any; one beyond `budget_bytes` is left out. Steps
    follow each unit's lower convex hull, so that this greedy order is the Lagrangian optimum up to the last step (Shoham and
    Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988).
    """
    for unit in units:
        unit.bits = min(unit.bytes)
    steps = sorted(((gain, i, width) for i, unit in enumerate(units) for gain, width in hull(unit)), reverse=True)
    for gain, i, width in steps:
        if gain <= 0 or predicted(units) <= max_kld:
            return
        before = units[i].bits
        if width > before:
            units[i].bits = width
            if sum(unit.bytes[unit.bits] for unit in units) > budget_bytes:
                units[i].bits = before


def predicted(units: list[Unit]) -> float:
    """The KLD of the whole, if those of its parts add up."""
    return sum(unit.kld[unit.bits] for unit in units)


def hull(unit: Unit) -> list[tuple[float, int]]:
    """(KLD saved per byte, width) of the steps up the lower convex hull of KLD over bytes, from the narrowest width."""
    widths = sorted(unit.bytes)
    now, steps = widths[0], []
    while wider := [w for w in widths if w > now]:
        slope = {w: (unit.kld[now] - unit.kld[w]) / (unit.bytes[w] - unit.bytes[now]) for w in wider}
        now = max(wider, key=slope.__getitem__)
        steps.append((slope[now], now))
    return steps
