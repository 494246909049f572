"""The runner of every calibrated method: one decoder block at a time, in order, on calibration text.

The inputs of a block are the outputs of the blocks before it *as they are now*, so that a method sees, and can make up
for, the error of what it has changed already (GPTQ, arXiv 2210.17323, section 4). Only one block need be on the device
(moving scales copies it there once more, in float32): the rest of the model and the hidden states between blocks stay on
the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from infopt.calibrate.calls import Arguments, answered_by, capture, decoder_blocks, hidden_states, understood
from infopt.calibrate.unfinished import Unfinished
from infopt.errors import InputError
from infopt.kernels.onednn import OneDnn
from infopt.layers.grid import is_ignored

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle
    from infopt.protocols import Context

#: Outputs of finished layers that a block keeps, so that its next pass need not compute them again.
KEPT_BYTES = 1 << 30

See = Callable[[str, torch.Tensor], None]
"""Called with a layer's full name and its inputs [tokens, in_features], a batch at a time."""
Work = Callable[["Block"], None]


class _SeenAll(Exception):  # noqa: N818 - no error: it ends a pass early
    pass


class _Between:
    """Stands between a block and its parts while it runs: shows what enters linear layers, answers for finished parts.

    Parts are the linear layers and the modules right below the block that hold some (attention, feed-forward): once
    attention is finished, neither its layers nor what is between them is computed again for these inputs.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.wanted: set[str] = set()
        self.see: See = lambda name, x: None
        self.stop_early = False
        self.kept: dict[tuple[str, int, int], Any] = {}
        """Outputs by part, batch, and how many times the part ran before in one run of the block."""
        self.kept_bytes = 0
        self.batch = 0
        self.left: set[str] = set()
        self._runs: Counter[str] = Counter()

    def start(self, batch: int) -> None:
        self.batch, self.left, self._runs = batch, set(self.wanted), Counter()

    def __call__(self, name: str, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if name in self.left:
            with OneDnn(rounded=True):  # what a method makes of it is no forward pass
                self.see(name, given[0].flatten(0, -2))
            self.left.discard(name)
            if self.stop_early and not self.left:
                raise _SeenAll
        key = (name, self.batch, self._runs[name])
        self._runs[name] += 1
        if key in self.kept:
            return self.kept[key]
        out = forward(*given, **named)
        if self.stop_early and self.block.is_finished(name):
            size = sum(part.nbytes for part in (out if isinstance(out, tuple) else (out,)) if isinstance(part, torch.Tensor))
            if self.kept_bytes + size <= KEPT_BYTES:
                self.kept[key] = out
                self.kept_bytes += size
                for inner in [inner for inner in self.kept if inner[1] == self.batch and inner[0].startswith(f"{name}.")]:
                    self.kept_bytes -= self.kept.pop(inner).nbytes
        return out


@dataclass
class Block:
    """One decoder block with its calibration inputs.

    `name` is the block's dotted name, `linears` its linear layers by full dotted name (ignored ones left out), `inputs`
    the hidden states that enter it, [rows, tokens, hidden] a batch. A method changes weights in place, or calls `pack`
    with what will be stored; `finished` names layers that will not change again, whose outputs are then kept.
    """

    index: int
    name: str
    module: nn.Module
    inputs: list[torch.Tensor]
    arguments: dict[int, Arguments]
    """What the model hands this block beside the hidden states (masks, rotary embeddings), by rows of the batch."""
    device: torch.device
    ignore: tuple[str, ...]
    finished: set[str] = field(default_factory=set)
    packed: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._between = _Between(self)
        self._stages: list[tuple[str, ...]] | None = None

    @property
    def linears(self) -> dict[str, nn.Linear]:
        named = ((f"{self.name}.{name}", module) for name, module in self.module.named_modules())
        return {name: module for name, module in named if type(module) is nn.Linear and not is_ignored(name, self.ignore)}

    @property
    def stages(self) -> list[tuple[str, ...]]:
        """Names of layers that read the same input, in the order in which the block runs them: q, k, v; o; gate, up; down."""
        if self._stages is None:
            seen: dict[str, torch.Tensor] = {}
            self._pass(set(self.linears), seen.__setitem__, batches=slice(0, 1))
            self._stages = together(seen)
        return self._stages

    def observe(self, names: Iterable[str], see: See) -> None:
        """Runs the calibration inputs through the block as far as `names`, and shows their inputs to `see`.

        Raises InputError for a layer that the block does not run.
        """
        self._pass(set(names), see)

    def advance(self) -> None:
        """Replaces the inputs, batch by batch, by the outputs of the block as its weights are now."""
        self._pass(set(), lambda name, x: None)

    def close(self) -> None:
        """Lets go of what was kept."""
        self._between.kept.clear()

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, hidden] → the same, through the block as it is now, kept outputs and all gradients left alone."""
        return hidden_states(self.call(x))

    def call(self, x: torch.Tensor, **other: Any) -> Any:
        """What the block itself returns, called as the model calls it, but for `other` arguments."""
        with understood(self.module):
            return self.module(x.to(self.device), **(self.arguments[len(x)] | other))

    def replace(self, name: str, weight: torch.Tensor) -> None:
        """Finishes a layer: it has another weight, of the same shape and dtype."""
        self.linears[name].weight.data = weight.detach()
        self.finished.add(name)

    def pack(self, name: str, tensors: dict[str, torch.Tensor], dense: torch.Tensor) -> None:
        """Finishes a layer: `tensors` are stored in place of its weight, `dense` is what they stand for."""
        self.packed[name] = tensors
        self.replace(name, dense)

    @torch.no_grad()
    def _pass(self, wanted: set[str], see: See, batches: slice = slice(None)) -> None:
        between = self._between
        between.wanted, between.see, between.stop_early = wanted, see, bool(wanted)
        with self._intercepted(), OneDnn(rounded=True, results=True):
            for number, x in enumerate(self.inputs[batches]):
                between.start(number)
                try:
                    out = self.run(x)
                except _SeenAll:
                    continue
                if between.left:
                    self._refuse(sorted(between.left))
                if not wanted:
                    self.inputs[number] = out.to(x.device)

    def _refuse(self, unseen: list[str]) -> NoReturn:
        last = dict.fromkeys(name.rpartition(".")[2] for name in unseen)
        raise InputError(
            f"{unseen[0]} never runs in its block, which may use its weight in another way: nothing is known of its inputs",
            hint=f"ignore: [{', '.join([*self.ignore, *last])}]",
        )

    def is_finished(self, part: str) -> bool:
        """Whether a layer, or all layers of a module right below the block, will not change again."""
        inside = {name for name in self.linears if name == part or name.startswith(f"{part}.")}
        return inside <= self.finished

    def _intercepted(self) -> AbstractContextManager[None]:
        children = {f"{self.name}.{name}": child for name, child in self.module.named_children()}
        layers = self.linears
        parts = layers | {
            name: child for name, child in children.items() if any(inner.startswith(f"{name}.") for inner in layers)
        }
        return answered_by({part: partial(self._between, name, part.forward) for name, part in parts.items()})


