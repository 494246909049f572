"""Scales moved between a layer's inputs and its weights: where a block allows it, and the move itself.

Dividing an input channel by s and multiplying the weight column that reads it by s leaves the output as it is (AWQ, arXiv
2306.00978, section 3.2; SmoothQuant, arXiv 2211.10438, section 4). The division is free at run time where whatever makes
the channel, a norm or a linear layer, takes it into its own weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import nn

from infopt.calibrate.blocks import Block, together
from infopt.calibrate.calls import hidden_states, understood

#: Relative change of an output up to which a move has changed nothing; a wrong one changes some by a half and more.
SAME = 1e-3


@dataclass(frozen=True)
class Fold:
    """What can take over the division of an input that `readers` share. Names are dotted names inside the block.

    `source` [in] is the feeder's output channel behind each input channel: heads of grouped-query attention share theirs.
    `offset` is what the feeder adds to its weight before it multiplies by it (Gemma's norms: 1).
    """

    feeder: str
    readers: tuple[str, ...]
    source: torch.Tensor
    offset: float = 0.0

    def tied(self, values: torch.Tensor) -> torch.Tensor:
        """[in] > 0 → [in], the geometric mean over the inputs that share a source: what one scale can follow."""
        source = self.source.to(values.device)
        sums = values.new_zeros(int(source.max()) + 1)
        counts = sums.index_add(0, source, torch.ones_like(values))
        return (sums.index_add(0, source, values.log()) / counts).exp()[source]

    @torch.no_grad()
    def apply(self, block: nn.Module, scale: torch.Tensor) -> None:
        """Divides the input by `scale`, float32 [in] > 0, equal where `source` is, and multiplies the readers' columns."""
        for name in self.readers:
            weight = block.get_parameter(f"{name}.weight")
            weight.copy_(weight.float() * scale)
        feeder: Any = block.get_submodule(self.feeder)
        rows = torch.ones(len(feeder.weight), device=scale.device).index_copy(0, self.source.to(scale.device), scale)
        weight = feeder.weight.float().add(self.offset)
        feeder.weight.copy_(weight.div(rows if weight.dim() == 1 else rows[:, None]).sub(self.offset))
        if getattr(feeder, "bias", None) is not None:
            feeder.bias.copy_(feeder.bias.float().div(rows))


class Stage(NamedTuple):
    """Layers to change that read one input, by full dotted name, and the move that this input allows, None if none."""

    names: tuple[str, ...]
    fold: Fold | None


def stages(block: Block) -> list[Stage]:
    """The inputs of a block's layers, in the order in which it runs. Nothing is changed.

    Where a scale can go is tried out, not read off names: what may feed an input is scaled and its readers the other
    way, and if then all layers and the block still give what they gave on a sample of the text, it can.
    """
    trial = _Trial(block)
    found = []
    for readers in together(trial.seen.inputs):
        full = tuple(f"{block.name}.{name}" for name in readers)
        names = tuple(name for name in full if name in block.linears)
        if names:
            found.append(Stage(names, next(filter(trial.is_identity, trial.candidates(readers)), None)))
    return found


class _Seen(NamedTuple):
    """One run of a block: what went into linear layers; what came out of them, of the norms and (name "") of the block."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


class _Trial:
    """A float32 copy of a block and one calibration sample."""

    def __init__(self, block: Block) -> None:
        self.module = copy.deepcopy(block.module).float()
        configs = [getattr(part, "config", None) for part in self.module.modules()]
        for config in filter(None, configs):  # copies too
            if "flash" in str(getattr(config, "_attn_implementation", None)):  # takes half precision alone
                config._attn_implementation = "eager"
        self.x = block.inputs[0][:1].to(block.device).float()
        self.arguments = {name: _in_float32(value) for name, value in block.arguments[1].items()}
        self.seen = self._run()

    def candidates(self, readers: tuple[str, ...]) -> Iterator[Fold]:
        """The norm whose output the readers get, and the layers beside them that ran before, the last first."""
        first, parent = self.seen.inputs[readers[0]], readers[0].rpartition(".")[0]
        inner, head = first.shape[-1], getattr(self.module.get_submodule(parent), "head_dim", None)
        before = list(takewhile(lambda made: made[0] != readers[0], self.seen.outputs.items()))
        for name, y in reversed(before):
            if name not in self.seen.inputs:
                if y.data_ptr() == first.data_ptr() and self.module.get_parameter(f"{name}.weight").shape == (inner,):
                    yield from (Fold(name, readers, torch.arange(inner), offset) for offset in (0.0, 1.0))
            elif name.rpartition(".")[0] == parent:
                outer = y.shape[-1]
                if outer == inner:
                    yield Fold(name, readers, torch.arange(inner))
                elif head and inner % outer == 0 and outer % head == 0:
                    heads = torch.arange(outer).view(-1, head)
                    yield Fold(name, readers, heads.repeat_interleave(inner // outer, 0).flatten())

    @torch.no_grad()
    def is_identity(self, fold: Fold) -> bool:
        parts = [self.module.get_submodule(name) for name in (fold.feeder, *fold.readers)]
        before = [(p, p.clone()) for part in parts for p in part.parameters()]
        drawn = torch.randint(4, (int(fold.source.max()) + 1,), generator=torch.Generator().manual_seed(0))
        fold.apply(self.module, torch.tensor([0.25, 0.5, 2.0, 4.0])[drawn][fold.source].to(self.x.device))
        after = self._run().outputs
        for parameter, value in before:
            parameter.copy_(value)
        return all((after[name] - y).norm() <= SAME * y.norm() for name, y in self.seen.outputs.items() if name != fold.feeder)

    @torch.no_grad()
    def _run(self) -> _Seen:
        seen = _Seen({}, {})

        def see(name: str, module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            if isinstance(module, nn.Linear):
                seen.inputs[name] = given[0]
            seen.outputs[name] = out

        parts = [(name, part) for name, part in self.module.named_modules() if isinstance(part, nn.Linear) or _is_norm(part)]
        hooks = [part.register_forward_hook(partial(see, name)) for name, part in parts]
        with understood(self.module):
            y = hidden_states(self.module(self.x, **self.arguments))
        for hook in hooks:
            hook.remove()
        seen.outputs[""] = y - self.x
        return seen


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


def _in_float32(value: Any) -> Any:
    """What a block is called with, as its float32 copy takes it."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_float32(part) for key, part in value.items()}
    return tuple(map(_in_float32, value)) if isinstance(value, tuple) else value


class Magnitude:
    """Mean and largest |x| of each channel over the tokens seen, float32 [in]."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: torch.Tensor | None = None
        self._max: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """`x` [tokens, in]"""
        size = x.abs().float()
        total, largest = size.sum(0), size.amax(0)
        self._sum = total if self._sum is None else self._sum.add_(total)
        self._max = largest if self._max is None else torch.maximum(self._max, largest)
        self.tokens += len(x)

    @property
    def mean(self) -> torch.Tensor:
        assert self._sum is not None, "no inputs were added"
        return self._sum / self.tokens

    @property
    def largest(self) -> torch.Tensor:
        assert self._max is not None, "no inputs were added"
        return self._max
