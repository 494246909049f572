"""How much each decoder block does, or would be missed: what decides which blocks go."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from itertools import pairwise

import torch

from infopt.calibrate.sensitivity import Probe
from infopt.kernels.onednn import OneDnn
from infopt.protocols import Progress

#: Blocks that each turn of `greedy` tries, where there are as many.
LEAST_TRIED = 8


@torch.no_grad()
def block_influence(probe: Probe) -> list[float]:
    """1 − mean cosine of what enters and what leaves each block (ShortGPT, arXiv 2403.03853, eq. 1): how far it turns them."""
    ends = [hidden.flatten(0, 1).float() for hidden in probe.inputs]
    return [1 - float(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()) for before, after in pairwise(ends)]


@torch.no_grad()
def left_out(
    probe: Probe, dropped: Collection[int], progress: Progress = lambda line: None, among: Collection[int] | None = None
) -> dict[int, float]:
    """KLD, in nats, of the model without `dropped` and one block more, for each that is still there; `among`: only of these.

    What enters a block is computed once, on the way; so each costs half a pass on average.
    """
    found, hidden = {}, probe.inputs[0]
    for index in range(len(probe.blocks)):
        if index in dropped:
            continue
        if among is None or index in among:
            progress(f"without block {index}")
            found[index] = probe.kld(index + 1, hidden, dropped)
        with OneDnn(rounded=probe.rounded):
            hidden = probe.step(index, hidden)
    return found


def evenly(blocks: int, count: int) -> list[int]:
    """`count` of `blocks` numbers, so that those which are left, the first and the last among them, are as even as can be."""
    left = blocks - count
    kept = {round(place * (blocks - 1) / max(1, left - 1)) for place in range(left)}
    return [index for index in range(blocks) if index not in kept]


def greedy(probe: Probe, count: int, progress: Progress = lambda line: None) -> list[tuple[int, float]]:
    """`count` blocks, each the one whose loss costs least once those before it are gone, with the KLD after each, in nats.

    After the first turn only those are tried that cost least in the turn before, twice as many as are still to go.
    """
    gone: list[tuple[int, float]] = []
    among: list[int] | None = None
    while len(gone) < count:
        place = f"block {len(gone) + 1} of {count} to go"
        costs = left_out(probe, {index for index, _ in gone}, partial(_say, progress, place), among)
        order = sorted(costs, key=costs.__getitem__)
        gone.append((order[0], costs[order[0]]))
        among = order[1 : 1 + max(LEAST_TRIED, 2 * (count - len(gone)))]
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
