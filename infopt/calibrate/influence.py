"""How much each decoder block does, or would be missed: what decides which blocks go."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from itertools import pairwise

import torch

from infopt.calibrate.sensitivity import Probe
from infopt.kernels.onednn import OneDnn
from infopt.protocols import Progress


@torch.no_grad()
def block_influence(probe: Probe) -> list[float]:
    """1 − mean cosine of what enters and what leaves each block (ShortGPT, arXiv 2403.03853, eq. 1): how far it turns them."""
    ends = [hidden.flatten(0, 1).float() for hidden in probe.inputs]
    return [1 - float(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()) for before, after in pairwise(ends)]


@torch.no_grad()
def left_out(probe: Probe, dropped: Collection[int], progress: Progress = lambda line: None) -> dict[int, float]:
    """KLD, in nats, of the model without `dropped` and one block more, for each that is still there.

    What enters a block is computed once, on the way; so each costs half a pass on average.
    """
    found, hidden = {}, probe.inputs[0]
    for index in range(len(probe.blocks)):
        if index in dropped:
            continue
        progress(f"without block {index}")
        found[index] = probe.kld(index + 1, hidden, dropped)
        with OneDnn():
            hidden = probe.step(index, hidden)
    return found


def greedy(probe: Probe, count: int, progress: Progress = lambda line: None) -> list[tuple[int, float]]:
    """`count` blocks, each the one whose loss costs least once those before it are gone, with the KLD after each, in nats."""
    gone: list[tuple[int, float]] = []
    while len(gone) < count:
        place = f"block {len(gone) + 1} of {count} to go"
        costs = left_out(probe, {index for index, _ in gone}, partial(_say, progress, place))
        gone.append(min(costs.items(), key=lambda cost: cost[1]))
    return gone


def _say(progress: Progress, place: str, line: str) -> None:
    progress(f"{place}: {line}")


def in_order(probe: Probe, order: Collection[int], progress: Progress = lambda line: None) -> list[tuple[int, float]]:
    """The blocks in `order` with the KLD after each is gone, in nats."""
    gone: list[tuple[int, float]] = []
    for index in order:
        dropped = {index, *(each for each, _ in gone)}
        progress(f"{len(dropped)} blocks gone")
        first = min(dropped)
        gone.append((index, probe.kld(first, without=dropped)))
    return gone
