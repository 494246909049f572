"""4-bit NormalFloat weights as bitsandbytes stores and runs them, made from a weight that is at hand.

bitsandbytes itself quantizes while transformers reads a model; here a technique decides when, and what is stored is kept
apart from the layer that runs, since on a CPU with bf16 instructions bitsandbytes repacks a layer when it first runs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

#: Weights per scale; what transformers' loader uses.
BLOCK = 64


def _quantize(weight: torch.Tensor, double_quant: bool) -> tuple[torch.Tensor, Any]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that downloads kernels
    from bitsandbytes.functional import quantize_4bit

    found: tuple[torch.Tensor, Any] = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4")
    return found


def rounded(weight: torch.Tensor, double_quant: bool) -> torch.Tensor:
    """`weight` [out, in] rounded to NF4 and back, in its dtype."""
    from bitsandbytes.functional import dequantize_4bit

    packed, state = _quantize(weight, double_quant)
    found: torch.Tensor = dequantize_4bit(packed, state)
    return found.to(weight.dtype)


def pack(layer: nn.Linear, double_quant: bool, compute_dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], nn.Linear]:
    """What is stored of `layer`, by the names after its own, and bitsandbytes' layer of the same numbers, which runs it."""
    import bitsandbytes

    nn4: Any = bitsandbytes.nn  # untyped
    data, state = _quantize(layer.weight.data, double_quant)
    parts = state.as_dict(packed=True)
    made: nn.Linear = nn4.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=compute_dtype,
        compress_statistics=double_quant, quant_type="nf4", device="meta",
    ).train(layer.training)  # fmt: skip
    own = {name: part.clone() for name, part in parts.items()}
    made.weight, made.bias = nn4.Params4bit.from_prequantized(data.clone(), own, device=data.device, module=made), layer.bias
    stored = {"weight": data, **{f"weight.{name}": part for name, part in parts.items()}}
    if layer.bias is not None:
        stored["bias"] = layer.bias.data
    return {name: tensor.cpu() for name, tensor in stored.items()}, made


def config(double_quant: bool, compute_dtype: str, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of the saved `config.json`. `ignored`: full names of the linear layers left alone."""
    import transformers

    make: Any = transformers.BitsAndBytesConfig  # untyped
    described = make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=ignored,
    )
    found: dict[str, Any] = described.to_dict()
    return found
