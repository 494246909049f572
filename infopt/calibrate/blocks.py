"""The runner of every calibrated method: one decoder block at a time, in order, on calibration text.

The inputs of a block are the outputs of the blocks before it *as they are now*, so that a method sees, and can make up
for, the error of what it has changed already (GPTQ, arXiv 2210.17323, section 4). Only one block need be on the device:
the rest of the model and the hidden states between blocks stay on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from infopt.calibrate.unfinished import Unfinished
from infopt.errors import InputError
from infopt.kernels.onednn import OneDnn
from infopt.layers.grid import is_ignored

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle
    from infopt.protocols import Context

#: Activations of one batch inside a block: what a CPU's last cache holds, and what fills an accelerator.
BATCH_BYTES = {"cpu": 32 << 20}
BATCH_BYTES_ELSEWHERE = 512 << 20
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
        self.kept: dict[tuple[str, int], Any] = {}
        self.kept_bytes = 0
        self.batch = 0
        self._left: set[str] = set()

    def start(self, batch: int) -> None:
        self.batch, self._left = batch, set(self.wanted)

    def __call__(self, name: str, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if name in self._left:
            self.see(name, given[0].flatten(0, -2))
            self._left.discard(name)
            if self.stop_early and not self._left:
                raise _SeenAll
        key = (name, self.batch)
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
    arguments: dict[int, dict[str, Any]]
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
            found: list[tuple[torch.Tensor, list[str]]] = []
            order: list[tuple[str, torch.Tensor]] = []
            self._pass(set(self.linears), lambda name, x: order.append((name, x)), batches=slice(0, 1))
            for name, x in order:
                if found and found[-1][0].data_ptr() == x.data_ptr() and found[-1][0].shape == x.shape:
                    found[-1][1].append(name)
                else:
                    found.append((x, [name]))
            self._stages = [tuple(names) for _, names in found]
        return self._stages

    def observe(self, names: Iterable[str], see: See) -> None:
        """Runs the calibration inputs through the block as far as `names`, and shows their inputs to `see`."""
        self._pass(set(names), see)

    def advance(self) -> None:
        """Replaces the inputs, batch by batch, by the outputs of the block as its weights are now."""
        self._pass(set(), lambda name, x: None)

    def close(self) -> None:
        """Lets go of what was kept."""
        self._between.kept.clear()

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, hidden] → the same, through the block as it is now, kept outputs and all gradients left alone."""
        y = self.module(x.to(self.device), **self.arguments[x.shape[0]])
        out: torch.Tensor = y[0] if isinstance(y, tuple) else y
        return out

    def pack(self, name: str, tensors: dict[str, torch.Tensor], dense: torch.Tensor) -> None:
        """Finishes a layer: `tensors` are stored in place of its weight, `dense` is what they stand for."""
        self.linears[name].weight.data = dense
        self.packed[name] = tensors
        self.finished.add(name)

    @torch.no_grad()
    def _pass(self, wanted: set[str], see: See, batches: slice = slice(None)) -> None:
        between = self._between
        between.wanted, between.see, between.stop_early = wanted, see, bool(wanted)
        with self._intercepted():
            for number, x in enumerate(self.inputs[batches]):
                between.start(number)
                try:
                    self.inputs[number] = self.run(x).to(x.device)
                except _SeenAll:
                    continue

    def is_finished(self, part: str) -> bool:
        """Whether a layer, or all layers of a module right below the block, will not change again."""
        inside = {name for name in self.linears if name == part or name.startswith(f"{part}.")}
        return inside <= self.finished

    @contextmanager
    def _intercepted(self) -> Iterator[None]:
        children = {f"{self.name}.{name}": child for name, child in self.module.named_children()}
        layers = self.linears
        parts = layers | {
            name: child for name, child in children.items() if any(inner.startswith(f"{name}.") for inner in layers)
        }
        for name, part in parts.items():
            part.forward = partial(self._between, name, part.forward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for part in parts.values():
                del part.forward


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
        module = blocks[index].to(device)
        block = Block(index, f"{name}.{index}", module, inputs, arguments[index], device, tuple(ignore))
        with OneDnn():
            work(block)
            if index + 1 < len(blocks):
                block.advance()
        block.close()
        module.to(bundle.device)
        packed.update(block.packed)
        done.finish(name, index, module, block.packed, inputs)
    return packed


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its dotted name. Raises InputError for a model that has none."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise InputError(f"{type(model).__name__} has no list of decoder blocks", hint="a method that needs no calibration: rtn")
    return max(outer, key=lambda found: sum(p.numel() for p in found[1].parameters()))


@torch.no_grad()
def capture(
    model: nn.Module, blocks: nn.ModuleList, samples: tuple[tuple[int, ...], ...], device: torch.device, rows: int | None = None
) -> tuple[list[torch.Tensor], list[dict[int, dict[str, Any]]]]:
    """What enters the first block, a batch each, and what every block is called with beside it.

    No block runs: each hands its input on. So embeddings, masks and rotary angles are all that is computed. `rows`:
    samples in a batch, by memory when None.
    """
    rows = rows or rows_at_once(blocks[0], len(samples[0]), device)
    inputs: list[torch.Tensor] = []
    arguments: list[dict[int, dict[str, Any]]] = [{} for _ in blocks]

    def passing(index: int) -> Callable[..., torch.Tensor]:
        def forward(hidden: torch.Tensor, **named: Any) -> torch.Tensor:
            if index == 0:
                inputs.append(hidden.cpu())
            arguments[index].setdefault(hidden.shape[0], {**_moved(named, device), "use_cache": False, "past_key_values": None})
            return hidden

        return forward

    for index, block in enumerate(blocks):
        block.forward = passing(index)
    try:
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        home = next(model.parameters()).device
        for start in range(0, len(samples), rows):
            ids = torch.tensor(samples[start : start + rows], device=home)
            decoder(input_ids=ids, use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return inputs, arguments


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value


def rows_at_once(block: nn.Module, tokens: int, device: torch.device) -> int:
    """Samples in a batch, so that what a block computes on the way stays within BATCH_BYTES of the device."""
    widths = sum(module.out_features for module in block.modules() if isinstance(module, nn.Linear))
    per_row = max(1, tokens * widths * next(block.parameters()).element_size())
    return max(1, BATCH_BYTES.get(device.type, BATCH_BYTES_ELSEWHERE) // per_row)
