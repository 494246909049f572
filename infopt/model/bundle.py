"""A model that is open: module, tokenizer, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    weights itself; `packed` maps a module's dotted name to the tensors to store in place of its `weight`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: str
    plan: LoadPlan = field(default_factory=LoadPlan)
    steps: tuple[str, ...] = ()
    save_config: dict[str, Any] | None = None
    packed: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def resident_bytes(self) -> int:
        """Bytes of all parameters and buffers held now, tied tensors counted once."""
        seen: dict[int, int] = {}
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(seen.values())
