"""Which weights are trained, and how they come back: all of them as float32 masters, or low-rank adapters that are merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def all_weights(model: Any) -> Iterator[list[torch.Tensor]]:
    """Every floating-point parameter in float32; in the model's own dtype again when the block ends."""
    dtype = model.dtype
    model.float()
    trained = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    try:
        yield [parameter.requires_grad_() for parameter in trained]
    finally:
        for parameter in trained:
            parameter.requires_grad_(False).grad = None
        model.to(dtype)


@contextmanager
def low_rank(model: Any, rank: int, seed: int) -> Iterator[list[torch.Tensor]]:
    """Adapters of LoRA (arXiv 2106.09685) beside every linear layer of the blocks, which start as zero; merged at the end."""
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
    yield trained
    adapted.merge_and_unload(safe_merge=True)
    model.requires_grad_(False)
