"""Broken copies and other formats of tiny models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a transformers Llama as GGUF, with the matrices stored as `kind` (F32 or Q8_0)."""
    import gguf
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip

    def rename(name: str) -> str:
        stem, kind = name.removeprefix("model.").rsplit(".", 1)
        if stem.startswith("layers."):
            _, layer, rest = stem.split(".", 2)
            return f"blk.{layer}.{names[rest]}.{kind}"
        return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem] + f".{kind}"

    def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, kind: str = "F32") -> Path:
        path = tmp_path / f"tiny-{kind}.gguf"
        config: Any = model.config
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        tokens = [tokenizer.convert_ids_to_tokens(i) or f"<extra_{i}>" for i in range(config.vocab_size)]
        tokens[300:302] = "~~", "||"  # transformers reads a list of one merge as a text
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
        writer.add_token_merges(["~ ~", "| |"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
        writer.add_unk_token_id(0)
        writer.add_chat_template(tokenizer.chat_template)
        tensors = dict(model.state_dict())
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        for name, tensor in tensors.items():
            weight = tensor.numpy()
            if ".q_proj." in name or ".k_proj." in name:  # llama.cpp interleaves the rotary halves of each head
                heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            stored = getattr(gguf.GGMLQuantizationType, kind if weight.ndim > 1 else "F32")
            writer.add_tensor(rename(name), gguf.quants.quantize(weight, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
