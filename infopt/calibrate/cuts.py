"""What a model says with some blocks, heads and channels gone, before anything is cut: they are left out, or zeroed meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from infopt.calibrate import blocks, importance
from infopt.calibrate.blocks import Block
from infopt.calibrate.sensitivity import Probe
from infopt.kernels.onednn import OneDnn
from infopt.layers.narrowing import channels_of
from infopt.layers.width import Width

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle
    from infopt.protocols import Context


@dataclass(frozen=True)
class Worth:
    """How much each KV head, with its queries, and each MLP channel of a block adds to the outputs, float32 on the host."""

    heads: torch.Tensor
    channels: torch.Tensor


def worths(bundle: Bundle, context: Context, whole: Width) -> list[Worth]:
    """Of every block of the model as it is, by the score that `prune_width` has."""
    found: list[Worth] = []

    def work(block: Block) -> None:
        names = {name.rpartition(".")[2]: name for name in block.linears}
        o_proj, down_proj = names["o_proj"], names["down_proj"]
        tokens, size = block.inputs[0].shape[1], whole.head_dim * whole.queries
        seen = {o_proj: importance.Inputs(tokens, size), down_proj: importance.Activity(tokens)}
        block.finished.update(block.linears)  # what ran once need not run again
        block.observe(seen, lambda name, x: seen[name].add(x))
        weights = {name: block.linears[name].weight.float() for name in seen}
        heads, channels = seen[o_proj], seen[down_proj]
        assert isinstance(heads, importance.Inputs)
        # Of single channels the contribution needs no moments but the squares, which are summed up much faster.
        by_channel = channels.squares * weights[down_proj].square().sum(0)
        found.append(Worth(importance.contribution(weights[o_proj], heads.hessian.mean(), size).cpu(), by_channel.cpu()))

    # Nothing is finished by it, so there is nothing to go on from.
    blocks.walk(bundle, replace(context, unfinished=None), (), work)
    return found


@torch.no_grad()
def kld(probe: Probe, gone: Collection[int], widths: Sequence[Worth], whole: Width | None, kv_heads: int, mlp: int) -> float:
    """KLD, in nats, of the model without the blocks `gone`, and of the others all but the best `kv_heads` and `mlp` channels."""
    hidden = probe.inputs[0]
    for index, module in enumerate(probe.blocks):
        if index not in gone:
            columns = {} if whole is None else _missing(widths[index], whole, kv_heads, mlp)
            with _zeroed(module, columns), OneDnn(rounded=probe.rounded):
                hidden = probe.step(index, hidden)
    return probe.kld(len(probe.blocks), hidden)


def _missing(worth: Worth, whole: Width, kv_heads: int, mlp: int) -> dict[str, torch.Tensor]:
    """Columns of a block's o_proj and down_proj that read what goes."""

    def of(scores: torch.Tensor, count: int, size: int) -> torch.Tensor:
        goes = torch.ones(len(scores), dtype=torch.bool)
        goes[importance.strongest(scores, count)] = False
        return channels_of(goes.nonzero().flatten(), size)

    return {"o_proj": of(worth.heads, kv_heads, whole.head_dim * whole.queries), "down_proj": of(worth.channels, mlp, 1)}


@contextmanager
def _zeroed(block: nn.Module, columns: dict[str, torch.Tensor]) -> Iterator[None]:
    """Zeros in some columns of a block's layers, by the last part of their names, for as long as it holds."""
    layers = {name.rpartition(".")[2]: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}
    kept = {part: layers[part].weight.data for part, gone in columns.items() if len(gone)}
    try:
        for part, weight in kept.items():
            layers[part].weight.data = weight.index_fill(1, columns[part].to(weight.device), 0)
        yield
    finally:
        for part, weight in kept.items():
            layers[part].weight.data = weight


def cut_kld(probe: Probe, gone: Collection[int]) -> float:
    """KLD of the model that is left after the blocks `gone` were taken out, and others made narrower, in place."""
    kept = [arguments for index, arguments in enumerate(probe.arguments) if index not in gone]
    return replace(probe, arguments=kept, forms={}).kld()
