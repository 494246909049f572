"""Trimmed tokenizers: any text comes back, and what is left of the vocabulary is read as before."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import stub_tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infopt.data import texts
from infopt.errors import InputError
from infopt.model import bpe, tiny

KINDS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "prefixed", "not prefixed")
#: Text that decides what stays: a third of what the tokenizers were trained on.
TEXT = "\n".join(stub_tokenizers.spoken())[:20_000]
every = pytest.mark.parametrize("kind", KINDS)


@cache
def original(kind: str) -> Any:
    """`llama-bpe` takes a word that is a token as it is, `qwen2` puts letters and accents together first."""
    from tokenizers import normalizers, processors

    if "prefixed" in kind:
        return stub_tokenizers.sentencepiece(kind == "prefixed", 2500)
    made = stub_tokenizers.byte_level(kind, 2000)
    if kind == "qwen2":
        made.backend_tokenizer.normalizer = normalizers.NFC()
    if kind == "llama-bpe":
        made.backend_tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(),
                processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]),
            ]
        )
        made.add_tokens(["<tool>", "  "])
    return made


@cache
def made(kind: str) -> tuple[Any, dict[int, int]]:
    """The trimmed tokenizer, and new numbers by old ones."""
    tokenizer = original(kind)
    rules = bpe.read(tokenizer)
    kept = bpe.choose(rules, (), Counter(tokenizer(TEXT)["input_ids"]), None, 1)
    assert 256 < len(kept) < 0.9 * len(tokenizer)
    return bpe.trimmed(tokenizer, rules, kept), {old: new for new, old in enumerate(kept)}


@cache
def words() -> list[str]:
    return sorted(set(TEXT.split()))


@st.composite
def written(draw: st.DrawFn) -> str:
    """Any text, pieces of the one that decides, and both in turn."""
    seeds = st.integers(0, len(TEXT) - 200)
    piece = st.one_of(
        st.text(max_size=20),
        st.builds(lambda start, length: TEXT[start : start + length], seeds, st.integers(0, 200)),
        st.builds(lambda seed: " ".join(random.Random(seed).sample(words(), 5)), st.integers(0, 9999)),
        st.text(alphabet="etaoin shr\n<tool>12é", max_size=30),
    )
    return "".join(draw(st.lists(piece, max_size=4)))


@every
@given(text=written())
@example(TEXT)
@example("\n".join(stub_tokenizers.spoken())[20_000:])
@settings(deadline=None, max_examples=200)
def test_any_text_comes_back_and_kept_tokens_are_read_as_before(kind: str, text: str) -> None:
    before, (after, new) = original(kind), made(kind)
    ids = before(text)["input_ids"]
    mine = after(text)["input_ids"]
    assert after.decode(mine) == before.decode(ids)
    if kind in ("gpt-2", "smollm"):
        assert after.decode(mine) == text
    if all(old in new for old in ids):
        assert mine == [new[old] for old in ids]


@every
def test_text_that_decided_is_cut_as_before(kind: str) -> None:
    before, (after, new) = original(kind), made(kind)
    assert after(TEXT)["input_ids"] == [new[old] for old in before(TEXT)["input_ids"]]
    assert after.all_special_tokens == before.all_special_tokens
    assert after.chat_template == before.chat_template
    for role in ("pad", "bos", "eos", "unk"):
        old = getattr(before, f"{role}_token_id")
        assert getattr(after, f"{role}_token_id") == (None if old is None else new[old])


@every
def test_a_family_is_all_that_a_token_needs(kind: str) -> None:
    rules, (after, new) = bpe.read(original(kind)), made(kind)
    left = bpe.read(after)
    for old in new:
        family = rules.family(old)
        if family is not None:
            assert family <= new.keys()
            assert left.family(new[old]) == {new[each] for each in family}
    for pair in left.ranks:
        assert {*pair, "".join(pair)} <= left.ids.keys()


def test_families_by_hand() -> None:
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["x", "y"]]
    tokens = ["a", "b", "c", "x", "y", "ab", "bc", "abc", "xy", "abcx"]
    document = {"model": {"merges": merges, "vocab": {}}}
    rules = bpe.Bpe(document, {token: index for index, token in enumerate(tokens)}, frozenset())

    def family(token: str) -> set[str] | None:
        found = rules.family(tokens.index(token))
        return None if found is None else {tokens[index] for index in found}

    assert family("a") == {"a"}
    assert family("abc") == {"a", "b", "c", "ab", "abc"}  # never by way of bc, whose merge comes later
    assert family("bc") == {"b", "c", "bc"}
    assert family("abcx") is None  # no merge makes it


@given(seed=st.integers(0, 10_000), text=st.text(alphabet="abc", max_size=24))
@settings(deadline=None, max_examples=300)
def test_merges_in_any_order_are_no_exception(seed: int, text: str) -> None:
    """Tables that no training makes: long tokens before short ones, several merges for one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    tokens, pairs = ["a", "b", "c"], []
    for _ in range(rng.randrange(1, 30)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if len(left + right) < 9 and (left, right) not in pairs:
            pairs.append((left, right))
            tokens += [left + right] * (left + right not in tokens)
    rng.shuffle(pairs)
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"a", "b", "c"})
    vocabulary = {token: index for index, token in enumerate([*alphabet, *tokens])}
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=rng.random() < 0.3))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    before: Any = PreTrainedTokenizerFast(tokenizer_object=backend)
    rules = bpe.read(before)
    chosen = rng.sample([vocabulary[token] for token in tokens], rng.randrange(len(tokens)))
    kept = bpe.choose(rules, (), Counter(chosen), None, 1)
    after, new = bpe.trimmed(before, rules, kept), {old: number for number, old in enumerate(kept)}
    ids, mine = before(text)["input_ids"], after(text)["input_ids"]
    assert after.decode(mine) == text
    if all(old in new for old in ids):
        assert mine == [new[old] for old in ids]


