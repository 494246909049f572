"""A transformers model in GGUF's terms: architecture, metadata, tensor names and the layouts llama.cpp expects.

After llama.cpp's conversion scripts (conversion/base.py, llama.py, qwen.py, gemma.py). What the format or llama.cpp's
graph of an architecture has no place for is refused: it would be another model there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infopt.errors import InputError
from infopt.model.gguf_config import GEMMA3_LOCAL_BASE, gemma3_scale

Array = NDArray[np.float32]
Value = str | int | float | bool | list[Any]


@dataclass(frozen=True)
class Architecture:
    """`name` is GGUF's. `interleaved`: rotary pairs lie side by side, not half a head apart.

    `norm_shift` is added to the weights of norms. `biased`: projections may have biases. `pattern`: every so many-th
    layer attends to everything, the others to a window; None: all attend to everything.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    norm_shift: float = 0.0
    biased: bool = False
    pattern: int | None = None


#: transformers' model type → what it is in GGUF.
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2", biased=True),
    "qwen3": Architecture("qwen3"),
    "gemma3_text": Architecture("gemma3", activation="gelu_pytorch_tanh", norm_shift=1.0, pattern=6),
}


def find(config: Any) -> Architecture:
    """What `config` is in GGUF. Raises InputError for what has no place there."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"model type {kind!r} cannot be exported to GGUF; allowed: {known}", hint="--to onnx may have it")
    found = ARCHITECTURES[kind]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    every = found.pattern or 1
    expected = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
    scale = gemma3_scale(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, _head_dim(config))
    for what, is_right in (
        (f"activation {activation!r}", activation == found.activation),
        ("biases in attention", found.biased or not getattr(config, "attention_bias", False)),
        ("biases in the MLP", not getattr(config, "mlp_bias", False)),
        ("another order of windowed and full attention", list(layers) == expected or kind == "mistral"),
        ("soft-capped attention", getattr(config, "attn_logit_softcapping", None) is None),
        ("soft-capped logits", getattr(config, "final_logit_softcapping", None) is None),
        ("its own attention scale", getattr(config, "query_pre_attn_scalar", scale) == scale),
        ("partial rotary embedding", _rope(config).get("partial_rotary_factor", 1.0) == 1.0),
        ("bidirectional attention", not getattr(config, "use_bidirectional_attention", False)),
    ):
        if not is_right:
            raise InputError(f"{kind} with {what}: GGUF's {found.name} has no place for it", hint="--to onnx may have it")
    return found


def metadata(config: Any) -> dict[str, Value]:
    """The keys of `find(config).name`, without that prefix. Raises InputError for rotary scaling that is not covered."""
    found = find(config)
    head_dim = _head_dim(config)
    window: int = getattr(config, "sliding_window", None) or 0
    context = config.max_position_embeddings
    keys: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        # llama.cpp's llama has no window: within it, the model is the same.
        "context_length": min(context, window) if config.model_type == "mistral" and window else context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(_rope(config)["rope_theta"]),
    }
    if found.pattern:
        keys["attention.sliding_window"] = int(window)
        local = config.rope_parameters.get("sliding_attention", {})
        if (local.get("rope_theta"), local.get("rope_type", "default")) != (GEMMA3_LOCAL_BASE, "default"):
            raise InputError(f"windowed layers with rotary parameters {local}", hint=f"allowed: base {GEMMA3_LOCAL_BASE:g}")
    kind = _rope(config).get("rope_type", "default")
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(_rope(config)["factor"])}
    elif kind not in ("default", "llama3"):
        raise InputError(f"rotary scaling {kind!r} cannot be exported to GGUF; allowed: default, linear, llama3")
    return keys


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters of the layers that attend to everything."""
    parameters: dict[str, Any] = config.rope_parameters
    whole: dict[str, Any] = parameters.get("full_attention", parameters)
    return whole


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: its name there, and the parameter of the model that it holds."""

    name: str
    parameter: str
    is_head: bool = False
    """The output head, or the embedding where that is the head too."""


def tensors(model: Any) -> Iterator[Tensor]:
    """Every parameter once, in the order of the file. Raises InputError for one that GGUF has no name for."""
    import gguf

    config = model.config
    found = find(config)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for parameter, _ in model.named_parameters():  # a shared one is listed once, as the embedding
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None or not (found.biased or name.endswith(".weight")):
            raise InputError(f"{parameter} has no place in GGUF's {found.name}", hint="--to onnx may have it")
        yield Tensor(name, parameter, name == ("token_embd.weight" if is_tied else "output.weight"))


def rope_factors(model: Any) -> Array | None:
    """[head_dim/2] by which each rotary frequency is divided (`rope_freqs.weight`); None where it is the plain one.

    Read from the frequencies that the model computes with, so that no formula is repeated here.
    """
    config = model.config
    if _rope(config).get("rope_type", "default") != "llama3":
        return None
    used = model.model.rotary_emb.inv_freq.detach().cpu().numpy().astype(np.float64)
    steps = np.arange(0, _head_dim(config), 2, dtype=np.float64) / _head_dim(config)
    factors: Array = (_rope(config)["rope_theta"] ** -steps / used).astype(np.float32)
    return factors


def to_gguf(name: str, weight: Array, config: Any) -> Array:
    """A parameter (or its scales, [out, groups]) as GGUF's architecture lays it out."""
    found = find(config)
    if name.endswith("norm.weight"):
        return weight + np.float32(found.norm_shift)
    heads = _rotated_heads(name, config)
    if not found.interleaved or heads is None:
        return weight
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def from_gguf(name: str, weight: Array, config: Any) -> Array:
    """The inverse of `to_gguf`."""
    found = find(config)
    if name.endswith("norm.weight"):
        return weight - np.float32(found.norm_shift)
    heads = _rotated_heads(name, config)
    if not found.interleaved or heads is None:
        return weight
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _rotated_heads(name: str, config: Any) -> int | None:
    """How many heads the rows of a tensor are made of, where they are rotated."""
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in name else None
