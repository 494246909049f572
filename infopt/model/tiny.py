"""Tiny random models with real architectures and a byte-level tokenizer, for tests and first tries.

About 100 k parameters each; hidden and intermediate sizes are multiples of 64, so groups of 32 and 64 divide them.
They are saved once to the cache, so that everything downstream handles them like any other folder.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.model.cache import build_once, cache_dir
from infopt.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CONTEXT = 2048
_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SHARED: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.125,  # 1/√hidden: logits of a real model's spread, so that changed weights show
    "tie_word_embeddings": False,
}
#: Model kind → transformers' model type and what differs from the shared sizes.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("llama", {"tie_word_embeddings": True}),
    "tiny-qwen2": ("qwen2", {}),
    "tiny-gemma3": (
        "gemma3_text",
        {
            "vocab_size": 1024,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
        },
    ),
    "tiny-moe": ("mixtral", {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ChatML template, padding on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make_fast: Any = PreTrainedTokenizerFast
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.add_special_tokens(list(SPECIAL))
    fast: PreTrainedTokenizerFast = make_fast(
        tokenizer_object=byte_level,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT,
    )
    return fast


def make(kind: str = "tiny", seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random float32 model of `KINDS[kind]` in eval mode, and its tokenizer. torch's own random state is left alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model_type, own = KINDS[kind]
    config = AutoConfig.for_model(model_type, **{**_SHARED, **own}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng(), quiet(), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = auto.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero by default, and a bias that is lost would go unseen
                parameter.normal_(0, 0.1)
        if config.tie_word_embeddings:  # else every token's likeliest successor is itself
            model.get_input_embeddings().weight.mul_(0.1)
            model.model.norm.weight.fill_(10)
    model.eval()
    model.requires_grad_(False)
    return model, tokenizer()


def spec_hash(kind: str, seed: int = 0) -> str:
    """What the weights depend on: sizes, seed, and torch's random numbers."""
    spec = [*KINDS[kind], _SHARED, _CHAT, seed, version("torch").partition("+")[0]]
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def folder(kind: str, seed: int = 0) -> Path:
    """The model as a saved folder in the cache."""

    def build(target: Path) -> None:
        model, byte_level = make(kind, seed)
        with quiet():
            model.save_pretrained(target)
            byte_level.save_pretrained(target)

    return build_once(cache_dir() / "models" / f"{kind}-{spec_hash(kind, seed)[:8]}", build)
