"""A BPE tokenizer with fewer tokens, which reads what is left of its vocabulary as before.

BPE (Sennrich et al., arXiv 1508.07909) joins, of all neighbours in a word that some merge joins, those whose merge comes
first, until there are none. So a token is made in one way, whatever stands beside it: what its own characters are joined to
on the way, its *family*, is all that it needs. When a text's tokens and their families stay, every merge that happens in
it stays, those that are gone did not happen, and the text is cut as before. All else is cut finer, down to bytes,
which stay too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.errors import InputError
from infopt.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_HINT = "allowed: byte-level BPE (Llama 3, Qwen, SmolLM, GPT-2) and BPE with byte fallback (Llama 2, Mistral, Gemma)"
#: Parts of a tokenizer that may hold token ids, and do so in a way that is known here.
_POST_PROCESSORS = ("ByteLevel", "TemplateProcessing", "RobertaProcessing", "BertProcessing", "Sequence")


@dataclass(frozen=True)
class Bpe:
    """A fast tokenizer's rules, as the tokenizers library writes them. `ids`: of every token, added ones included."""

    document: dict[str, Any]
    ids: dict[str, int]
    added: frozenset[int]
    """Of tokens that are found in a text before any merge: special ones, and what was added later."""

    @property
    def model(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["model"]
        return found

    @cached_property
    def tokens(self) -> dict[int, str]:
        return {index: token for token, index in self.ids.items()}

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """Each merge's place in their order; of one that is listed twice the library takes the last."""
        return {pair: rank for rank, pair in enumerate(map(_pair, self.model["merges"]))}

    @cached_property
    def bytes(self) -> frozenset[int]:
        """What every text is cut down to where nothing longer fits."""
        if self.model.get("byte_fallback"):
            named = [f"<0x{byte:02X}>" for byte in range(256)]
        else:
            from tokenizers import pre_tokenizers

            named = pre_tokenizers.ByteLevel.alphabet()
        return frozenset(self.ids[token] for token in named if token in self.ids)

    @property
    def unknown(self) -> frozenset[int]:
        """The token for what has no other, if there is one."""
        return frozenset(self.ids[token] for token in [self.model.get("unk_token")] if token in self.ids)

    def family(self, index: int) -> frozenset[int] | None:
        """The token and all that its characters are joined to on the way to it; None where merges do not lead there.

        Such a token is only found where it was added, or is a whole word (`ignore_merges`), and then needs none.
        """
        parts = list(self.tokens[index])
        found = set(parts)
        while len(parts) > 1:
            rank, place = min((self.ranks.get((a, b), len(self.ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank == len(self.ranks):
                return None
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            found.add(parts[place])
        return frozenset(self.ids[part] for part in found) if found <= self.ids.keys() else None


def read(tokenizer: PreTrainedTokenizerBase) -> Bpe:
    """The rules of a BPE tokenizer. Raises InputError for one of another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{type(tokenizer).__name__}: not a fast tokenizer, so its rules cannot be read", hint=_HINT)
    document = json.loads(backend.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise InputError(f"the tokenizer is of type {model['type']}: its tokens cannot be dropped one by one", hint=_HINT)
    for rule in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(rule):
            raise InputError(f"the tokenizer marks parts of words ({rule}: {model[rule]!r})", hint=_HINT)
    found = Bpe(document, backend.get_vocab(with_added_tokens=True), frozenset(each["id"] for each in document["added_tokens"]))
    has_bytes = len(found.bytes) == 256 if model.get("byte_fallback") else _has(document, "ByteLevel")
    if not has_bytes:
        raise InputError("the tokenizer does not cut unknown words down to bytes, so what is dropped would be lost", hint=_HINT)
    odd = sorted(_types(document["post_processor"]) - set(_POST_PROCESSORS))
    if odd:
        raise InputError(f"the tokenizer frames texts in a way not known here: {odd[0]}", hint=_HINT)
    return found


def choose(rules: Bpe, always: Iterable[int], counts: Mapping[int, int], size: int | None, multiple: int) -> tuple[int, ...]:
    """The ids to keep, in order: bytes, added tokens, `always`, then the most frequent of `counts`, each with its family.

    `size` of them, or None: all that `counts` has; rounded up to a `multiple` with tokens of the lowest ids, which BPE
    learnt first, as far as there are any. Raises InputError where those that must stay are more.
    """
    kept = set(rules.bytes | rules.unknown | rules.added).union(*(_with_family(rules, index) for index in always))
    by_count = sorted(counts, key=lambda index: (-counts[index], index))
    if size is None:
        kept = kept.union(*(_with_family(rules, index) for index in by_count))
        size = len(kept)
    size = -(-size // multiple) * multiple
    if len(kept) > size:
        raise InputError(
            f"found room for {size} tokens; allowed: {len(kept)} and more, as bytes, special tokens and the chat template's "
            "have to stay"
        )
    for index in chain(by_count, sorted(rules.tokens)):
        if len(kept) == size:
            break
        family = rules.family(index) or (frozenset({index}) if index in counts else frozenset())
        if len(kept) + len(family - kept) <= size:
            kept |= family
    return tuple(sorted(kept))


def trimmed(
    tokenizer: PreTrainedTokenizerBase, rules: Bpe, kept: Sequence[int], config: PreTrainedConfig | None = None, sample: str = ""
) -> PreTrainedTokenizerBase:
    """The tokenizer with the tokens `kept` alone, numbered in that order, as transformers opens it beside the model's `config`.

    Raises InputError where that numbers them in another way, or reads `sample` in another.
    """
    from transformers import AutoTokenizer

    new = {old: number for number, old in enumerate(kept)}
    with tempfile.TemporaryDirectory() as folder, quiet():
        tokenizer.save_pretrained(folder)
        if config is not None:
            config.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(_document(rules, new), ensure_ascii=False), encoding="utf-8")
        path = Path(folder) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        dropped = ("added_tokens_decoder", "auto_map")  # the old numbers; code that the files would be read by
        path.write_text(json.dumps({key: settings[key] for key in settings if key not in dropped}), encoding="utf-8")
        auto: Any = AutoTokenizer
        made: PreTrainedTokenizerBase = auto.from_pretrained(folder, padding_side=tokenizer.padding_side)
    odd = made.get_vocab().items() ^ {rules.tokens[old]: number for old, number in new.items()}.items()
    if odd:
        raise InputError(f"the trimmed tokenizer opens with other tokens, or numbers: {min(odd)[0]!r} for one", hint=_HINT)
    for text in ("", "a", sample):  # also what it puts around them
        ids = tokenizer(text, verbose=False)["input_ids"]
        if all(old in new for old in ids) and [new[old] for old in ids] != made(text, verbose=False)["input_ids"]:
            raise InputError(f"the trimmed tokenizer reads {text[:40]!r} in another way", hint=_HINT)
    return made


def _with_family(rules: Bpe, index: int) -> frozenset[int]:
    return rules.family(index) or frozenset({index})


def _document(rules: Bpe, new: Mapping[int, int]) -> dict[str, Any]:
    model = rules.model
    vocabulary = {token: new[old] for token, old in model["vocab"].items() if old in new}
    merges = [pair for pair in map(_pair, model["merges"]) if {*pair, "".join(pair)} <= vocabulary.keys()]
    added = [{**token, "id": new[token["id"]]} for token in rules.document["added_tokens"]]
    padding = rules.document["padding"]
    return {
        **rules.document,
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        "padding": padding and {**padding, "pad_id": new.get(padding["pad_id"], 0)},
        "post_processor": _renumbered(rules.document["post_processor"], new),
        "model": {**model, "vocab": vocabulary, "merges": [list(pair) for pair in merges]},
    }


def _renumbered(processor: dict[str, Any] | None, new: Mapping[int, int]) -> dict[str, Any] | None:
    if processor is None:
        return None
    match processor:
        case {"type": "Sequence", "processors": inner}:
            return {**processor, "processors": [_renumbered(each, new) for each in inner]}
        case {"type": "TemplateProcessing", "special_tokens": special}:
            named = {name: {**each, "ids": [new[old] for old in each["ids"]]} for name, each in special.items()}
            return {**processor, "special_tokens": named}
        case {"sep": [sep, sep_id], "cls": [cls, cls_id]}:
            return {**processor, "sep": [sep, new[sep_id]], "cls": [cls, new[cls_id]]}
        case _:
            return processor


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _types(part: Any) -> set[str]:
    """Of a post-processor and those inside it."""
    if part is None:
        return set()
    return {part["type"]}.union(*map(_types, part.get("processors", ())))


def _has(document: dict[str, Any], kind: str) -> bool:
    """Whether a text goes through a step of that kind before it is cut into tokens."""
    text = json.dumps([document["pre_tokenizer"], document["normalizer"]])
    return f'"type": "{kind}"' in text
