"""A Llama-like decoder as data, read from transformers' modules: what the whole-step kernels need to know of it.

Nothing is assumed of a class's name: modules are found by the parts they have, and what they compute is checked on a small
random model of the class (`architecture`) before a model is run this way. What is known not to fit is refused here, with the
reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu_fast": 1}
#: Rotary tables that change with the length of the text.
CHANGING = ("dynamic", "longrope")
#: Numbers of a head that attention's kernel has room for.
MOST_HEAD_DIM = 512


class Unfit(Exception):  # noqa: N818 - says why, and is answered by another way of running the model
    """The whole-step kernels do not run this model; the message says why."""


@dataclass(frozen=True)
class Block:
    """Linear layers by role, several where their outputs are joined; norm weights as they are multiplied, or None."""

    qkv: tuple[nn.Module, ...]
    output: nn.Module
    gate_up: tuple[nn.Module, ...]
    """gate and up, or one layer that has gate's rows before up's."""
    down: nn.Module
    input_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    attention_out_norm: torch.Tensor | None
    feed_norm: torch.Tensor
    feed_out_norm: torch.Tensor | None
    window: int
    """Positions that attention reaches back, its own included; 0: all."""
    rotary: str
    """Which of the model's tables."""

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        return (*self.qkv, self.output, *self.gate_up, self.down)


@dataclass(frozen=True)
class Decoder:
    """All of a model but its weights' layout."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    activation: int
    rotary_dim: int
    norm_epsilon: float
    attention_scale: float
    embedding_scale: float
    blocks: tuple[Block, ...]
    embedding: nn.Module
    head: nn.Module
    is_tied: bool
    final_norm: torch.Tensor
    rotary: nn.Module

    def tables(self, name: str, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [positions, rotary_dim], as the model computes them."""
        return _tables(self.rotary, name, positions)


