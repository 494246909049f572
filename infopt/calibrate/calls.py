"""How a model calls its decoder blocks: seen by running it with stand-ins in their places."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from infopt.errors import InputError, first_line

#: Activations of one batch inside a block: what a CPU's last cache holds, and what fills an accelerator.
BATCH_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
UNCALIBRATED = "a method that needs no calibration: rtn"

Arguments = dict[str, Any]
"""What a block is called with beside the hidden states (masks, rotary embeddings), by name."""
Forms = dict[tuple[type[nn.Module], int], tuple[Any, ...] | None]
"""What a type of block returns after the hidden states, for so many rows; None where it returns no tuple."""


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its dotted name. Raises InputError for a model that has none."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise InputError(f"{type(model).__name__} has no list of decoder blocks", hint=UNCALIBRATED)
    return max(outer, key=lambda found: sum(p.numel() for p in found[1].parameters()))


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def beside(model: nn.Module, blocks: nn.ModuleList) -> list[torch.Tensor]:
    """What a model holds outside of its blocks: embeddings, norm, head."""
    inside = {id(tensor) for tensor in tensors(blocks)}
    return [tensor for tensor in tensors(model) if id(tensor) not in inside]


@contextmanager
def lent(found: Iterable[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Parameters and buffers on `device` for as long as it holds. What is written into them there is lost."""
    kept = [(tensor, tensor.data) for tensor in found]
    try:
        for tensor, data in kept:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextmanager
def answered_by(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for some modules, for as long as it holds."""
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before


@contextmanager
def understood(what: nn.Module) -> Iterator[None]:
    """What goes wrong between a model and its blocks, as one line. Raises InputError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        message = f"{type(what).__name__} does not run block by block: {first_line(error)}"
        raise InputError(message, hint=UNCALIBRATED) from error


def hidden_states(out: Any) -> torch.Tensor:
    """Of what a block returns."""
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


@contextmanager
def standing_in(
    blocks: nn.ModuleList, forms: Forms, answer: Callable[[int, torch.Tensor, Arguments], torch.Tensor]
) -> Iterator[None]:
    """While it holds no block runs: `answer(index, hidden states, arguments)` is what each hands on.

    It comes in the form that the block's own answer has. `forms` keeps those that are known; where one is missing, the
    first block of its type runs once.
    """

    def stand_in(index: int, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward
        names = list(inspect.signature(forward).parameters)

        def answering(*given: Any, **named: Any) -> Any:
            named |= zip(names, given, strict=False)
            hidden = named.pop(names[0])
            key = (type(block), len(hidden))
            if key not in forms:
                with lent(tensors(block), hidden.device):
                    out = forward(hidden, **_own(named))
                forms[key] = out[1:] if isinstance(out, tuple) else None
            rest, mine = forms[key], answer(index, hidden, _own(named))
            return mine if rest is None else (mine, *rest)

        return answering

    with answered_by({block: stand_in(index, block) for index, block in enumerate(blocks)}):
        yield


def _own(named: Arguments) -> Arguments:
    """With containers of its own: what one block leaves in them for others (shared keys) is none of the arguments."""
    return {name: copy.copy(value) if isinstance(value, MutableMapping) else value for name, value in named.items()}


@torch.no_grad()
def capture(
    model: nn.Module, blocks: nn.ModuleList, samples: tuple[tuple[int, ...], ...], device: torch.device, rows: int | None = None
) -> tuple[list[torch.Tensor], list[dict[int, Arguments]]]:
    """What enters the first block, a batch each, on the host; what each block is called with beside it, by rows of the batch.

    No block runs: each hands its input on. So embeddings, masks and rotary angles are all that is computed. `rows`:
    samples in a batch, by memory when None; one alone is always among the arguments. Raises InputError for a model whose
    blocks are not called one after the other with hidden states, and beside them what is the same for every text.
    """
    rows = rows or rows_at_once(blocks[0], len(samples[0]), device)
    inputs: list[torch.Tensor] = []
    arguments: list[dict[int, Arguments]] = [{} for _ in blocks]
    forms: Forms = {}
    with lent(beside(model, blocks), device), understood(model):
        _, first = _watch(model, blocks, samples[:1], device, forms)
        _, other = _watch(model, blocks, (samples[0][::-1],), device, forms)
        for index, (one, two) in enumerate(zip(first, other, strict=True)):
            if not _is_same(one, two):
                raise ValueError(f"what block {index} is called with depends on the text")
            arguments[index][1] = one
        for start in range(0, len(samples), rows):
            hidden, calls = _watch(model, blocks, samples[start : start + rows], device, forms)
            inputs.append(hidden.cpu())
            for known, named in zip(arguments, calls, strict=True):
                known.setdefault(len(hidden), named)
    return inputs, arguments


def _watch(
    model: nn.Module, blocks: nn.ModuleList, samples: tuple[tuple[int, ...], ...], device: torch.device, forms: Forms
) -> tuple[torch.Tensor, list[Arguments]]:
    """The hidden states that enter the first block, and how each is called. Raises ValueError."""
    entering: list[torch.Tensor] = []
    calls: list[Arguments] = []

    def answer(index: int, hidden: torch.Tensor, named: Arguments) -> torch.Tensor:
        if index != len(calls) or hidden.shape[:-1] != (len(samples), len(samples[0])):
            raise ValueError(f"block {index} is call {len(calls)}, on {list(hidden.shape)}")
        entering.append(hidden)
        calls.append(named)
        return hidden

    decoder: Any = model.base_model
    with standing_in(blocks, forms, answer):
        decoder(input_ids=torch.tensor(samples).to(device), use_cache=False)
    if len(calls) < len(blocks):
        raise ValueError(f"{len(blocks) - len(calls)} blocks are not called")
    return entering[0], calls


def _is_same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(map(_is_same, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_is_same(one[key], two[key]) for key in one)
    return bool(one == two)  # a cache, which would grow from call to call, equals itself alone


def rows_at_once(block: nn.Module, tokens: int, device: torch.device) -> int:
    """Samples in a batch, so that what a block computes on the way stays within BATCH_BYTES of the device."""
    widths = sum(module.out_features for module in block.modules() if isinstance(module, nn.Linear))
    per_row = max(1, tokens * widths * next(block.parameters()).element_size())
    return max(1, BATCH_BYTES[device.type] // per_row)
