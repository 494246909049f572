"""What llama.cpp does to the inputs of a matrix product on a CPU, done in transformers, so that the two can be compared.

ggml turns activations into the type that goes with the weights (`vec_dot_type` in ggml-cpu.c): 8-bit integers with a scale
per 32 or 256 features for quantized weights, float16 and bfloat16 for those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from infopt.export import gguf_model


@contextmanager
def llama_inputs(model: Any, path: Path) -> Iterator[None]:
    """Inside the block the linear layers of `model` see their inputs as llama.cpp's would, given the types in the file `path`."""
    import gguf

    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    kinds = {tensor.parameter.removesuffix(".weight"): types[tensor.name] for tensor in gguf_model.tensors(model)}
    kinds.setdefault("lm_head", types["token_embd.weight"])
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, kind=kinds[name]: (as_stored(inputs[0], kind), *inputs[1:]))
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_stored(x: torch.Tensor, kind: str) -> torch.Tensor:
    """`x` [..., features] float32, rounded as ggml rounds the inputs of weights of type `kind`."""
    groups: torch.Tensor
    if kind in ("F32", "F16", "BF16"):
        return x.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()
    if kind.endswith("_K"):  # Q8_K: 256 features, the largest goes to −127, the scale stays float32
        groups = x.reshape(*x.shape[:-1], -1, 256)
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        inverse = torch.where(largest == 0, 0, -127 / largest)
        scale = torch.where(largest == 0, 0, 1 / inverse)
        return (groups * inverse).round().clamp(max=127).mul(scale).flatten(-2)
    groups = x.reshape(*x.shape[:-1], -1, 32)  # Q8_0 and Q8_1
    scale = groups.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return (groups * inverse).round().mul(scale.half().float()).flatten(-2)
