"""Trimmed vocabularies: the model says what it said, its files and configs agree, and quality is judged on the same text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import stub_tokenizers
import torch
from pydantic import ValidationError
from stub_techniques import chosen

from infopt import arms, artifact, assess, forecast, optimize, pipeline, techniques
from infopt.data import texts
from infopt.errors import InputError, RecipeError
from infopt.layers import vocabulary
from infopt.model import checkpoint, load, reference, save, shapes, tiny
from infopt.model.bundle import Bundle
from infopt.protocols import Context, Machine, Prediction
from infopt.settings import LoadOptions, QualitySettings
from infopt.techniques import trim_vocab

Make = Callable[..., Any]
CPU = LoadOptions(device="cpu")
ROWS = 1024
TEXT = texts.read_text("bundled", "calibration")[:12_000]
TIED: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {"tie_word_embeddings": False}, "gemma3_text": {}, "phi": {}}
OWN: dict[str, dict[str, Any]] = {
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 16},
    "phi": {"tie_word_embeddings": False},  # whose head has a bias
}


def opened(kind: str = "llama", **config: Any) -> Bundle:
    """A random model of `kind` with a trained tokenizer of 1,000 tokens and a few rows more."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = stub_tokenizers.byte_level("gpt-2", 1000)
    if kind == "qwen2":  # whose own class adds it where it is missing
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {**tiny._SHARED, "vocab_size": ROWS, "tie_word_embeddings": True, **OWN.get(kind, {}), **ids, **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.1)
    return Bundle(model.eval().requires_grad_(False), tokenizer, kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "spoken"
    save.save(opened(), path)
    return str(path)


def windows(bundle: Bundle, text: str = TEXT, length: int = 64) -> tuple[tuple[int, ...], ...]:
    return texts.windows(bundle.tokenizer(text)["input_ids"], length)


def logits(bundle: Bundle, ids: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = bundle.model(input_ids=torch.tensor(ids)).logits
    return found


@pytest.mark.parametrize("kind", TIED)
def test_what_stays_is_said_as_before(kind: str, make: Make, tmp_path: Path) -> None:
    save.save(opened(kind), tmp_path / "before")
    before, bundle = (load.load(reference.parse(str(tmp_path / "before"))) for _ in range(2))
    ids = windows(before)
    technique = make("trim_vocab", multiple=32)
    after = technique.apply(bundle, Context(calibration_ids=ids))
    log = json.loads(after.files[trim_vocab.FILE])
    kept = log["kept"]
    assert set(chain.from_iterable(ids)) <= set(kept)
    assert (log["tokens"], log["rows"], log["in_text"]) == (len(before.tokenizer), ROWS, len(set(chain.from_iterable(ids))))
    assert len(kept) % 32 == 0
    assert len(kept) < 960
    new = {old: number for number, old in enumerate(kept)}
    own = [[new[old] for old in window] for window in ids[:3]]
    torch.testing.assert_close(logits(after, own), logits(before, ids[:3])[..., kept])
    assert after.tokenizer(TEXT)["input_ids"] == [new[old] for old in before.tokenizer(TEXT)["input_ids"]]
    head, embedding = after.model.get_output_embeddings(), after.model.get_input_embeddings()
    assert (head.weight is embedding.weight) is before.model.config.tie_word_embeddings
    assert after.model.config.vocab_size == len(kept) == len(head.weight) == len(embedding.weight) == embedding.num_embeddings
    save.save(after, tmp_path / "saved")
    again = load.load(reference.parse(str(tmp_path / "saved")))
    assert torch.equal(logits(again, own), logits(after, own))
    assert again.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == before.tokenizer.chat_template
    assert json.loads((tmp_path / "saved" / trim_vocab.FILE).read_text(encoding="utf-8"))["kept"] == kept


def test_configs_name_the_same_tokens_by_their_new_numbers(make: Make) -> None:
    bundle = opened()
    ids = bundle.tokenizer.get_vocab()
    late = [ids[token] for token in ("<|im_end|>", "Ġthe")]
    bundle.model.config.eos_token_id = bundle.model.generation_config.eos_token_id = late
    bundle.model.config.sep_token_id = rare = max(ids.values())
    bundle.model.config.pad_token_id = bundle.model.model.embed_tokens.padding_idx = 1010  # a row that no token has
    after = make("trim_vocab", keep=512).apply(bundle, Context(calibration_ids=windows(bundle)))
    found, kept = after.tokenizer.get_vocab(), json.loads(after.files[trim_vocab.FILE])["kept"]
    assert after.model.config.eos_token_id == after.model.generation_config.eos_token_id == [found["<|im_end|>"], found["Ġthe"]]
    assert after.model.config.sep_token_id == kept.index(rare)
    assert after.model.config.pad_token_id is None
    assert after.model.model.embed_tokens.padding_idx is None
    assert after.model.config.bos_token_id == found["<|im_start|>"]
    for word in ("user", "assistant"):  # of the chat template, whatever the text was
        assert all(piece in found for piece in after.tokenizer.tokenize(word))


@pytest.mark.parametrize(("keep", "rows"), [(512, 512), (500, 512), (990, 1000)])
@pytest.mark.parametrize("is_tied", [True, False])
def test_with_keep_the_size_is_known_beforehand(keep: int, rows: int, is_tied: bool, make: Make, tmp_path: Path) -> None:
    bundle = opened(tie_word_embeddings=is_tied)
    save.save(bundle, tmp_path / "before")
    size = shapes.shapes(reference.parse(str(tmp_path / "before")))
    technique = make("trim_vocab", keep=keep)
    technique.check(size, "steps[0].trim_vocab")
    expected = technique.reshape(size)
    before = Prediction(weights_bytes=4 * size.parameters, peak_bytes=4 * size.parameters, seconds=None)
    predicted = technique.predict(size, before, Machine("cpu", read_bytes_per_s=1e10))
    after = technique.apply(bundle, Context(calibration_ids=windows(bundle)))
    assert len(after.model.get_input_embeddings().weight) == rows
    save.save(after, tmp_path / "after")
    if rows % 64 == 0:
        assert expected == shapes.shapes(reference.parse(str(tmp_path / "after")))
        assert predicted.weights_bytes == checkpoint.tensor_bytes(tmp_path / "after")
    assert predicted.weights_bytes == pytest.approx(checkpoint.tensor_bytes(tmp_path / "after"), rel=0.03)


def test_without_keep_the_size_is_that_of_prose(make: Make, demo_folder: Path) -> None:
    """Of the demo model's tokens those of the bundled text, families included, by how much of it is read."""
    from infopt.model import bpe

    ref = reference.parse("demo")
    tokenizer, size = load.open_tokenizer(ref), shapes.shapes(ref)
    rules, technique = bpe.read(tokenizer), make("trim_vocab")
    ids = tokenizer(texts.read_text("bundled", "calibration"), verbose=False)["input_ids"]
    for count in (1024, 8192, 32768):
        technique.calibration_tokens = count
        kept = bpe.choose(rules, (), Counter(ids[:count]), None, 64)
        assert technique.reshape(size).vocabulary == pytest.approx(len(kept), rel=0.15)
    technique.calibration_tokens = 10_000_000
    assert technique.reshape(size) == size


def test_later_steps_read_the_text_in_the_new_tokens(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], ...]] = []
    kind = techniques.find("wanda")
    apply = kind.apply

    def spying(self: Any, bundle: Bundle, context: Context) -> Bundle:
        seen.append(context.calibration_ids)
        return apply(self, bundle, context)

    monkeypatch.setattr(kind, "apply", spying)
    made = chosen({"trim_vocab": {"keep": 512}}, "wanda", calibration={"samples": 8, "tokens": 64})
    rows = forecast.forecast(folder, made, tmp_path / "out", CPU)
    assert rows is not None
    document = optimize.optimize(folder, made, tmp_path / "out", CPU)
    ((first, *_),) = seen
    tokenizer = load.open_tokenizer(reference.parse(str(tmp_path / "out")))
    assert max(chain.from_iterable(seen[0])) < 512
    assert " ".join(tokenizer.decode(first).split()[1:-1]) in " ".join(texts.read_text("bundled", "calibration").split())
    trimmed, pruned = (step.quality for step in document.steps)
    assert trimmed is not None
    assert pruned is not None
    assert trimmed.kld_mean < pruned.kld_mean
    assert 1 < trimmed.ppl_ratio < 100  # random weights expect no piece after another