@torch.no_grad()
def walk(bundle: Bundle, context: Context, ignore: Iterable[str], work: Work) -> dict[str, dict[str, torch.Tensor]]:
    """Calls `work` on each decoder block in turn, and lets what it changed flow into the inputs of the next.

    Returns the tensors that `Block.pack` was given, by layer. Blocks that an earlier, interrupted run has finished are
    put back from `context.unfinished`. Raises InputError without calibration text.
    """
    if not context.calibration_ids:
        raise InputError("a calibrated step needs text", hint="calibration: {text: bundled, samples: 128, tokens: 512}")
    name, blocks = decoder_blocks(bundle.model)
    done = Unfinished.open(context.unfinished)
    packed: dict[str, dict[str, torch.Tensor]] = {}
    finished = done.restore(name, blocks, packed)
    if finished == len(blocks):
        return packed
    if finished:
        context.progress(f"going on after block {finished} of {len(blocks)}")
    device = torch.device(context.device)
    inputs, arguments = capture(bundle.model, blocks, context.calibration_ids, device)
    inputs = done.hidden(name, finished) or inputs
    for index in range(finished, len(blocks)):
        context.progress(f"block {index + 1}/{len(blocks)}")
        module = blocks[index]
        home = next(module.parameters()).device
        module.to(device)
        block = Block(index, f"{name}.{index}", module, inputs, arguments[index], device, tuple(ignore))
        with OneDnn(rounded=True):
            work(block)
            if index + 1 < len(blocks):
                block.advance()
        block.close()
        module.to(home)
        packed.update(block.packed)
        done.finish(name, index, module, block.packed, inputs if index + 1 < len(blocks) else [])
    return packed


def together(inputs: dict[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Names of layers, those that read the same tensor together, in the order of the first of them."""
    found: dict[tuple[int, torch.Size], list[str]] = {}
    for name, x in inputs.items():
        found.setdefault((x.data_ptr(), x.shape), []).append(name)
    return [tuple(names) for names in found.values()]
