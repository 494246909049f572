"""Formats that plain transformers may refuse, and infopt opens: packed zero points, and 4-bit floats in other dtypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor

from infopt.errors import InputError
from infopt.layers import packing, rounding
from infopt.layers.grid import Grid
from infopt.model import compressed, load, reference, save
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan

ZEROS = Grid(4, 32, symmetric=False)
MXFP4 = Grid(4, 32, kind="mxfp4")
IDS = torch.arange(24)[None]


def logits(bundle: Bundle) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = bundle.model(input_ids=IDS).logits
    return found


def saved(grids: Grid | dict[str, Grid], folder: Path, dtype: str = "auto") -> torch.Tensor:
    """Rounds a tiny model and saves it; returns its logits."""
    bundle = load.load(reference.parse("tiny"), LoadPlan(dtype=dtype))
    if isinstance(grids, Grid):
        bundle = rounding.round_layers(bundle, ("lm_head",), grids, "test", print)
    else:
        packed = {}
        for name, layer in packing.linears(bundle, ("lm_head",)).items():
            rule = next(rule for part, rule in grids.items() if part in name)
            packed[name], layer.weight.data = packing.pack(layer.weight, rule)
        rules = {name: next(rule for part, rule in grids.items() if part in name) for name in packed}
        config = packing.config(rules, packing.left_alone(bundle.model, packed))
        bundle = replace(bundle, packed=packed, save_config=config)
    save.save(bundle, folder)
    return logits(bundle)


@pytest.mark.parametrize("grids", [ZEROS, {"mlp": Grid(3, 32, symmetric=False), "": Grid(8, 16, symmetric=False)}])
def test_packed_zero_points_are_opened(grids: Any, tmp_path: Path) -> None:
    made = saved(grids, tmp_path / "out")
    assert torch.equal(logits(load.load(reference.parse(str(tmp_path / "out")))), made)


def test_the_plain_reader_reads_zero_points_right_or_not_at_all(tmp_path: Path) -> None:
    made = saved(ZEROS, tmp_path / "out")
    try:
        plain = load.load(reference.parse(str(tmp_path / "out")), LoadPlan(is_plain=True))
    except InputError:
        return  # transformers from 5.18 on
    assert torch.equal(logits(plain), made)


def test_the_library_is_as_before_afterwards() -> None:
    codec = BaseCompressor.get_value_from_registry("pack-quantized")
    before = codec.__dict__["compress"]
    with pytest.raises(ZeroDivisionError), compressed.room_for_packed_zero_points():
        raise ZeroDivisionError(codec.__dict__["compress"] is not before)
    assert codec.__dict__["compress"] is before


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", [MXFP4, Grid(4, 16, kind="nvfp4")], ids=lambda rule: rule.kind)
def test_small_floats_run_in_every_dtype(kind: Grid, dtype: str, tmp_path: Path) -> None:
    made = saved(kind, tmp_path / "out", dtype)
    again = load.load(reference.parse(str(tmp_path / "out")))
    assert again.model.dtype == getattr(torch, dtype)
    for _ in range(2):  # what unpacks the weights runs once
        assert torch.equal(logits(again), made)
    plain = load.load(reference.parse(str(tmp_path / "out")), LoadPlan(is_plain=True))
    if dtype == "bfloat16":
        assert torch.equal(logits(plain), made)
    else:
        with pytest.raises(RuntimeError, match="dtype"):
            logits(plain)


@pytest.mark.parametrize(
    ("rule", "dtype", "reason"),
    [
        (Grid(4, 32), "float32", None),
        (ZEROS, "float32", "packed ones"),
        (Grid(8, symmetric=True, activations="token"), "float32", None),
        (Grid(8, kind="fp8"), "float16", None),
        (MXFP4, "bfloat16", None),
        (MXFP4, "float32", "a float32 model cannot multiply"),
    ],
)
def test_gaps_are_told_from_the_config(rule: Grid, dtype: str, reason: str | None) -> None:
    found = compressed.gap(packing.config(rule, ["lm_head"]), dtype)
    assert found is None if reason is None else reason in str(found)


def test_other_formats_have_no_gap() -> None:
    assert compressed.gap(None, "float32") is None
    assert compressed.gap({"quant_method": "bitsandbytes", "load_in_4bit": True}, "float32") is None
    assert compressed.gap(packing.with_kv_cache(None, 8, "tensor"), "float32") is None