def test_all_tiers_judge_it_on_the_same_text(folder: str, tmp_path: Path) -> None:
    made = chosen({"trim_vocab": {"keep": 512}}, calibration={"samples": 8, "tokens": 64})
    optimize.optimize(folder, made, tmp_path / "out", CPU)
    settings = replace(QualitySettings(), fidelity_tokens=512, behaviour_prompts=1, choice_items=1)
    base, spec = (arms.spec(path, None, ["engine.name=transformers"]) for path in (folder, str(tmp_path / "out")))
    options = replace(CPU, allow_leakage=True)
    assess.check(base, [spec], options, settings)
    ((_, found),) = assess.assess(base, [spec], options, settings, lambda line: None)
    assert found["failed"] == {}
    figures = {key: value["value"] for key, value in found["figures"].items()}
    assert figures["kld.mean"] is None
    assert "the candidate has 512 of 1000" in found["figures"]["kld.mean"]["reason"]
    assert 1 < figures["ppl_ratio"] < 100  # random weights expect no piece after another
    assert found["fidelity"]["tokens_in_pieces"] > 20
    assert figures["mc.accuracy"] is not None
    assert figures["behaviour.same_share"] is not None
    bundle = pipeline.open_arm(spec, "cpu", CPU)
    later = replace(spec.recipe, steps=(*spec.recipe.steps, *chosen("rtn").steps))
    for own in (spec.recipe, later):
        assert pipeline.engine(bundle, own).notes[-1] == trim_vocab.REMARK, "whatever comes after it"


