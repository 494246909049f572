"""BPE tokenizers as GGUF files describe them, read alike whatever the version of transformers.

A file of a byte-level tokenizer does not hold the rule that splits text, only llama.cpp's name for it
(`tokenizer.ggml.pre`). transformers' own reader knows some of the names, differently in each version, and splits the
others as GPT-2 does, silently. A file of a sentencepiece tokenizer holds scores instead of merges.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True)
class Splitter:
    """`pattern` None: GPT-2's rule. `digits`: each on its own first. `whole`: a word that is a token is not cut further."""

    pattern: str | None = None
    digits: bool = False
    whole: bool = False

    def steps(self) -> list[tuple[Any, ...]]:
        """As `_steps` lists the steps of a tokenizer."""
        first: list[tuple[Any, ...]] = [("Digits", True)] if self.digits else []
        split: list[tuple[Any, ...]] = [] if self.pattern is None else [("Split", self.pattern, "Isolated", False)]
        return [*first, *split, ("ByteLevel", False, self.pattern is None)]


#: llama.cpp's name → rule (src/llama-vocab.cpp, `llm_tokenizer_bpe`; the patterns are those of the models' tokenizer.json).
SPLITTERS = {
    "gpt-2": Splitter(),
    "smollm": Splitter(digits=True),
    "llama-bpe": Splitter(_LLAMA3, whole=True),
    "smaug-bpe": Splitter(_LLAMA3),
    "qwen2": Splitter(_LLAMA3.replace("{1,3}", "")),
    "tekken": Splitter(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}{_TAIL}", whole=True
    ),
    "gpt-4o": Splitter(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}{_TAIL}"
    ),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of token, `tokenizer.ggml.token_type`."""
SPACE = "▁"
"""How sentencepiece writes a space."""


def find(backend: Tokenizer) -> str | None:
    """llama.cpp's name for the way a byte-level BPE tokenizer splits text; None when it has none here."""
    document = json.loads(backend.to_str())
    steps = _steps(document["pre_tokenizer"])
    whole = bool(document["model"].get("ignore_merges"))
    return next((name for name, rule in SPLITTERS.items() if (rule.steps(), rule.whole) == (steps, whole)), None)


def _steps(rule: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    match rule:
        case {"type": "Sequence", "pretokenizers": inner}:
            return [step for one in inner for step in _steps(one)]
        case {"type": "Digits", "individual_digits": alone}:
            return [("Digits", alone)]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}:
            return [("Split", pattern, behavior, invert)]
        case {"type": "ByteLevel", "add_prefix_space": prefix, **rest}:
            return [("ByteLevel", prefix, rest.get("use_regex", True))]
        case _:
            return [("other", json.dumps(rule))]


def read(metadata: dict[str, Any]) -> PreTrainedTokenizerFast | None:
    """The tokenizer that the file's `tokenizer.*` values describe; None for kinds that are left to transformers."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2" and metadata.get("tokenizer.ggml.pre") in SPLITTERS and "tokenizer.ggml.merges" in metadata:
        backend = _byte_level(metadata, SPLITTERS[metadata["tokenizer.ggml.pre"]])
    elif kind == "llama" and "tokenizer.ggml.scores" in metadata:
        backend = _sentencepiece(metadata)
    else:
        return None
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    for wanted in (CONTROL, UNKNOWN, USER_DEFINED):
        chosen = [token for token, found in zip(tokens, kinds, strict=True) if found == wanted]
        known = [token for token in chosen if backend.token_to_id(token) is not None]
        backend.add_tokens([AddedToken(token, special=wanted != USER_DEFINED, normalized=False) for token in known])
    _frame(backend, metadata)
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = make(tokenizer_object=backend, chat_template=metadata.get("tokenizer.chat_template"))
    return made


def _byte_level(metadata: dict[str, Any], rule: Splitter) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # A merge that makes no token can never happen; files of vocabularies without merges hold such a one.
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"] if merge.replace(" ", "") in vocabulary]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    if rule.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    """Any two neighbours that make a token together merge, those of the highest score first; the rest becomes bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    # llama.cpp spells tokens of spaces alone with spaces.
    tokens = [SPACE * len(token) if token.strip(" ") == "" else token for token in metadata["tokenizer.ggml.tokens"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    merges = [
        (score, vocabulary[left], vocabulary[right], (left, right))
        for token, score in zip(tokens, metadata["tokenizer.ggml.scores"], strict=True)
        for left, right in ((token[:i], token[i:]) for i in range(1, len(token)))
        if left in vocabulary and right in vocabulary
    ]
    merges.sort(key=lambda merge: (-merge[0], *merge[1:3]))
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[pair for *_, pair in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    is_prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    first = [normalizers.Prepend(SPACE)] if is_prefixed else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if is_prefixed else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return backend


def _frame(backend: Tokenizer, metadata: dict[str, Any]) -> None:
    """The start and end tokens that every text gets."""
    from tokenizers.processors import TemplateProcessing

    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}
    around = {
        role: (tokens[index], index)
        for role, index in ids.items()
        if index is not None and metadata.get(f"tokenizer.ggml.add_{role}_token")
    }
    if around:
        start = [around["bos"][0]] if "bos" in around else []
        end = [around["eos"][0]] if "eos" in around else []
        backend.post_processor = TemplateProcessing(
            single=[*start, "$A", *end], pair=[*start, "$A", *end, *start, "$B", *end], special_tokens=list(around.values())
        )
