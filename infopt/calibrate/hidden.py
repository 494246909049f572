"""Hidden dimensions taken out of a whole model: one choice for all blocks, and what reads them fitted to those that stay.

What reads hidden states is a norm with the layers behind it. RMSNorm divides by the root mean square of all dimensions, so
with some gone it divides by another number, token by token; the mean of the ratio goes into the norm's weight, and the layers'
weights are refitted to give, of the norm's new output, what they gave of the old one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from infopt.calibrate import blocks, importance, smoothing
from infopt.calibrate.blocks import Block
from infopt.calibrate.calls import decoder_blocks, lent, tensors
from infopt.calibrate.hessian import Hessian
from infopt.errors import InputError
from infopt.layers import narrowing
from infopt.layers.width import READERS

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle
    from infopt.protocols import Context

#: Relative distance of a norm's output from RMSNorm's definition, in half precision at most.
CLOSE = 0.02


@dataclass(frozen=True)
class Reading:
    """A norm of hidden states and the layers that read what it makes, by dotted name. A tied head can be given no new weight."""

    norm: str
    layers: tuple[str, ...]
    is_tied: bool = False


def scores(bundle: Bundle, context: Context, by: str) -> tuple[torch.Tensor, list[Reading]]:
    """How much each hidden dimension matters, float32 [hidden] on the host, and all that reads them.

    `activation`: Minitron's mean, summed over norms. `contribution`: the dimension's share of the squared output of the layers
    behind a norm, summed over norms, whose outputs have no common unit.
    """
    model: Any = bundle.model
    readings: list[Reading] = []
    totals: list[torch.Tensor] = []

    def done(reading: Reading, activity: importance.Activity, device: torch.device) -> None:
        readings.append(reading)
        found = activity.mean
        if by == "contribution":
            squares = [model.get_parameter(f"{name}.weight").to(device).float().square().sum(0) for name in reading.layers]
            found = activity.squares * sum(squares)
            found = found / found.sum()
        totals.append(found.cpu())

    window = len(context.calibration_ids[0])
    _walk(bundle, context, _of_block, lambda reading, device: importance.Activity(window), done)
    return torch.stack(totals).sum(0), readings


def narrow(
    bundle: Bundle, context: Context, kept: torch.Tensor, readings: list[Reading], *, compensate: bool, damping: float
) -> None:
    """Takes all dimensions but `kept` out of the model, whose config still says the old size."""
    model: Any = bundle.model
    fitted: dict[str, torch.Tensor] = {}

    def start(reading: Reading, device: torch.device) -> Renormed:
        return Renormed(model.get_parameter(f"{reading.norm}.weight").to(device), kept.to(device), compensate)

    def done(reading: Reading, found: Renormed, device: torch.device) -> None:
        norm = model.get_parameter(f"{reading.norm}.weight")
        fitted[f"{reading.norm}.weight"] = (norm.float()[kept.to(norm.device)] * found.ratio.to(norm.device)).to(norm.dtype).cpu()
        for name in reading.layers if compensate and not reading.is_tied else ():
            weight = model.get_parameter(f"{name}.weight")
            fitted[f"{name}.weight"] = found.fit(weight.to(device).float(), damping, name).to(weight.dtype).cpu()

    _walk(bundle, context, lambda block: [r for r in readings if r.norm.startswith(f"{block.name}.")], start, done)
    narrowing.cut_hidden(model, decoder_blocks(model)[1], kept)
    for name, tensor in fitted.items():
        parameter = model.get_parameter(name)
        parameter.data = tensor.to(parameter.device)


class Renormed:
    """A norm's output y over calibration text beside what the norm makes of the `kept` dimensions alone, y′ = y[kept] / r.

    r = RMS(x[kept]) / RMS(x) of each token, which is RMS(y[kept] / w): the norm's input need not be known.
    """

    def __init__(self, weight: torch.Tensor, kept: torch.Tensor, compensate: bool) -> None:
        self.weight, self.kept, self.compensate = weight.float()[kept], kept, compensate
        self.tokens = 0
        self._ratios: torch.Tensor | float = 0.0
        self._cross: torch.Tensor | float = 0.0
        self._moments = Hessian()

    def add(self, x: torch.Tensor) -> None:
        """`x` [tokens, hidden], y"""
        y = x.float()
        stays = y[:, self.kept]
        ratio = (stays / self.weight).nan_to_num(0, 0, 0).square().mean(-1).sqrt()  # a weight of 0 tells nothing of its input
        self._ratios = self._ratios + ratio.sum()
        self.tokens += len(y)
        if self.compensate:
            alone = stays / ratio[:, None].clamp(min=torch.finfo(torch.float32).tiny)
            self._cross = self._cross + linear(y.T.contiguous(), alone.T.contiguous())  # [hidden, kept]
            self._moments.add(alone)

    @property
    def ratio(self) -> torch.Tensor:
        """The factor c for which c·y′ is closest to y[kept], where the norm's weight is 1: y′ has one length, so the mean r."""
        assert isinstance(self._ratios, torch.Tensor), "no inputs were added"
        return self._ratios / self.tokens

    @cached_property
    def _sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """2/n times Σ y·(c·y′)ᵀ [hidden, kept] and Σ c·y′·(c·y′)ᵀ [kept, kept]."""
        assert isinstance(self._cross, torch.Tensor), "no inputs were added"
        return self._cross * (self.ratio * 2 / self.tokens), self._moments.mean() * self.ratio.square()

    def fit(self, weight: torch.Tensor, damping: float, name: str) -> torch.Tensor:
        """`weight` float32 [out, hidden] → [out, kept], which gives of c·y′ what `weight` gives of y, as nearly as can be."""
        cross, moments = self._sums
        stays = weight[:, self.kept]
        missing = linear(weight, cross.T.contiguous()) - linear(stays, moments)
        return importance.refit(stays, missing, moments, damping, name)