def describe(model: Any) -> Decoder:
    """Raises Unfit for a model that the whole-step kernels cannot run."""
    config = model.config.get_text_config(decoder=True)
    base = _base(model)
    layers = list(base.layers)
    if not layers:
        raise Unfit("it has no layers")
    _refuse_other_parts(base, layers)
    activation = str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", ""))
    if activation not in ACTIVATIONS:
        raise Unfit(f"its activation is {activation!r}")
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None):
        raise Unfit("it caps its logits")
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if others:
        raise Unfit(f"it has layers of {', '.join(others)}")
    attention = layers[0].self_attn
    head_dim = int(getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if head_dim > MOST_HEAD_DIM:
        raise Unfit(f"its heads have {head_dim} numbers; the kernels hold {MOST_HEAD_DIM} at most")
    has_tables = "layer_type" in inspect.signature(base.rotary_emb.forward).parameters
    blocks = tuple(_block(layer, config, kind, kind if has_tables else "") for layer, kind in zip(layers, kinds, strict=True))
    cos, _ = _tables(base.rotary_emb, blocks[0].rotary, 1)
    norms = {_epsilon(module) for _, module in base.named_modules() if _is_norm(module)}
    if len(norms) > 1:
        raise Unfit(f"its norms differ in epsilon: {sorted(norms)}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    described = Decoder(
        hidden=config.hidden_size, heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads, head_dim=head_dim,
        intermediate=config.intermediate_size, vocabulary=_rows(head), context=config.max_position_embeddings,
        activation=ACTIVATIONS[activation], rotary_dim=cos.shape[1], norm_epsilon=norms.pop(),
        attention_scale=float(attention.scaling), embedding_scale=float(getattr(embedding, "embed_scale", None) or 1.0),
        blocks=blocks, embedding=embedding, head=head,
        is_tied=getattr(head, "weight", None) is embedding.weight, final_norm=_norm_weight(base.norm), rotary=base.rotary_emb,
    )  # fmt: skip
    _refuse_other_shapes(described)
    return described


def _refuse_other_shapes(found: Decoder) -> None:
    """Buffers are as large as the configuration says: no layer may be wider."""
    joined = (found.heads + 2 * found.kv_heads) * found.head_dim
    wanted = (joined, found.heads * found.head_dim, 2 * found.intermediate, found.intermediate)
    for index, block in enumerate(found.blocks):
        qkv, gate_up = (sum(map(_rows, layers)) for layers in (block.qkv, block.gate_up))
        shapes = (qkv, _columns(block.output), gate_up, _columns(block.down))
        if shapes != wanted:
            raise Unfit(f"layer {index} has products of {shapes}, where the configuration says {wanted}")


def _base(model: Any) -> Any:
    base = model.base_model
    missing = [name for name in ("layers", "norm", "rotary_emb", "embed_tokens") if not hasattr(base, name)]
    if missing:
        raise Unfit(f"{type(base).__name__} has no {missing[0]}")
    return base


def _refuse_other_parts(base: Any, layers: list[Any]) -> None:
    known = {"layers", "norm", "rotary_emb", "embed_tokens", "rotary_emb_local"}
    others = sorted({name for name, _ in base.named_children()} - known)
    if others:
        raise Unfit(f"{type(base).__name__} has {others[0]} beside its layers")
    types = base.rotary_emb.rope_type if hasattr(base.rotary_emb, "rope_type") else "default"
    for kind in types.values() if isinstance(types, dict) else [types]:
        if kind in CHANGING:
            raise Unfit(f"its rotary positions are {kind}: they change with the length of the text")
    for layer in layers:
        for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
            if not hasattr(layer, name):
                raise Unfit(f"{type(layer).__name__} has no {name}")


def _block(layer: Any, config: Any, kind: str, rotary: str) -> Block:
    attention, feed = layer.self_attn, layer.mlp
    qkv = _parts(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    gate_up = _parts(feed, ("gate_proj", "up_proj"), "gate_up_proj")
    _parts(attention, ("o_proj",)), _parts(feed, ("down_proj",))
    _refuse(attention, {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "rotary_emb", "kv_cache"})
    _refuse(feed, {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"})
    _refuse(
        layer,
        {
            "self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
            "post_feedforward_layernorm", "resid_attn_dropout", "resid_mlp_dropout",
        },
    )  # fmt: skip
    is_sandwich = hasattr(layer, "pre_feedforward_layernorm")
    window = getattr(config, "sliding_window", None) or 0
    if kind != "sliding_attention" and getattr(config, "layer_types", None):
        window = 0
    head_dim = getattr(attention, "head_dim", None)
    query, key = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    for norm in (query, key):
        if norm is not None and norm.weight.numel() != head_dim:
            raise Unfit("it normalises queries over all heads at once")
    return Block(
        qkv, attention.o_proj, gate_up, feed.down_proj,
        input_norm=_norm_weight(layer.input_layernorm),
        query_norm=None if query is None else _norm_weight(query),
        key_norm=None if key is None else _norm_weight(key),
        attention_out_norm=_norm_weight(layer.post_attention_layernorm) if is_sandwich else None,
        feed_norm=_norm_weight(layer.pre_feedforward_layernorm if is_sandwich else layer.post_attention_layernorm),
        feed_out_norm=_norm_weight(layer.post_feedforward_layernorm) if is_sandwich else None,
        window=window, rotary=rotary,
    )  # fmt: skip


def _parts(owner: Any, names: Iterable[str], joined: str = "") -> tuple[nn.Module, ...]:
    if joined and hasattr(owner, joined):
        return (getattr(owner, joined),)
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise Unfit(f"{type(owner).__name__} has no {missing[0]}")
    return tuple(getattr(owner, name) for name in names)


def _refuse(owner: nn.Module, known: set[str]) -> None:
    others = sorted({name for name, _ in owner.named_children()} - known)
    if others:
        raise Unfit(f"{type(owner).__name__} has {others[0]}")


def _rows(linear: Any) -> int:
    return int(getattr(linear, "out_features", None) or linear.weight.shape[0])


def _columns(linear: Any) -> int:
    return int(getattr(linear, "in_features", None) or linear.weight.shape[1])


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


@torch.no_grad()
def _norm_weight(norm: Any) -> torch.Tensor:
    """What a norm multiplies by, found by giving it ones: float32. Raises Unfit for what is no RMSNorm."""
    if not _is_norm(norm):
        raise Unfit(f"{type(norm).__name__} is no RMSNorm")
    ones = torch.ones(1, norm.weight.shape[0], dtype=torch.float32, device=norm.weight.device)
    scaled: torch.Tensor = norm(ones)[0].float() * (1 + _epsilon(norm)) ** 0.5
    exact = [norm.weight.float(), 1 + norm.weight.float()]
    found: torch.Tensor = min(exact, key=lambda weight: float((weight - scaled).abs().max()))
    return found.contiguous()


@torch.no_grad()
def _tables(rotary: Any, name: str, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(positions)[None]
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), ids, **({"layer_type": name} if name else {}))
    return cos[0].float().contiguous(), sin[0].float().contiguous()
