"""A model that is open: module, tokenizer, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from infopt.model.plan import LoadPlan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Bundle:
    """Everything that belongs to one open model. A technique's `apply` consumes it and returns the next one.

    `description` says what was really loaded ("SmolLM2-135M-Instruct, dequantized from Q4_1/Q8_0").
    `save_config` is the `quantization_config` dict to write into the saved `config.json` when a technique packs
    weights itself; `packed` maps a module's dotted name to the tensors to store in place of its `weight`. `files`: what a
    technique has to say beside the weights, name → text. `adapter`: LoRA weights that stay beside the others, under the
    names that peft stores them by; their `adapter_config.json` is among `files`.
    `notes`: how an engine runs it, a line each. `undone`: what has to be done for transformers' modules to run it, left out for
    the native engine.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: str
    plan: LoadPlan = field(default_factory=LoadPlan)
    steps: tuple[str, ...] = ()
    save_config: dict[str, Any] | None = None
    packed: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    undone: tuple[Callable[[Bundle], Bundle], ...] = ()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def resident_bytes(self) -> int:
        """Bytes of all parameters and buffers held now, tied tensors counted once, packed ones as packed."""
        held: int | None = getattr(self.model, "resident_bytes", None)
        if held is not None:  # the native engine's own weights
            return held
        tensors = chain(self.model.parameters(), self.model.buffers(), _hidden(self.model))
        # The storages are held until all are counted, so that no address is seen twice.
        seen = {part.untyped_storage().data_ptr(): part.untyped_storage() for tensor in tensors for part in _plain(tensor)}
        return sum(storage.nbytes() for storage in seen.values())


def _plain(tensor: Any) -> Iterator[torch.Tensor]:
    """A tensor, or the tensors that a subclass (quanto's) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _hidden(model: Any) -> Iterator[torch.Tensor]:
    """Weights that torch's dynamic int8 layers hold outside of parameters and buffers."""
    for module in model.modules():
        if type(module).__name__ == "LinearPackedParams":
            yield from (tensor for tensor in module._weight_bias() if tensor is not None)
