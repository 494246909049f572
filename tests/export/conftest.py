"""Small models of every architecture that exports cover, with tokenizers of real kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infopt.model import gguf_tokenizer, save, tiny
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


def spoken() -> list[str]:
    """Text to train tokenizers on."""
    from infopt.data import texts

    return texts.read_text("bundled", "evaluation")[:60_000].splitlines()


@pytest.fixture(scope="session")
def byte_level() -> Callable[[str], PreTrainedTokenizerFast]:
    """`byte_level(name)`: a trained BPE tokenizer of 500 tokens that splits text as llama.cpp's `name` does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(name: str) -> PreTrainedTokenizerFast:
        rule = gguf_tokenizer.SPLITTERS[name]
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
        if rule.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(rule.pattern), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None))
        backend = Tokenizer(models.BPE(ignore_merges=rule.whole))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=list(tiny.SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(spoken(), trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **dict(zip(("pad_token", "bos_token", "eos_token"), tiny.SPECIAL, strict=True)),
            chat_template=tiny.tokenizer().chat_template,
        )

    return make


@pytest.fixture(scope="session")
def sentencepiece() -> Callable[[bool], PreTrainedTokenizerFast]:
    """`sentencepiece(prefixed)`: BPE with ▁ for spaces and byte fallback; `prefixed` puts one before the first word."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def make(prefixed: bool) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        space = [normalizers.Prepend("▁")] if prefixed else []
        backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
        special = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False, max_token_length=12)
        words = [f"▁{word}" for line in spoken() for word in line.split()]
        backend.train_from_iterator(words, trainer)
        document = json.loads(backend.to_str())
        vocabulary, document["added_tokens"] = document["model"]["vocab"], []
        document["model"]["merges"] = [  # sentencepiece merges whatever makes a token, the earlier tokens first
            [token[:i], token[i:]]
            for token in vocabulary
            for i in range(1, len(token))
            if token not in special and token[:i] in vocabulary and token[i:] in vocabulary
        ]
        backend = Tokenizer.from_str(json.dumps(document))
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special[:4]])
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )

    return make


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
