"""Random weights in the shapes of real models: for speed and memory, never for quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from infopt.kernels.gpu.attention import Heads
from infopt.kernels.gpu.weight import FLOAT8, ROWS, Weight
from infopt.runtime.device_weights import BEYOND, DeviceModel, Layer, Outside

CONTEXT = 8192


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool = False
    has_head_norms: bool = False
    context: int = CONTEXT

    @property
    def linear(self) -> int:
        """Weights of the layers' linear parts."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary


SHAPES = {
    "8B": Shape(4096, 32, 32, 8, 128, 14336, 128256),
    "1B": Shape(2048, 16, 32, 8, 64, 8192, 128256, is_tied=True),
    "0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151936, is_tied=True, has_head_norms=True),
    "tiny": Shape(64, 2, 4, 2, 16, 128, 320, context=1024),
}
"""Llama-3.1-8B, Llama-3.2-1B, Qwen3-0.6B, and one for a CPU."""
#: Inputs of a group of integers; the tiny shape's rows are shorter.
GROUP = 128


def transformer(shape: Shape, device: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A transformers model."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    kind = Qwen3Config if shape.has_head_norms else LlamaConfig
    config = kind(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.is_tied, max_position_embeddings=shape.context,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config.dtype = dtype
    torch.manual_seed(seed)
    with torch.device(device):
        made: Any = AutoModelForCausalLM
        model = made.from_config(config, dtype=dtype).eval()
    return model


@torch.no_grad()
def counting(shape: Shape, device: str) -> Any:
    """The same, but each token is followed by the one after it: layers add next to nothing to a token's embedding, and the head's
    row of a token is the embedding of the one before. `shape` has a head of its own."""
    model = transformer(shape, device)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 1e-5
        layer.mlp.down_proj.weight *= 1e-5
    model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
    return model


def outline(shape: Shape, kind: str, group: int = GROUP) -> DeviceModel:
    """The same without weights, to see what a step launches. `kind`: bfloat16, float8, int8 or int4, the head in bfloat16."""
    turns = torch.empty(shape.context + BEYOND, shape.head_dim, device="meta")
    gain = torch.empty(shape.hidden, dtype=torch.bfloat16, device="meta")
    own = torch.empty(shape.head_dim, dtype=torch.bfloat16, device="meta") if shape.has_head_norms else None
    heads = Heads(shape.heads, shape.kv_heads, shape.head_dim, turns, turns, shape.head_dim**-0.5, 0, own, own, 1e-5)
    width = shape.heads * shape.head_dim
    layer = Layer(
        weight(width + 2 * shape.kv_heads * shape.head_dim, shape.hidden, kind, group),
        weight(shape.hidden, width, kind, group),
        weight(2 * shape.intermediate, shape.hidden, kind, group), weight(shape.hidden, shape.intermediate, kind, group), heads,
        gain, None, gain, None,
    )  # fmt: skip
    head = weight(shape.vocabulary, shape.hidden, "bfloat16", group)
    outside = Outside(head.data, 1.0, gain, head, shape.is_tied)
    return DeviceModel((layer,) * shape.layers, outside, shape.context, 1e-5, 0, torch.bfloat16)


def weight(rows: int, inner: int, kind: str, group: int) -> Weight:
    """Without its numbers."""
    padded = -(-rows // ROWS) * ROWS
    if kind in ("bfloat16", "float8"):
        data = torch.empty(padded, inner, dtype=torch.bfloat16 if kind == "bfloat16" else FLOAT8, device="meta")
        return Weight(rows, inner, data, scales=torch.empty(padded, device="meta") if kind == "float8" else None)
    bits = int(kind.removeprefix("int"))
    elements = torch.empty(padded, inner * bits // 16, dtype=torch.int16, device="meta")
    scales = torch.empty(padded, inner // group, dtype=torch.bfloat16, device="meta")
    return Weight(rows, inner, elements, bits, group, scales)
