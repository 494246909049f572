from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infopt.errors import InputError
from infopt.model import checkpoint, reference


@pytest.mark.parametrize(
    ("text", "kind"),
    [("demo", "demo"), ("tiny", "tiny"), ("tiny-moe", "tiny"), ("org/Model-1.5_b", "hub"), ("gpt2", "hub")],
)
def test_kinds_by_name(text: str, kind: str) -> None:
    found = reference.parse(text, revision="main")
    assert (found.text, found.kind, found.name, found.path) == (text, kind, text, None)
    assert found.revision == ("main" if kind == "hub" else None)


def test_a_folder_and_an_artifact(copy: Path) -> None:
    assert reference.parse(str(copy)).kind == "folder"
    (copy / "infopt.json").write_text("{}")
    found = reference.parse(str(copy), revision="x", trust_remote_code=True)
    assert (found.kind, found.path, found.revision, found.trust_remote_code) == ("artifact", copy, None, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dmeo", "did you mean 'demo'"),
        ("tiny-lama", "unknown model 'tiny-lama'"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("a/b/c", "not a model reference"),
        ("", "an empty model reference"),
        ("+org/adapter", "an empty model reference"),
        ("has space/model", "not a model reference"),
        ("org/name--x", "not a model reference"),
        ("org/" + "x" * 96, "not a model reference"),
        ("https://example.org/model", "not a model reference"),
    ],
)
def test_what_is_no_reference(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        reference.parse(text)
    assert caught.value.hint


def test_single_files_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one file of a model"):
        reference.parse(str(tiny_folder / "model.safetensors"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"a \.txt file"):
        reference.parse(str(tmp_path / "notes.txt"))


def test_folders_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        reference.parse(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="a folder of GGUF files") as caught:
        reference.parse(str(tmp_path))
    assert str(tmp_path / "x.gguf") in str(caught.value.hint)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(InputError, match="a LoRA adapter without its model") as caught:
        reference.parse(str(tmp_path))
    assert f"org/base+{tmp_path}" in str(caught.value.hint)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="a results folder, not a model"):
        reference.parse(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder–decoder"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}, "multimodal"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is not a causal language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
    ],
)
def test_other_architectures_are_named(copy: Path, changes: dict[str, object], message: str) -> None:
    config = checkpoint.read_config(copy)
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=message):
        reference.parse(str(copy))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_config_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        reference.parse(str(copy))


def test_adapters(tiny_folder: Path, tmp_path: Path) -> None:
    assert reference.parse("org/base+org/adapter").adapter == "org/adapter"
    with pytest.raises(InputError, match="no such adapter folder"):
        reference.parse("tiny+./nowhere")
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        reference.parse(f"tiny+{tmp_path}")
    with pytest.raises(InputError, match="did you mean 'tiny'"):
        reference.parse(f"tny+{tmp_path}")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(InputError, match="adapter of type IA3; allowed: LORA"):
        reference.parse(f"tiny+{tmp_path}")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="only pickle weights"):
        reference.parse(f"{tiny_folder}+{tmp_path}")


def test_a_folder_may_have_a_plus_in_its_name(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "a+b")
    assert reference.parse(str(folder)).path == folder


def test_the_fingerprint_changes_with_weights_config_tokenizer_and_recipe_only(copy: Path) -> None:
    def fingerprint() -> str:
        return reference.fingerprint(reference.parse(str(copy)))

    first = fingerprint()
    (copy / "README.md").write_text("card")
    (copy / "infopt.json").write_text("{}")
    assert fingerprint() == first == reference.content_hash(copy)
    prints = {first}
    for name in ("recipe.yaml", "config.json", "tokenizer.json", "chat_template.jinja"):
        path = copy / name
        path.write_text((path.read_text() if path.is_file() else "") + "\n")
        prints.add(fingerprint())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    prints.add(fingerprint())
    assert len(prints) == 6


def test_without_the_hub_a_hub_model_is_one_line() -> None:
    with pytest.raises(InputError, match="org/absent: neither a folder here nor in the hub's cache") as caught:
        reference.local_path(reference.parse("org/absent"))
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)
    with pytest.raises(InputError, match="neither a folder here"):
        reference.config_path(reference.parse("org/absent"))


def test_the_demo_must_be_fetched() -> None:
    with pytest.raises(InputError, match="not fetched yet") as caught:
        reference.local_path(reference.parse("demo"))
    assert caught.value.hint == "infopt models fetch demo"


def test_checking_a_reference_imports_no_torch(tiny_folder: Path) -> None:
    code = (
        "import sys; from infopt.model import reference, load, save, shapes, tiny, demo; import infopt.models\n"
        f"r = reference.parse({str(tiny_folder)!r}); reference.fingerprint(r); load.describe(r); shapes.stored_bytes(r)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
