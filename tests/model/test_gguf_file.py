from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infopt.errors import InputError
from infopt.model import gguf_file, load, reference, save, shapes, tiny
from infopt.model.plan import LoadPlan

IDS = torch.arange(3, 40)[None]


def test_a_float32_gguf_gives_the_models_exact_logits(write_gguf: Callable[..., Path]) -> None:
    model, tokenizer = tiny.make()
    bundle = load.load(reference.parse(str(write_gguf(model, tokenizer))))
    assert torch.equal(bundle.model(IDS).logits, model(IDS).logits)
    assert bundle.description == "tiny-F32.gguf"
    assert bundle.model.dtype == torch.float32


def test_a_quantized_gguf_is_dequantized_and_says_so(write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    model, tokenizer = tiny.make()
    path = write_gguf(model, tokenizer, "Q8_0")
    ref = reference.parse(str(path))
    bundle = load.load(ref)
    assert bundle.description == load.describe(ref) == "tiny-Q8_0.gguf, dequantized from Q8_0"
    weight, stored = model.model.layers[0].mlp.up_proj.weight, bundle.model.model.layers[0].mlp.up_proj.weight
    step = weight.reshape(-1, 32).abs().amax(1, keepdim=True) / 127  # Q8_0: one scale per 32 weights, kept in float16
    assert ((weight - stored).reshape(-1, 32).abs() <= step * 0.51 + 1e-3 * weight.abs().max()).all()
    assert (weight - stored).abs().max() > 0
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert shapes.stored_bytes(ref) == matrices * 34 // 32 + vectors * 4
    save.save(bundle, tmp_path / "saved")
    again = load.load(reference.parse(str(tmp_path / "saved")))
    assert torch.equal(again.model(IDS).logits, bundle.model(IDS).logits)


def test_shapes_and_tokenizer_come_from_the_file(write_gguf: Callable[..., Path]) -> None:
    model, tokenizer = tiny.make()
    ref = reference.parse(str(write_gguf(model, tokenizer)))
    assert shapes.shapes(ref) == shapes.shapes(reference.parse("tiny"))
    read = load.load(ref, LoadPlan(dtype="bfloat16")).tokenizer
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, 2, 0)
    assert (read.padding_side, read.model_max_length) == ("left", tiny.CONTEXT)
    text = "Hello, world  12\n\n3 'tis naïve"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.decode(read(text)["input_ids"]) == text


def test_transformers_is_left_as_it_was(write_gguf: Callable[..., Path]) -> None:
    import gguf

    before = (gguf.GGUFReader, gguf.get_tensor_name_map)
    with gguf_file.shared_reader(write_gguf(*tiny.make())):
        assert gguf.GGUFReader is not before[0]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


@pytest.mark.parametrize("keep", [4, 100, 5000, -1])
def test_a_truncated_file_is_refused(write_gguf: Callable[..., Path], keep: int) -> None:
    path = write_gguf(*tiny.make())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"truncated|not a GGUF"):
        load.load(reference.parse(str(path)))
    with pytest.raises(InputError, match=r"truncated|not a GGUF"):
        shapes.shapes(reference.parse(str(path)))


def test_a_corrupt_header_is_refused(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(*tiny.make())
    content = bytearray(path.read_bytes())
    content[24:32] = b"\xff" * 8  # the length of the first key
    path.write_bytes(content)
    with pytest.raises(InputError, match="corrupt or truncated GGUF"):
        load.load(reference.parse(str(path)))


def test_other_files_are_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(InputError, match="not a GGUF file"):
        reference.parse(str(path))
    path.write_bytes(b"GGUF\x01\x00\x00\x00")
    with pytest.raises(InputError, match="version 1; allowed: 2 or 3"):
        reference.parse(str(path))


def test_quantizing_while_loading_is_refused(write_gguf: Callable[..., Path]) -> None:
    ref = reference.parse(str(write_gguf(*tiny.make())))
    with pytest.raises(InputError, match="cannot be quantized while they load"):
        load.load(ref, LoadPlan(quantization_config=object()))
