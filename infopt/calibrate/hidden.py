"""Hidden dimensions taken out of a whole model: one choice for all blocks, and what reads them fitted to those that stay.

What reads hidden states is a norm with the layers behind it. RMSNorm divides by the root mean square of all dimensions, so
with some gone it divides by another number, token by token; the mean of the ratio goes into the norm's weight, and the layers'
weights are refitted to give, of the norm's new output, what they gave of the old one. Both are measured on the whole model.
"""

from __future__ import annotations

import copy
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


See = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with what a norm was given and what it made, [tokens, hidden] each, a batch at a time."""
Done = Callable[[], None]


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

    def watch(reading: Reading, block: Block) -> tuple[See, Done]:
        activity = importance.Activity(block.inputs[0].shape[1])

        def done() -> None:
            readings.append(reading)
            found = activity.mean
            if by == "contribution":
                weights = [model.get_parameter(f"{name}.weight").to(block.device).float() for name in reading.layers]
                found = activity.squares * sum(weight.square().sum(0) for weight in weights)
                found = found / found.sum()
            totals.append(found.cpu())

        return lambda x, y: activity.add(y), done

    _walk(bundle, context, _of_block, watch)
    return torch.stack(totals).sum(0), readings


def narrow(
    bundle: Bundle, context: Context, kept: torch.Tensor, readings: list[Reading], *, compensate: bool, damping: float
) -> None:
    """Takes all dimensions but `kept` out of the model, whose config still says the old size."""
    model: Any = bundle.model
    fitted: dict[str, torch.Tensor] = {}

    def watch(reading: Reading, block: Block) -> tuple[See, Done]:
        norm = model.get_submodule(reading.norm)
        renormed = Renormed(norm, kept.to(block.device), compensate)

        def done() -> None:
            weight = norm.weight.float()[kept.to(norm.weight.device)] * renormed.ratio.to(norm.weight.device)
            fitted[f"{reading.norm}.weight"] = weight.to(norm.weight.dtype).cpu()
            for name in reading.layers if compensate and not reading.is_tied else ():
                weight = model.get_parameter(f"{name}.weight")
                found = renormed.fit(weight.to(block.device).float(), damping, name)
                fitted[f"{name}.weight"] = found.to(weight.dtype).cpu()

        return renormed.add, done

    _walk(bundle, context, lambda block: [r for r in readings if r.norm.startswith(f"{block.name}.")], watch)
    narrowing.cut_hidden(model, decoder_blocks(model)[1], kept)
    for name, tensor in fitted.items():
        parameter = model.get_parameter(name)
        parameter.data = tensor.to(parameter.device)


class Renormed:
    """What a norm makes over calibration text, y, beside what it makes of the `kept` dimensions alone, y′."""

    def __init__(self, norm: Any, kept: torch.Tensor, compensate: bool) -> None:
        self.norm, self.kept, self.compensate = copy.deepcopy(norm), kept, compensate
        self.norm.weight.data = self.norm.weight.data.to(kept.device)[kept]
        self.tokens = 0
        self._both: torch.Tensor | float = 0.0
        self._cross: torch.Tensor | float = 0.0
        self._moments = Hessian()

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """`x` [tokens, hidden] is what the norm was given."""
        alone, y = self.norm(x[:, self.kept]).float(), y.float()
        self._both = self._both + torch.stack([(y[:, self.kept] * alone).sum(), alone.square().sum()])
        self.tokens += len(y)
        if self.compensate:
            self._cross = self._cross + linear(y.T.contiguous(), alone.T.contiguous())  # [hidden, kept]
            self._moments.add(alone)

    @property
    def ratio(self) -> torch.Tensor:
        """The factor c for which c·y′ is closest to y[kept]: RMS(x[kept]) / RMS(x), averaged over tokens by the size of y′."""
        assert isinstance(self._both, torch.Tensor), "no inputs were added"
        return self._both[0] / self._both[1].clamp(min=torch.finfo(torch.float32).tiny)

    @cached_property
    def _sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """2/n times Σ y·(c·y′)ᵀ [hidden, kept] and Σ c·y′·(c·y′)ᵀ [kept, kept]."""
        assert isinstance(self._cross, torch.Tensor), "no inputs were added"
        return self._cross * (self.ratio * 2 / self.tokens), self._moments.mean() * self.ratio.square()

    def fit(self, weight: torch.Tensor, damping: float, name: str) -> torch.Tensor:
        """`weight` float32 [out, hidden] → [out, kept], which gives of c·y′ what `weight` gives of y, as nearly as can be."""
        cross, moments = self._sums
        stays = weight[:, self.kept]
        missing = weight @ cross - stays @ moments  # no `linear`, whose operands calibration may round: this cancels
        return importance.refit(stays, missing, moments, damping, name)


def _walk(
    bundle: Bundle,
    context: Context,
    readings: Callable[[Block], list[Reading]],
    watch: Callable[[Reading, Block], tuple[See, Done]],
) -> None:
    """Shows what each norm is given and makes, over calibration text. No weight may change meanwhile."""
    model: Any = bundle.model
    last, count = _last(model), len(decoder_blocks(model)[1])

    def work(block: Block) -> None:
        found = {reading: watch(reading, block) for reading in readings(block)}
        hooks = [model.get_submodule(reading.norm).register_forward_hook(_shown(see)) for reading, (see, _) in found.items()]
        block.finished.update(block.linears)  # what ran once need not run again
        try:
            block.observe([reading.layers[0] for reading in found], lambda name, y: None)
        finally:
            for hook in hooks:
                hook.remove()
        for _, done in found.values():
            done()
        if block.index == count - 1:
            (see, done), norm = watch(last, block), model.get_submodule(last.norm)
            with lent(tensors(norm), block.device):
                for x in map(block.run, block.inputs):
                    see(x.flatten(0, -2), norm(x).flatten(0, -2))
            done()

    # Nothing is finished by it, so there is nothing to go on from.
    blocks.walk(bundle, replace(context, unfinished=None), (), work)


def _shown(see: See) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    return lambda norm, given, y: see(given[0].flatten(0, -2), y.flatten(0, -2))


def _of_block(block: Block) -> list[Reading]:
    """What reads hidden states in a block. Raises InputError for norms that are not RMSNorms with layers behind them."""
    found, norms = [], narrowing.norms(block.module)
    for stage in smoothing.stages(block):
        if any(name.rpartition(".")[2] in READERS for name in stage.names):
            fold = stage.fold
            if fold is None or fold.feeder not in norms or fold.offset or not _is_rms(norms[fold.feeder]):
                raise InputError(
                    f"{stage.names[0]} does not read what an RMSNorm makes, so hidden dimensions cannot be taken out",
                    hint="hidden: null",
                )
            found.append(Reading(f"{block.name}.{fold.feeder}", stage.names))
    odd = [name for name in norms if all(reading.norm != f"{block.name}.{name}" for reading in found)]
    if odd:
        raise InputError(
            f"no layer reads what {block.name}.{odd[0]} makes, so hidden dimensions cannot be taken out", hint="hidden: null"
        )
    return found


def _last(model: Any) -> Reading:
    """The norm before the head. Raises InputError where that is not what a model ends with."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norms = list(narrowing.norms(model.base_model).values())
    if type(embedding) is not nn.Embedding or head is None or len(norms) != 1 or not _is_rms(norms[0]):
        raise InputError(
            f"{type(model).__name__} does more with its hidden states than embedding, blocks, one RMSNorm and head do, so "
            "their dimensions cannot be taken out",
            hint="hidden: null",
        )
    names = {module: name for name, module in model.named_modules()}
    return Reading(names[norms[0]], (names[head],), head.weight is embedding.weight)


@torch.no_grad()
def _is_rms(norm: Any) -> bool:
    """Whether it divides by the root mean square, and multiplies by its weight."""
    weight = norm.weight
    x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)).add(1).to(weight)
    wanted = x.float() * x.float().square().mean(-1, keepdim=True).rsqrt() * weight.float()
    return bool((norm(x).float() - wanted).norm() <= CLOSE * wanted.norm())