@pytest.mark.parametrize(("size", "multiple", "wanted"), [(700, 64, 704), (640, 1, 640), (None, 128, None), (9999, 64, 2003)])
def test_a_vocabulary_is_as_large_as_asked_for(size: int | None, multiple: int, wanted: int | None) -> None:
    tokenizer = stub_tokenizers.byte_level("gpt-2", 2003)
    rules, counts = bpe.read(tokenizer), Counter(tokenizer(TEXT)["input_ids"])
    kept = bpe.choose(rules, (), counts, size, multiple)
    if wanted is None:
        assert len(kept) % multiple == 0
        assert set(counts) <= set(kept)
        assert len(kept) - len(bpe.choose(rules, (), counts, None, 1)) in range(multiple)
    else:
        assert len(kept) == wanted
    assert list(kept) == sorted(set(kept))
    seen = sorted(counts, key=lambda index: (-counts[index], index))
    first = next((place for place, index in enumerate(seen) if index not in kept), None)
    if first is not None:  # the most frequent that is gone would not have fitted
        wished = set(rules.bytes | rules.added).union(*(rules.family(index) or {index} for index in seen[: first + 1]))
        assert len(wished) > len(kept)


def test_what_must_stay_needs_room() -> None:
    rules = bpe.read(original("gpt-2"))
    with pytest.raises(InputError, match=r"found room for 256 tokens; allowed: 259 and more"):
        bpe.choose(rules, (), {}, 256, 64)
    long = max(rules.tokens, key=lambda index: len(rules.tokens[index]))
    kept = bpe.choose(rules, [long], {}, 300, 1)
    assert (rules.family(long) or frozenset()) <= set(kept)


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer"])
def test_a_models_own_class_reloads_as_it_was_made(name: str, tmp_path: Path) -> None:
    """transformers builds these tokenizers again from their parts when a folder is opened, by rules of the class."""
    import transformers

    kind = "prefixed" if name == "LlamaTokenizer" else "qwen2"
    model = bpe.read(original(kind)).model
    pairs = [tuple(pair) for pair in model["merges"]]
    before = getattr(transformers, name)(vocab=dict(model["vocab"]), merges=pairs)
    assert type(before).__name__ == name
    before.add_tokens(["<tool>"])
    rules = bpe.read(before)
    kept = bpe.choose(rules, (), Counter(before(TEXT)["input_ids"]), None, 1)
    assert len(kept) < len(before)
    after = bpe.trimmed(before, rules, kept)
    after.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "", "a<tool> b"):
        mine = after(text)["input_ids"]
        assert again(text)["input_ids"] == mine
        assert again.decode(mine) == before.decode(before(text)["input_ids"])
    assert after(TEXT)["input_ids"] == [kept.index(old) for old in before(TEXT)["input_ids"]]


def test_other_kinds_are_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def fast(model: Any) -> Any:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="a")

    vocabulary = {"a": 0, "b": 1, "ab": 2}
    for model, message in (
        (models.Unigram([("a", -1.0), ("b", -1.0)], unk_id=0), "of type Unigram"),
        (models.WordPiece(vocabulary, unk_token="a"), "of type WordPiece"),
        (models.BPE(vocabulary, [("a", "b")], end_of_word_suffix="</w>"), "marks parts of words"),
        (models.BPE(vocabulary, [("a", "b")]), "does not cut unknown words down to bytes"),
        (models.BPE(vocabulary, [("a", "b")], byte_fallback=True), "does not cut unknown words down to bytes"),
    ):
        with pytest.raises(InputError, match=message):
            bpe.read(fast(model))
    with pytest.raises(InputError, match="not a fast tokenizer"):
        bpe.read(object())  # type: ignore[arg-type]
    assert bpe.read(tiny.tokenizer()).ranks == {}


def test_the_demo_models_tokenizer(demo_folder: Path) -> None:
    """49,152 tokens that lack a few bytes: text comes back as far as it did before."""
    from transformers import AutoTokenizer

    before = AutoTokenizer.from_pretrained(demo_folder)
    rules = bpe.read(before)
    text = texts.read_text("bundled", "calibration")[:50_000]
    kept = bpe.choose(rules, (), Counter(before(text)["input_ids"]), None, 64)
    assert len(kept) % 64 == 0
    assert len(kept) < 10_000
    after, new = bpe.trimmed(before, rules, kept), {old: number for number, old in enumerate(kept)}
    assert after(text)["input_ids"] == [new[old] for old in before(text)["input_ids"]]
    for other in (texts.read_text("bundled", "evaluation")[:20_000], "🦩 żółć \x06 <|im_start|>user\n"):
        assert after.decode(after(other)["input_ids"]) == before.decode(before(other)["input_ids"])
