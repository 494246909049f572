from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from infopt.errors import DiskFullError, InputError, LoadBackError
from infopt.export import export, gguf_model, storage, to_gguf
from infopt.export.source import open_source, probe_texts
from infopt.model import atomic, gguf_config, gguf_tokenizer, load, reference
from infopt.settings import LoadOptions

Make = Callable[..., Path]
OPTIONS = LoadOptions(device="cpu")
IDS = torch.arange(3, 90)[None]


def run(model: Path | str, kind: str, out: Path) -> Any:
    return export(str(model), "gguf", kind, out, OPTIONS)


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "llama-scaled", "llama-linear", "mistral", "qwen2", "qwen3", "gemma3_text"]
)
def test_float32_gives_the_sources_logits_for_every_architecture(kind: str, make: Make, tmp_path: Path) -> None:
    folder = make(kind)
    made = run(folder, "f32", tmp_path / "model.gguf")
    source, read = (load.load(reference.parse(str(path))).model for path in (folder, tmp_path / "model.gguf"))
    assert (source(IDS).logits - read(IDS).logits).abs().max() < 1e-5
    assert made.against_source.top1_agreement == 1
    matrices = sum(parameter.dim() > 1 for parameter in source.parameters())
    assert made.exact == matrices


@pytest.mark.parametrize("kind", storage.TYPES)
def test_the_file_holds_exactly_what_ggml_reads(kind: str, make: Make, tmp_path: Path) -> None:
    folder, path = make("llama", hidden_size=256, head_dim=64), tmp_path / "model.gguf"
    made = run(folder, kind, path)
    assert made.checks[0].max_abs_logit_difference <= to_gguf.TOLERANCE
    source = load.load(reference.parse(str(folder))).model
    stored = tensors(path)
    read = load.load(reference.parse(str(path))).model
    for tensor in gguf_model.tensors(source):
        seen = gguf.dequantize(stored[tensor.name].data, stored[tensor.name].tensor_type)
        weight = gguf_model.from_gguf(
            tensor.name, seen.reshape(tuple(source.get_parameter(tensor.parameter).shape)), source.config
        )
        assert np.array_equal(weight, read.get_parameter(tensor.parameter).numpy())
        assert tensor.name in made.stored[stored[tensor.name].tensor_type.name]
    assert stored["blk.0.attn_q.weight"].tensor_type.name == storage.TYPES[kind]
    assert stored["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    fine = "Q6_K" if storage.TYPES[kind] in storage.FINE_HEAD else storage.TYPES[kind]
    assert stored["output.weight"].tensor_type.name == fine
    assert made.bytes == path.stat().st_size


def test_more_bits_are_nearer(make: Make, tmp_path: Path) -> None:
    folder = make("llama", hidden_size=256, head_dim=64)
    losses = {}
    for kind in ("q4_0", "q4_1", "q5_k", "q6_k", "q8_0", "f16"):
        losses[kind] = run(folder, kind, tmp_path / f"{kind}.gguf").against_source.max_abs_logit_difference
    assert losses["f16"] < losses["q8_0"] < losses["q6_k"] < losses["q5_k"] < min(losses["q4_0"], losses["q4_1"])


def test_rows_that_do_not_divide_fall_back_and_the_report_says_so(make: Make, tmp_path: Path) -> None:
    made = run(make("llama"), "q6_k", tmp_path / "model.gguf")  # hidden 64, intermediate 256
    assert set(made.stored) == {"F32", "Q8_0", "Q6_K"}
    assert set(made.stored["Q6_K"]) == {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    assert storage.choose("Q5_K", (10, 576)) == "Q5_1"
    assert storage.choose("Q5_K", (10, 1536)) == "Q5_K"
    assert storage.choose("Q4_0", (10, 48)) == "F16"
    assert storage.choose("Q4_0", (10, 576), is_head=True) == "Q8_0"
    assert storage.choose("Q4_0", (576,)) == "F32"


@pytest.mark.parametrize("name", gguf_tokenizer.SPLITTERS)
def test_byte_level_tokenizers_are_named_and_read_alike(
    name: str, make: Make, byte_level: Callable[[str], Any], tmp_path: Path
) -> None:
    tokenizer = byte_level(name)
    made = run(make("llama", tokenizer), "f16", tmp_path / "model.gguf")
    read = load.load(reference.parse(str(tmp_path / "model.gguf"))).tokenizer
    texts = probe_texts(tokenizer)
    assert made.checks[0].texts == len(texts)
    assert [read(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    assert [read.decode(read(text)["input_ids"]) for text in texts] == texts
    assert read.chat_template == tokenizer.chat_template
    assert (read.pad_token_id, read.bos_token_id, read.eos_token_id) == (0, 1, 2)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD599]"  # rows without a token


def test_splitting_rules_differ(byte_level: Callable[[str], Any]) -> None:
    text = "Numbers 1234567 and I'LL naïveÉCOLE\n\n  x=3.14"
    made = {
        name: tuple(byte_level(name).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)) for name in gguf_tokenizer.SPLITTERS
    }
    same = {tuple(sorted(a for a in made if made[a] == split)) for split in made.values()}
    assert same == {("gpt-2",), ("smollm",), ("llama-bpe", "smaug-bpe"), ("qwen2",), ("tekken",), ("gpt-4o",)}


def test_a_bos_that_every_text_gets_is_kept(make: Make, byte_level: Callable[[str], Any], tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level("llama-bpe")
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    run(make("llama", tokenizer), "f16", tmp_path / "model.gguf")
    read = load.load(reference.parse(str(tmp_path / "model.gguf"))).tokenizer
    assert read("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]
    assert read("Hello")["input_ids"][0] == 1


@pytest.mark.parametrize(("kind", "prefixed"), [("llama", True), ("gemma3_text", False)])
def test_sentencepiece_tokenizers(
    kind: str, prefixed: bool, make: Make, sentencepiece: Callable[[bool], Any], tmp_path: Path
) -> None:
    tokenizer = sentencepiece(prefixed)
    run(make(kind, tokenizer), "f16", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is prefixed
    read = load.load(reference.parse(str(tmp_path / "model.gguf"))).tokenizer
    assert read("Once upon a time 12 naïve")["input_ids"] == tokenizer("Once upon a time 12 naïve")["input_ids"]


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama with activation 'gelu'"),
        ("llama", {"attention_bias": True}, "llama with biases in attention"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "another order of windowed and full attention"),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "its own attention scale"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "soft-capped logits"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "another order"),
    ],
)
def test_what_gguf_has_no_place_for_is_refused(
    kind: str, changed: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run(make(kind, **changed), "f16", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_other_architectures_types_targets_and_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model type 'mixtral' cannot be exported to GGUF; allowed: llama, mistral"):
        run("tiny-moe", "f16", tmp_path / "model.gguf")
    with pytest.raises(InputError, match="unknown GGUF type 'q4_2'; did you mean 'q4_"):
        run("tiny", "q4_2", tmp_path / "model.gguf")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(InputError, match=r"there.gguf: exists"):
        run("tiny", "f16", tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    with pytest.raises(InputError, match=r"ends in .gguf"):
        run("tiny", "f16", tmp_path / "model.bin")
    to_gguf.require_free(tmp_path / "model.GGUF")
    with pytest.raises(InputError, match="unknown format 'gguff'; did you mean 'gguf'"):
        export("tiny", "gguff", None, None, OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_a_tokenizer_that_splits_in_another_way_is_refused(make: Make, byte_level: Callable[[str], Any], tmp_path: Path) -> None:
    from tokenizers import normalizers, pre_tokenizers

    odd = byte_level("gpt-2")
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(InputError, match=r"splits text in a way that llama.cpp has no name for"):
        run(make("llama", odd), "f16", tmp_path / "model.gguf")
    lower = byte_level("gpt-2")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="normalizer 'Lowercase' has no place in GGUF"):
        run(make("llama-tied", lower), "f16", tmp_path / "model.gguf")


def test_a_window_shortens_the_context_of_mistral(make: Make, tmp_path: Path) -> None:
    run(make("mistral", sliding_window=128), "f16", tmp_path / "model.gguf")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["llama.context_length"].contents() == 128


def test_weights_that_do_not_fit_are_refused(make: Make, tmp_path: Path) -> None:
    folder = make("llama")
    bundle = load.load(reference.parse(str(folder)))
    bundle.model.model.layers[0].mlp.up_proj.weight[3, 3] = 1e6
    from infopt.model import save

    save.save(bundle, tmp_path / "large")
    with pytest.raises(InputError, match="F16: a weight of magnitude 1e"):
        run(tmp_path / "large", "f16", tmp_path / "model.gguf")
    assert run(tmp_path / "large", "bf16", tmp_path / "model.gguf").bytes


@pytest.mark.parametrize("damage", ["layout", "tokenizer"])
def test_a_file_that_reads_back_as_another_model_is_not_published(
    damage: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage == "layout":
        plain = {key: dataclasses.replace(found, interleaved=False) for key, found in gguf_model.ARCHITECTURES.items()}
        monkeypatch.setattr(gguf_model, "ARCHITECTURES", plain)
    else:
        monkeypatch.setattr(gguf_tokenizer, "find", lambda backend: "smollm")
    message = "gives logits up to" if damage == "layout" else "encodes a text in another way"
    with pytest.raises(LoadBackError, match=message):
        run(make("llama"), "f16", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_full_disk_leaves_nothing_behind(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("llama")
    monkeypatch.setattr(atomic, "free_bytes", lambda path: 1000)
    with pytest.raises(DiskFullError, match="no space left"):
        run(folder, "f16", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_rotary_scaling_that_is_not_read_is_refused_on_load(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    run(make("llama-scaled"), "f32", path)
    config = load.load(reference.parse(str(path))).model.config
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["factor"] == pytest.approx(8)
    monkeypatch.setitem(gguf_config._LLAMA3, "high_freq_factor", 2.0)
    with pytest.raises(InputError, match="rotary factors"):
        load.load(reference.parse(str(path)))


def test_plain_transformers_is_asked_too_and_what_it_gets_wrong_is_told(
    make: Make, byte_level: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = to_gguf._plain
    monkeypatch.setattr(to_gguf, "_plain", lambda path: dataclasses.replace(real(path), tokenizer=byte_level("smollm")))
    made = run(make("llama-scaled"), "f32", tmp_path / "model.gguf")
    own, plain = made.checks
    assert (own.reader, own.texts, own.texts_tried) == ("infopt, over transformers' GGUF reader", 6, 6)
    assert plain.reader.startswith("plain transformers ")
    assert plain.tolerance is plain.top1_floor is plain.refusal is None
    assert 0 < plain.texts_tried - plain.texts <= 6
    assert plain.max_abs_logit_difference is not None
    assert plain.max_abs_logit_difference > to_gguf.TOLERANCE  # it leaves out Llama 3's rotary scaling
    odd = plain.texts_tried - plain.texts
    assert made.notes == (
        f"transformers' own GGUF reader encodes {odd} of 6 texts differently; the source's tokenizer fits",
        "transformers' own GGUF reader makes another model of it: open it with infopt or llama.cpp",
        "not checked in llama.cpp: make interop does",
    )


def test_that_plain_transformers_does_not_open_it_is_told(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> Any:
        raise KeyError("rope")

    monkeypatch.setattr(to_gguf, "_plain", fail)
    plain = run(make("llama"), "f32", tmp_path / "model.gguf").checks[1]
    assert (plain.refusal, plain.max_abs_logit_difference, plain.texts) == ("'rope'", None, 0)


def test_the_source_is_named_in_the_file_and_the_report(make: Make, tmp_path: Path) -> None:
    made = run(make("llama"), "q8_0", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert made.source_description == "llama"
    assert fields["general.name"].contents() == "llama, Q8_0"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert (made.to, made.type, made.source) == ("gguf", "q8_0", str(tmp_path / "llama"))
    assert made.source_hash == reference.fingerprint(reference.parse(str(tmp_path / "llama")))
    assert open_source(str(tmp_path / "llama"), OPTIONS, lambda line: None).notes == []


def test_the_demo_model_in_8_bits(demo_folder: Path, tmp_path: Path) -> None:
    made = run("demo", "q8_0", tmp_path / "demo.gguf")
    assert made.against_source.top1_agreement > 0.95
    assert made.against_source.perplexity_ratio == pytest.approx(1, abs=0.01)
    assert made.bytes < 0.28 * 538_090_408
    assert set(made.stored) == {"F32", "Q8_0"}
