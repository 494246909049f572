"""Layers' weights for the GPU kernels: as they are, or, where they are stored as integers, from those integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from infopt.kernels.gpu.attention import Heads
from infopt.kernels.gpu.weight import Weight, fits, float8, integers, plain
from infopt.kernels.packed import GROUP, rounded
from infopt.runtime import weights
from infopt.runtime.decoder import Block, Decoder, Unfit, describe
from infopt.runtime.weights import FLOATING, Wanted, release, require

#: Positions beyond a model's context that rotary tables have: tokens which do not count may stand there.
BEYOND = 32


@dataclass(frozen=True)
class Layer:
    qkv: Weight
    output: Weight
    gate_up: Weight
    """Their rows take turns."""
    down: Weight
    heads: Heads
    input_norm: torch.Tensor
    attention_out_norm: torch.Tensor | None
    feed_norm: torch.Tensor
    feed_out_norm: torch.Tensor | None

    @property
    def weights(self) -> tuple[Weight, Weight, Weight, Weight]:
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True)
class Outside:
    """What stands before and behind the layers. `embedding` [vocabulary, hidden], its rows multiplied by `scale`."""

    embedding: torch.Tensor
    scale: float
    final_norm: torch.Tensor
    head: Weight
    is_tied: bool
    """Whether the embedding's memory is the head's."""


@dataclass(frozen=True)
class DeviceModel:
    """All that a step needs of a model. `dtype`: of activations; `activation`: 0 SiLU, 1 GELU; rotary tables have `positions`."""

    layers: tuple[Layer, ...]
    outside: Outside
    context: int
    epsilon: float
    activation: int
    dtype: torch.dtype

    @property
    def weights_bytes(self) -> int:
        return self.read_bytes + (0 if self.outside.is_tied else self.outside.embedding.nbytes)

    @property
    def read_bytes(self) -> int:
        """What a step of one token reads of the weights."""
        return self.outside.head.nbytes + sum(weight.nbytes for layer in self.layers for weight in layer.weights)

    @cached_property
    def fuses_norms(self) -> bool:
        """Whether norms go with the products around them: not where more stands between these, nor in float16, which may not hold
        a row before it is divided."""
        return self.dtype != torch.float16 and all(
            norm is None for layer in self.layers for norm in (layer.attention_out_norm, layer.feed_out_norm)
        )

    def first(self, count: int) -> DeviceModel:
        """Its first layers, and what stands outside."""
        return replace(self, layers=self.layers[:count])


def packed(
    model: Any, *, device: torch.device | str, weights: Wanted = "auto", head: Wanted = "auto", group: int = GROUP
) -> DeviceModel:
    """A transformers model's weights on `device`; its own are given back layer by layer. `weights`: what floating-point ones
    become, integers in groups of `group` inputs; `head`: the same for the output head, auto leaving it as it is.

    Raises Unfit, before any was touched, for a model that the kernels do not run.
    """
    device, decoder = torch.device(device), describe(model)
    dtype = model.dtype if model.dtype in (torch.bfloat16, torch.float16) else torch.float32
    embedding, out = decoder.embedding, decoder.head
    for module in (*(each for block in decoder.blocks for each in block.linears), embedding, out):
        require(module)
    table: Any = embedding.weight
    if table.dtype not in FLOATING:
        raise Unfit("its embedding is no floating-point table")
    turns: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in dict.fromkeys(block.rotary for block in decoder.blocks):
        cos, sin = decoder.tables(name, decoder.context + BEYOND)
        turns[name] = cos.to(device), sin.to(device)
    layers = tuple(_layer(block, decoder, turns[block.rotary], weights, group, dtype, device) for block in decoder.blocks)
    last = joined([out], head, device, dtype)
    is_tied = decoder.is_tied and last.bits is None and last.data.dtype == dtype
    own = last.data[: last.rows, : last.inner] if is_tied else table.detach().to(device, dtype, copy=True)
    release([embedding, out])
    outside = Outside(own, decoder.embedding_scale, _gain(decoder.final_norm, dtype, device), last, is_tied)
    return DeviceModel(layers, outside, decoder.context, decoder.norm_epsilon, decoder.activation, dtype)


def _layer(
    block: Block,
    decoder: Decoder,
    turns: tuple[torch.Tensor, torch.Tensor],
    wanted: Wanted,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Layer:
    def taken(*modules: nn.Module, in_pairs: bool = False) -> Weight:
        made = joined(modules, wanted, device, dtype, in_pairs=in_pairs, group=group)
        release(modules)
        return made

    def gain(norm: torch.Tensor | None) -> Any:
        return None if norm is None else _gain(norm, dtype, device)

    heads = Heads(
        decoder.heads, decoder.kv_heads, decoder.head_dim, *turns, decoder.attention_scale, block.window,
        gain(block.query_norm), gain(block.key_norm), decoder.norm_epsilon,
    )  # fmt: skip
    return Layer(
        taken(*block.qkv), taken(block.output), taken(*block.gate_up, in_pairs=True), taken(block.down), heads,
        gain(block.input_norm), gain(block.attention_out_norm), gain(block.feed_norm), gain(block.feed_out_norm),
    )  # fmt: skip


def _gain(norm: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """In `dtype` where that holds it exactly, which halves what every product reads of it."""
    fits = bool((norm.to(dtype).float() == norm).all())
    return norm.detach().to(device, dtype if fits else torch.float32, copy=True)


def joined(
    modules: Sequence[nn.Module],
    wanted: Wanted,
    device: torch.device,
    dtype: torch.dtype,
    *,
    in_pairs: bool = False,
    group: int = GROUP,
) -> Weight:
    """Layers that read the same input as one matrix; `in_pairs`: gate and up rows (or one layer's halves) take turns.

    Integers of 4 and 8 bits stay what they are, if their groups go with the kernels' blocks; floating-point weights become what
    is `wanted`, auto being their own type, and that of activations, `dtype`, for what other integers stand for.
    """

    def put(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        moved = [part.detach().to(device) for part in parts]
        if not in_pairs:
            return torch.cat(moved)
        gate, up = moved if len(moved) == 2 else moved[0].chunk(2)
        return torch.stack([gate, up], 1).flatten(0, 1)

    bias = None
    if any(getattr(module, "bias", None) is not None for module in modules):
        bias = put([_bias(module) for module in modules])
    known = [stored for stored in map(weights.integers, modules) if stored is not None]
    if len(known) == len(modules) and len({each.grid for each in known}) == 1 and _fits(known[0]):
        first = known[0]
        zeros = None if first.zeros is None else put([each.zeros for each in known if each.zeros is not None])
        q, scales = put([each.q for each in known]), put([each.scales for each in known])
        return integers(q, scales, zeros, first.bits, first.group, bias)
    weight = put([weights.layer_weight(module) for module in modules])
    if wanted in ("int8", "int4"):
        bits = 8 if wanted == "int8" else 4
        return integers(*rounded(weight, bits, group), None, bits, group, bias)
    if wanted == "float8":
        return float8(weight, bias)
    own = dtype if known else weight.dtype
    return plain(weight.to(own if wanted == "auto" else getattr(torch, wanted)), bias)


def _fits(stored: weights.Integers) -> bool:
    return fits(stored.bits, stored.group, stored.q.shape[1])


def _bias(module: Any) -> torch.Tensor:
    """[rows], zeros where there is none."""
    found = getattr(module, "bias", None)
    rows = int(getattr(module, "out_features", None) or module.weight.shape[0])
    return torch.zeros(rows) if found is None else found.detach().float().cpu()
