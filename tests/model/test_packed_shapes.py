from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from infopt.errors import InputError
from infopt.layers import rounding
from infopt.layers.grid import Grid
from infopt.model import load, packed_shapes, reference, save
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan

OTHER: dict[str, packed_shapes.Packing] = {"dense": "padded", "padded": "dense"}


def group(bits: int, *targets: str, form: str | None = packed_shapes.FORMAT) -> dict[str, Any]:
    return {"targets": list(targets), "weights": {"num_bits": bits}, "format": form}


def section(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {f"group_{i}": each for i, each in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": packed_shapes.FORMAT, "config_groups": named, **more}


def write(folder: Path, layers: dict[str, tuple[int, int]], file: str = "model.safetensors", inner: int = 64) -> None:
    """Layers of 8 rows, by name: (bits, columns)."""
    tensors = {f"{name}.weight_packed": torch.zeros(8, columns, dtype=torch.int32) for name, (_, columns) in layers.items()}
    shapes = {f"{name}.weight_shape": torch.tensor([8, inner]) for name in layers}
    save_file({**tensors, **shapes}, folder / file)


@given(st.integers(1, 8), st.integers(1, 300))
def test_words_are_those_that_are_written(bits: int, values: int) -> None:
    columns = pack_to_int32(torch.zeros(1, values, dtype=torch.int8), bits).shape[1]
    assert packed_shapes.words(values, bits, packed_shapes.installed()) == columns


@given(st.sampled_from([3, 5, 6, 7]), st.integers(1, 200))
def test_whole_words_tell_the_packings_apart(bits: int, groups: int) -> None:
    values = 32 * groups
    for packing in ("dense", "padded"):
        assert packed_shapes.packing_of(packed_shapes.words(values, bits, packing), values, bits) == packing
    assert packed_shapes.words(values, bits, "dense") < packed_shapes.words(values, bits, "padded")


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 300))
def test_widths_that_divide_a_word_are_packed_alike(bits: int, values: int) -> None:
    assert packed_shapes.packing_of(packed_shapes.words(values, bits, "dense"), values, bits) is None


def test_three_bits_by_hand() -> None:
    assert packed_shapes.words(576, 3, "dense") == 54  # 1728 bits
    assert packed_shapes.words(576, 3, "padded") == 58  # ten to a word
    with pytest.raises(ValueError, match="55 words for 576 values of 3 bits"):
        packed_shapes.packing_of(55, 576, 3)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_other_packing_is_refused_and_named(tmp_path: Path, bits: int) -> None:
    mine = packed_shapes.installed()
    config = {"quantization_config": section(group(bits, "Linear"))}
    write(tmp_path, {"model.layers.0.q_proj": (bits, packed_shapes.words(64, bits, mine))})
    packed_shapes.check_packing(tmp_path, config)
    write(tmp_path, {"model.layers.0.q_proj": (bits, packed_shapes.words(64, bits, OTHER[mine]))})
    with pytest.raises(InputError, match=f"its {bits}-bit weights are packed") as caught:
        packed_shapes.check_packing(tmp_path, config)
    assert "0.17" in (caught.value.hint or "")
    config["quantization_config"]["version"] = "0.16.3"
    with pytest.raises(InputError) as caught:
        packed_shapes.check_packing(tmp_path, config)
    assert "compressed-tensors 0.16.3" in (caught.value.hint or "")


def test_a_shape_that_is_neither_is_corrupt(tmp_path: Path) -> None:
    write(tmp_path, {"q_proj": (3, 9)})
    with pytest.raises(InputError, match="q_proj is packed into 9 words for 64 values of 3 bits"):
        packed_shapes.check_packing(tmp_path, {"quantization_config": section(group(3, "Linear"))})


def test_layers_of_several_groups_and_files(tmp_path: Path) -> None:
    mine = packed_shapes.installed()
    three, five, wrong = (packed_shapes.words(64, bits, how) for bits, how in ((3, mine), (5, mine), (5, OTHER[mine])))
    config = {"quantization_config": section(group(4, "Linear"), group(3, "a.q_proj"), group(5, r"re:.*v_proj$"))}
    index = {"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write(tmp_path, {"a.q_proj": (3, three), "a.o_proj": (4, 8)}, "one.safetensors")
    write(tmp_path, {"a.v_proj": (5, five)}, "two.safetensors")
    packed_shapes.check_packing(tmp_path, config)
    write(tmp_path, {"a.v_proj": (5, wrong)}, "two.safetensors")
    with pytest.raises(InputError, match="5-bit"):
        packed_shapes.check_packing(tmp_path, config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"quantization_config": section(group(4, "Linear"), group(8, "re:.*down_proj"))},
        {"quantization_config": section(group(3, "Linear", form="int-quantized"))},
        {"quantization_config": section({"targets": ["LlamaAttention"], "weights": None})},
    ],
)
def test_no_file_is_read_where_nothing_can_differ(tmp_path: Path, config: dict[str, Any]) -> None:
    packed_shapes.check_packing(tmp_path / "absent", config)


def test_a_short_odd_row_that_fits_both_passes(tmp_path: Path) -> None:
    assert packed_shapes.words(11, 3, "dense") == packed_shapes.words(11, 3, "padded") == 2
    write(tmp_path, {"q_proj": (3, 2)}, inner=11)
    packed_shapes.check_packing(tmp_path, {"quantization_config": section(group(3, "Linear"))})


def test_what_infopt_writes_passes_and_says_who_packed_it(tmp_path: Path) -> None:
    from infopt.layers import packing
    from infopt.layers.grid import Grid

    grid = Grid(3, 32)
    tensors, _ = packing.pack(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), grid)
    save_file({f"q_proj.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    packed_shapes.check_packing(tmp_path, {"quantization_config": packing.config(grid, [])})


def padded(q: torch.Tensor) -> torch.Tensor:
    """[rows, values] of 3-bit integers, −4 … 3, ten to a word, as releases up to 0.17 packed them."""
    q = torch.nn.functional.pad(q.long() + 4, (0, -q.shape[1] % 10)).view(len(q), -1, 10)
    return (q << torch.arange(0, 30, 3)).sum(-1).to(torch.int32)


@pytest.mark.parametrize("is_plain", [False, True])
def test_a_model_of_the_other_packing_does_not_open(tiny_bundle: Bundle, is_plain: bool, tmp_path: Path) -> None:
    save.save(rounding.round_layers(tiny_bundle, ["lm_head"], Grid(3, 32), "", print), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    ref, plan = reference.parse(str(tmp_path / "out")), LoadPlan(is_plain=is_plain)
    load.load(ref, plan)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        shape = torch.Size(tensors[name.replace("weight_packed", "weight_shape")].tolist())
        tensors[name] = padded(unpack_from_int32(tensors[name], 3, shape))
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="its 3-bit weights are packed in whole values per 32-bit word"):
        load.load(ref, plan)
