"""Which weights are trained, and how they come back: all of them as float32 masters, or low-rank adapters that are merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infopt.kernels.onednn import OneDnn


@dataclass
class Weights:
    """`masters` take the steps; `working`, the same tensors or copies in bfloat16, are what the model multiplies by."""

    masters: list[torch.Tensor]
    working: list[torch.Tensor]

    def collect(self) -> None:
        """Gradients of the working copies become the masters'."""
        for master, working in zip(self.masters, self.working, strict=True):
            if master is not working:
                master.grad = None if working.grad is None else working.grad.float()
                working.grad = None

    @torch.no_grad()
    def spread(self) -> None:
        """The working copies become the masters, rounded."""
        for master, working in zip(self.masters, self.working, strict=True):
            if master is not working:
                working.copy_(master)

    def beside(self, more: Sequence[torch.Tensor]) -> Weights:
        """With tensors that are trained along, as they are."""
        return Weights([*self.masters, *more], [*self.working, *more])


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones, and not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def listening(device: torch.device) -> Iterator[None]:
    """For a teacher, whose gradient nobody wants: products of bfloat16 operands where those are fast."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if device.type == "cpu":
            stack.enter_context(OneDnn(rounded=True))
        elif has_fast_bfloat16(device):
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        yield


@contextmanager
def all_weights(model: Any) -> Iterator[Weights]:
    """Every floating-point parameter, float32. Where bfloat16 is fast the model runs in it meanwhile.

    When the block ends, the model is in its own dtype again.
    """
    working: list[torch.Tensor] = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    before = [parameter.dtype for parameter in working]
    is_narrow = has_fast_bfloat16(model.device)
    masters = working
    if is_narrow:
        masters = [parameter.detach().float().clone() for parameter in working]  # float32 ones would be the model's own
    # The parameters alone: buffers, such as the angles of rotary embeddings, would not survive it.
    for parameter in working:
        parameter.data = parameter.data.to(torch.bfloat16 if is_narrow else torch.float32)
        parameter.requires_grad_()
    try:
        yield Weights(masters, working)
    finally:
        for master, parameter, dtype in zip(masters, working, before, strict=True):
            parameter.requires_grad_(False).grad = None
            parameter.data = master.detach().to(dtype)


@contextmanager
def low_rank(model: Any, rank: int, seed: int) -> Iterator[Weights]:
    """Adapters of LoRA (arXiv 2106.09685) beside every linear layer but the head, which start as zero; merged at the end."""
    import peft

    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, task_type="CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for something under its old name
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
    trained: list[torch.Tensor] = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    # No cache: it would keep answering with the adapters as they were before the first step.
    is_fast = has_fast_bfloat16(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=is_fast, cache_enabled=False):
        yield Weights(trained, trained)
    adapted.merge_and_unload(safe_merge=True)
    model.requires_grad_(False)
