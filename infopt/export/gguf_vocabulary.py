"""A tokenizer as GGUF metadata: byte-level BPE (GPT-2's kind) and sentencepiece's BPE with byte fallback (Llama 2's, Gemma's)."""

from __future__ import annotations

import json
from typing import Any

from infopt.errors import InputError
from infopt.model import gguf_tokenizer
from infopt.model.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED

#: A merge that makes no token: llama.cpp takes a file without merges for a broken one.
_NEVER = "~ ~"
_HINT = "allowed: byte-level BPE (Llama 3, Qwen, SmolLM, GPT-2, Tekken) and sentencepiece BPE (Llama 2, Mistral, Gemma)"


def metadata(tokenizer: Any, rows: int) -> dict[str, Any]:
    """`tokenizer.*` keys of a fast tokenizer for an embedding of `rows` rows. Raises InputError for a kind not covered."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{type(tokenizer).__name__}: not a fast tokenizer, so its rules cannot be read", hint=_HINT)
    document = json.loads(backend.to_str())
    model = document["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise InputError(f"a tokenizer of type {model['type']} cannot be exported to GGUF", hint=_HINT)
    if len(tokenizer) > rows:
        raise InputError(f"{len(tokenizer)} tokens for an embedding of {rows} rows", hint="the tokenizer is another model's")
    kind = _sentencepiece(document, tokenizer) if model.get("byte_fallback") else _byte_level(document, backend)
    tokens, kinds = _tokens(tokenizer, rows, has_bytes=bool(model.get("byte_fallback")))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found = {**kind, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds, **_special(tokenizer)}
    if kind["tokenizer.ggml.model"] == "gpt2":
        return {**found, "tokenizer.ggml.merges": merges or [_NEVER]}
    return {**found, "tokenizer.ggml.scores": _scores(merges, tokens)}


def _byte_level(document: dict[str, Any], backend: Any) -> dict[str, Any]:
    splitter = gguf_tokenizer.find(backend)
    normalizer = (document["normalizer"] or {}).get("type")
    if splitter is None:
        raise InputError("the tokenizer splits text in a way that llama.cpp has no name for here", hint=_HINT)
    if normalizer not in (None, "NFC"):  # llama.cpp leaves NFC to the caller, for Qwen's own files too
        raise InputError(f"the tokenizer's normalizer {normalizer!r} has no place in GGUF", hint=_HINT)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": splitter}


def _sentencepiece(document: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Spaces become ▁, with one before the first word or without (Gemma); what is no token becomes bytes."""
    written = json.dumps([document["normalizer"], document["pre_tokenizer"]], ensure_ascii=False)
    prefixed = tokenizer.tokenize("a")[0].startswith(SPACE)
    if SPACE not in written:
        raise InputError("a byte-fallback tokenizer that does not mark spaces with ▁ cannot be exported to GGUF", hint=_HINT)
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefixed}


def _tokens(tokenizer: Any, rows: int, *, has_bytes: bool) -> tuple[list[str], list[int]]:
    """Every row's text and kind; rows without a token are named as llama.cpp's scripts do."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(rows):
        text = texts.get(index)
        if text is None:
            tokens.append(f"[PAD{index}]")
            kinds.append(UNUSED)
            continue
        is_byte = has_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        if index in added and has_bytes and text == tokenizer.unk_token:
            kind = UNKNOWN
        elif index in added:
            kind = CONTROL if added[index].special else USER_DEFINED
        else:
            kind = BYTE if is_byte else NORMAL
        tokens.append(text.replace(SPACE, " ") if kind == USER_DEFINED and has_bytes else text)
        kinds.append(kind)
    return tokens, kinds


def _scores(merges: list[str], tokens: list[str]) -> list[float]:
    """Sentencepiece merges the pair of the highest score first: minus the rank of the merge that makes the token."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    lowest = -float(len(merges) + 1)
    return [-float(ranks[token]) if token in ranks else lowest for token in tokens]


def _special(tokenizer: Any) -> dict[str, Any]:
    """Ids of the special tokens, whether texts start and end with them, and the chat template."""
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {role: getattr(tokenizer, f"{name}_token_id", None) for role, name in roles.items()}
    found: dict[str, Any] = {f"tokenizer.ggml.{role}_token_id": index for role, index in ids.items() if index is not None}
    framed = tokenizer.encode("a")
    found["tokenizer.ggml.add_bos_token"] = ids["bos"] is not None and framed[:1] == [ids["bos"]]
    found["tokenizer.ggml.add_eos_token"] = ids["eos"] is not None and framed[-1:] == [ids["eos"]]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        found["tokenizer.chat_template"] = template
    return found
