from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from infopt.errors import InputError
from infopt.model import checkpoint, load, reference, shapes


def test_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.zeros(2, 2, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert checkpoint.tensor_bytes(tmp_path) == 60 + 14 + 4
    assert set(checkpoint.read_header(tmp_path / "model.safetensors")) == set(tensors)


def test_shards_are_counted_and_a_missing_one_is_named(tiny_bundle, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tiny_bundle.model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = checkpoint.weight_files(tmp_path)
    assert len(files) > 2
    assert checkpoint.tensor_bytes(tmp_path) == shapes.stored_bytes(reference.parse("tiny"))
    files[1].unlink()
    with pytest.raises(InputError, match=f"{files[1].name} is missing"):
        reference.parse(str(tmp_path))
    (tmp_path / checkpoint.INDEX).write_text("{}")
    with pytest.raises(InputError, match="not an index of shards"):
        reference.parse(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 20_000, -1])
def test_truncated_safetensors_are_refused(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="corrupt or truncated safetensors"):
        reference.parse(str(copy))


def test_trailing_bytes_are_refused(copy: Path) -> None:
    with (copy / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(InputError, match="its tensors end at byte"):
        reference.parse(str(copy))


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.integers(0, 200))
def test_any_garbage_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, body: bytes, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    path.write_bytes(struct.pack("<Q", length) + body)
    try:
        with safe_open(path, "pt"):
            return  # by chance a file that is one
    except Exception:
        pass
    with pytest.raises(InputError) as caught:
        checkpoint.read_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [{"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, {"dtype": "F32", "shape": [1], "data_offsets": []}, {}, 3, None],
)
def test_a_header_that_is_no_table_is_refused(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="corrupt or truncated"):
        checkpoint.read_header(path)


def test_pickles_are_refused_and_the_hint_converts_them(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load.load(reference.parse(str(copy))).model
    torch.save(expected.state_dict(), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"only pickle weights \(pytorch_model.bin\)") as caught:
        reference.parse(str(copy))
    hint = str(caught.value.hint)
    assert hint.endswith(f"{copy} {copy}-safetensors")
    monkeypatch.setattr(sys, "argv", ["-c", str(copy), f"{copy}-safetensors"])
    exec(hint.split('"')[1])
    converted = load.load(reference.parse(f"{copy}-safetensors")).model
    ids = torch.arange(3, 20)[None]
    assert torch.equal(converted(ids).logits, expected(ids).logits)


def test_no_weights_or_others(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    with pytest.raises(InputError, match=r"only other\.safetensors; allowed: model\.safetensors"):
        reference.parse(str(copy))
    (copy / "other.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        reference.parse(str(copy))