def test_models_of_other_tokenizers_are_refused_in_fidelity(folder: str, tmp_path: Path) -> None:
    """Of as many rows, so that nothing but the tokens tells them apart."""
    bundle = opened()
    tokens = bundle.tokenizer.get_vocab()
    rules = json.loads(bundle.tokenizer.backend_tokenizer.to_str())
    a, b = "Ġthe", "a"
    rules["model"]["vocab"] |= {a: tokens[b], b: tokens[a]}
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    swapped: Any = PreTrainedTokenizerFast
    other = swapped(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), eos_token="<|im_end|>")
    other.add_tokens(["<own>"])
    save.save(replace(bundle, tokenizer=other), tmp_path / "other")
    base, spec = arms.spec(folder, None, []), arms.spec(str(tmp_path / "other"), None, [])
    settings = replace(QualitySettings(), fidelity_tokens=256, behaviour_prompts=0, choice_items=0)
    with pytest.raises(InputError, match=r"quality cannot be judged: the vocabularies differ: .* 2 have another number"):
        assess.check(base, [spec], CPU, settings)


def test_what_does_not_go_is_refused(make: Make, tiny_bundle: Bundle) -> None:
    size = shapes.shapes(reference.parse("tiny"))
    with pytest.raises(RecipeError, match=r"s\.keep: found 320; allowed: 256 … 319, fewer than the model has"):
        make("trim_vocab", keep=320).check(size, "s")
    with pytest.raises(RecipeError, match="has no output head"):
        make("trim_vocab").check(replace(size, head=None), "s")
    with pytest.raises(ValidationError):
        make("trim_vocab", keep=100)
    with pytest.raises(InputError, match="needs text"):
        make("trim_vocab").apply(tiny_bundle, Context())
    with pytest.raises(InputError, match=r"trim_vocab\.keep: found room for 256 tokens; allowed: 259 and more"):
        make("trim_vocab", keep=256).apply(tiny_bundle, Context(calibration_ids=((5, 6),)))
    tiny_bundle.model.generation_config.suppress_tokens = [5]
    with pytest.raises(InputError, match=r"generation_config\.suppress_tokens lists token ids"):
        make("trim_vocab").apply(tiny_bundle, Context(calibration_ids=((5, 6),)))


def test_models_with_other_tables_are_refused(tiny_bundle: Bundle) -> None:
    model: Any = tiny_bundle.model
    model.config.vocab_size_per_layer_input = 320
    with pytest.raises(InputError, match="has more tables of tokens than its embedding and head: by layer"):
        vocabulary.tables(model)
    del model.config.vocab_size_per_layer_input
    model.model.second = torch.nn.Embedding(320, 4)
    with pytest.raises(InputError, match=r"more tables of tokens .*model\.second"):
        vocabulary.tables(model)
    del model.model.second
    model.hf_quantizer = object()
    with pytest.raises(InputError, match="quantized already"):
        vocabulary.tables(model)
    model.hf_quantizer = None
    model.lm_head = torch.nn.Identity()
    with pytest.raises(InputError, match="by Embedding and Identity"):
        vocabulary.tables(model)


def test_a_tokenizer_of_another_model_is_refused(make: Make) -> None:
    bundle = opened(vocab_size=512)
    with pytest.raises(InputError, match="1000 tokens for an embedding of 512 rows"):
        make("trim_vocab").apply(bundle, Context(calibration_ids=((5, 6),)))


def test_the_artifact_tells_what_it_is(folder: str, tmp_path: Path) -> None:
    made = chosen({"trim_vocab": {"keep": 512}}, calibration={"samples": 8, "tokens": 64})
    document = optimize.optimize(folder, made, tmp_path / "out", CPU)
    assert document.bytes_before - document.bytes_after == (ROWS - 512) * 64 * 4
    assert artifact.read_artifact(tmp_path / "out") == document
