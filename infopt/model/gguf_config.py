"""The config of a GGUF file: what transformers makes of the metadata, with what it leaves out put right.

Left out are the width of a head (some architectures, some versions) and the scaling of rotary frequencies (all): without
it long texts, and for Llama 3 every text, run through another model, silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.errors import InputError
from infopt.model import gguf_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: llama.cpp has this base built in for the windowed layers of gemma3.
GEMMA3_LOCAL_BASE = 10000.0
FACTORS = "rope_freqs.weight"
#: What every Llama 3.x uses; only the largest factor differs between them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(path: Path, reader: Any) -> PreTrainedConfig:
    """The config of the file that `reader` has open. Raises InputError for rotary scaling that is not covered."""
    from transformers import AutoConfig

    auto: Any = AutoConfig
    config: Any = auto.from_pretrained(path.parent, gguf_file=path.name)
    metadata = gguf_file.values(reader, "")
    architecture = metadata["general.architecture"]
    width = metadata.get(f"{architecture}.attention.key_length")
    if width is not None and getattr(config, "head_dim", width) != width:
        config.head_dim = int(width)
    if config.model_type == "gemma3_text":
        _repair_gemma3(config, float(metadata["gemma3.rope.freq_base"]))
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "linear":
        _set_rope(config, {"rope_type": "linear", "factor": float(metadata[f"{architecture}.rope.scaling.factor"])})
    elif kind != "none":
        raise InputError(
            f"{path}: rotary scaling {kind!r}, which is not read from GGUF; allowed: none, linear, Llama 3's",
            hint="give the original folder",
        )
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == FACTORS), None)
    if factors is not None:
        _set_rope(config, {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3})
        if not _gives(config, factors):
            raise InputError(f"{path}: rotary factors ({FACTORS}) that are not Llama 3's", hint="give the original folder")
    made: PreTrainedConfig = config
    return made


def gemma3_scale(layers: int, hidden: int, heads: int, head_dim: int) -> float:
    """What llama.cpp divides the scores of gemma3 by the root of: the 27 B model has its own (src/models/gemma3.cpp)."""
    return hidden / heads if layers == 62 else head_dim


def _repair_gemma3(config: Any, base: float) -> None:
    config.query_pre_attn_scalar = gemma3_scale(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim
    )
    config.rope_parameters = {
        "full_attention": {"rope_type": "default", "rope_theta": base},
        "sliding_attention": {"rope_type": "default", "rope_theta": GEMMA3_LOCAL_BASE},
    }


def _set_rope(config: Any, changed: dict[str, Any]) -> None:
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        parameters = {**parameters, "full_attention": {**parameters["full_attention"], **changed}}
    else:
        parameters = {**parameters, **changed}
    config.rope_parameters = parameters


def _gives(config: Any, factors: Any) -> bool:
    """Whether transformers divides the plain frequencies by `factors` under this config."""
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, width, 2) / width)
    return bool(np.allclose(plain / scaled.numpy(), factors, rtol=1e-4))
