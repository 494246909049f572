"""Small BPE tokenizers of real kinds, trained on the bundled text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from infopt.model import gguf_tokenizer, tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def spoken() -> list[str]:
    """Text to train tokenizers on."""
    from infopt.data import texts

    return texts.read_text("bundled", "evaluation")[:60_000].splitlines()


def byte_level(name: str, size: int = 500) -> PreTrainedTokenizerFast:
    """A trained BPE tokenizer of `size` tokens that splits text as llama.cpp's `name` does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
        vocab_size=size, special_tokens=list(tiny.SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(spoken(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict(zip(("pad_token", "bos_token", "eos_token"), tiny.SPECIAL, strict=True)),
        chat_template=tiny.tokenizer().chat_template,
    )


def sentencepiece(prefixed: bool, size: int = 600) -> PreTrainedTokenizerFast:
    """BPE with ▁ for spaces and byte fallback; `prefixed` puts one before the first word."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = [normalizers.Prepend("▁")] if prefixed else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    special = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False, max_token_length=12)
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