def _walk(
    bundle: Bundle,
    context: Context,
    readings: Callable[[Block], list[Reading]],
    start: Callable[[Reading, torch.device], Any],
    done: Callable[[Reading, Any, torch.device], None],
) -> None:
    """Shows each norm's outputs over calibration text to a statistic of its own. No weight may change meanwhile."""
    model: Any = bundle.model
    last = _last(model)

    def work(block: Block) -> None:
        found = {reading.layers[0]: (reading, start(reading, block.device)) for reading in readings(block)}
        block.finished.update(block.linears)  # what ran once need not run again
        block.observe(found, lambda name, y: found[name][1].add(y))
        for reading, statistic in found.values():
            done(reading, statistic, block.device)
        if block.index == count - 1:
            statistic, norm = start(last, block.device), model.get_submodule(last.norm)
            with lent(tensors(norm), block.device):
                for x in block.inputs:
                    statistic.add(norm(block.run(x)).flatten(0, -2))
            done(last, statistic, block.device)

    count = len(decoder_blocks(model)[1])
    # Nothing is finished by it, so there is nothing to go on from.
    blocks.walk(bundle, replace(context, unfinished=None), (), work)


def _of_block(block: Block) -> list[Reading]:
    """What reads hidden states in a block. Raises InputError for what is no RMSNorm with layers behind it."""
    found = []
    for stage in smoothing.stages(block):
        if not any(name.rpartition(".")[2] in READERS for name in stage.names):
            continue
        fold = stage.fold
        feeder = fold and narrowing.norms(block.module).get(fold.feeder)
        if fold is None or feeder is None or fold.offset or not _is_rms(feeder):
            raise InputError(
                f"{stage.names[0]} does not read what an RMSNorm makes, so hidden dimensions cannot be taken out",
                hint="hidden: null",
            )
        found.append(Reading(f"{block.name}.{fold.feeder}", stage.names))
    return found


def _last(model: Any) -> Reading:
    """The norm before the head. Raises InputError where that is not what a model ends with."""
    name, embedding = _base(model), model.get_input_embeddings()
    norms = narrowing.norms(model.base_model)
    if type(embedding) is not nn.Embedding or len(norms) != 1 or not _is_rms(*norms.values()):
        raise InputError(
            f"{type(model).__name__} does more with its hidden states than embedding, blocks, one RMSNorm and head do, so "
            "their dimensions cannot be taken out",
            hint="hidden: null",
        )
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    return Reading(f"{name}{next(iter(norms))}", (head,), model.get_output_embeddings().weight is embedding.weight)


def _base(model: Any) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


@torch.no_grad()
def _is_rms(norm: Any) -> bool:
    """Whether it divides by the root mean square, and multiplies by its weight."""
    weight = norm.weight
    x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)).add(1).to(weight)
    wanted = x.float() * x.float().square().mean(-1, keepdim=True).rsqrt() * weight.float()
    return bool((norm(x).float() - wanted).norm() <= CLOSE * wanted.norm())
