from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.errors import DiskFullError, InfoptError, InputError
from infopt.model import atomic, checkpoint, load, reference, save, shapes, tiny
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan

IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_saved_and_reloaded_is_the_same_model(kind: str, tmp_path: Path) -> None:
    bundle = load.load(reference.parse(kind))
    saved = save.save(bundle, tmp_path / "out", {"README.md": "über"})
    folder = tmp_path / "out"
    again = load.load(reference.parse(str(folder)))
    assert torch.equal(again.model(IDS).logits, bundle.model(IDS).logits)
    assert again.tokenizer("a b")["input_ids"] == bundle.tokenizer("a b")["input_ids"]
    assert again.tokenizer.chat_template == bundle.tokenizer.chat_template
    assert (folder / "README.md").read_text(encoding="utf-8") == "über"
    assert saved.weights_bytes == shapes.stored_bytes(folder) == shapes.shapes(reference.parse(kind)).parameters * 4
    assert saved.total_bytes == sum(p.stat().st_size for p in folder.iterdir())
    assert saved.content_hash == reference.fingerprint(reference.parse(str(folder)))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    is_tied = again.model.lm_head.weight is again.model.get_input_embeddings().weight
    assert is_tied == bundle.model.config.tie_word_embeddings


def test_files_get_ordinary_modes(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    save.save(tiny_bundle, tmp_path / "out")
    assert {p.stat().st_mode for p in (tmp_path / "out").iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_target_in_use_is_refused_and_an_empty_one_taken(tiny_bundle: Bundle, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    save.save(tiny_bundle, target)
    before = sorted(p.name for p in target.iterdir())
    with pytest.raises(InputError, match="exists and is not empty"):
        save.save(tiny_bundle, target)
    assert sorted(p.name for p in target.iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists and is a file"):
        save.save(tiny_bundle, tmp_path / "file")


def test_packed_tensors_replace_the_weight_and_load_in_plain_transformers(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """int8 per channel: W = weight · scale, in compressed-tensors' `int-quantized` format."""
    name = "model.layers.0.mlp.up_proj"
    layer = tiny_bundle.model.get_submodule(name)
    scale = layer.weight.abs().amax(1, keepdim=True) / 127
    quantized = (layer.weight / scale).round().clamp(-127, 127).to(torch.int8)
    layer.weight.data = quantized * scale
    expected = tiny_bundle.model(IDS).logits
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": [name], "weights": weights, "format": "int-quantized"}},
        "ignore": [],
    }
    bundle = replace(tiny_bundle, packed={name: {"weight": quantized, "weight_scale": scale}}, save_config=config)
    saved = save.save(bundle, tmp_path / "out")
    stored = checkpoint.read_header(tmp_path / "out" / "model.safetensors")
    assert stored[f"{name}.weight"]["dtype"] == "I8"
    assert f"{name}.weight_scale" in stored
    assert "lm_head.weight" not in stored
    assert saved.weights_bytes == shapes.stored_bytes(reference.parse("tiny")) - 128 * 64 * 3 + 128 * 4
    assert checkpoint.read_config(tmp_path / "out")["quantization_config"]["quant_method"] == "compressed-tensors"
    ref = reference.parse(str(tmp_path / "out"))
    again = load.load(ref)
    torch.testing.assert_close(again.model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert shapes.shapes(ref) == shapes.shapes(reference.parse("tiny"))


def _nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def test_bitsandbytes_saves_itself_before_it_runs_and_not_after(tmp_path: Path) -> None:
    plan = LoadPlan(quantization_config=_nf4(), dtype="bfloat16")
    bundle = load.load(reference.parse("tiny"), plan)
    save.save(bundle, tmp_path / "out")
    expected = bundle.model(IDS).logits
    ref = reference.parse(str(tmp_path / "out"))
    assert torch.equal(load.load(ref).model(IDS).logits, expected)
    assert shapes.shapes(ref) == shapes.shapes(reference.parse("tiny"))
    states = [m.weight.quant_state for m in bundle.model.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    for state in states:  # what a CPU with bf16 instructions does at the first run
        state.packing_format_for_cpu = True
    with pytest.raises(InputError, match="repacked when it first ran"):
        save.save(bundle, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_quantization_without_a_file_format_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    class Quantizer:
        def is_serializable(self) -> bool:
            return False

    tiny_bundle.model.hf_quantizer = Quantizer()
    with pytest.raises(InputError, match="has no file format"):
        save.save(tiny_bundle, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_found_before_writing(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "free_bytes", lambda path: 1_000_000)
    monkeypatch.setattr(tiny_bundle.model, "save_pretrained", None)
    with pytest.raises(DiskFullError, match=r"32\.4 MB needed, 1\.00 MB free"):
        save.save(tiny_bundle, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_nothing(tiny_bundle: Bundle, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DiskFullError, match="no space left"):
        save.save(tiny_bundle, small_disk / "out")
    with monkeypatch.context() as patch:  # someone else fills the disk after the check
        patch.setattr(atomic, "free_bytes", lambda path: 10**9)
        with pytest.raises(DiskFullError, match="no space left") as caught:
            save.save(tiny_bundle, small_disk / "out")
    assert caught.value.hint
    assert not list(small_disk.iterdir())
    (small_disk / "ballast").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
    with pytest.raises(DiskFullError):
        save.write_text(small_disk / "notes", "x" * 10_000)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_any_write_leaves_nothing(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(folder: Path, **named: object) -> None:
        (folder / "half").write_text("x")
        raise OSError(number, "full")

    monkeypatch.setattr(tiny_bundle.tokenizer, "save_pretrained", fail)
    with pytest.raises(DiskFullError, match=r"no space left: 32.* needed"):
        save.save(tiny_bundle, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_failure_to_write_says_which(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InfoptError, match=r"cannot be written: (Not a directory|File exists)"):
        save.save(tiny_bundle, tmp_path / "file" / "out")


@pytest.mark.parametrize("moment", ["model", "tokenizer", "flush"])
def test_an_interrupt_leaves_nothing(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    if moment == "flush":
        monkeypatch.setattr(atomic, "_flush", interrupt)
    else:
        monkeypatch.setattr(getattr(tiny_bundle, moment), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save.save(tiny_bundle, tmp_path / "out")
    assert not list(tmp_path.iterdir())
