"""Small models of every architecture that exports cover, with tokenizers of real kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import stub_tokenizers

from infopt.model import save
from infopt.model.bundle import Bundle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Make = Callable[..., Path]
SIZES: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.125,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-scaled": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 16},
    "qwen3": {},
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": 16, "query_pre_attn_scalar": 32},
}  # fmt: skip


@pytest.fixture(scope="session")
def byte_level() -> Callable[[str], PreTrainedTokenizerFast]:
    """`byte_level(name)`: a trained BPE tokenizer of 500 tokens that splits text as llama.cpp's `name` does."""
    return stub_tokenizers.byte_level


@pytest.fixture(scope="session")
def sentencepiece() -> Callable[[bool], PreTrainedTokenizerFast]:
    """`sentencepiece(prefixed)`: BPE with ▁ for spaces and byte fallback; `prefixed` puts one before the first word."""
    return stub_tokenizers.sentencepiece


@pytest.fixture
def make(tmp_path: Path, byte_level: Callable[[str], PreTrainedTokenizerFast]) -> Make:
    """`make(kind, tokenizer=…, **config)`: a saved random model of `KINDS[kind]`."""

    def folder(kind: str, tokenizer: Any = None, **changed: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(kind.partition("-")[0], **{**SIZES, **KINDS[kind], **changed})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):  # zeros and ones by default: a lost one would go unseen
                parameter.add_(torch.randn_like(parameter).mul_(0.1))
        target = tmp_path / kind
        save.save(Bundle(model, tokenizer or byte_level("gpt-2"), kind), target)
        return target

    return folder
