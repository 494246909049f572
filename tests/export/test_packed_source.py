"""Artifacts as sources of GGUF: their integers are kept where the type has room for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt import recipe, techniques
from infopt.errors import InputError
from infopt.export import export, storage
from infopt.model import load, reference, save
from infopt.model.plan import LoadPlan
from infopt.optimize import optimize
from infopt.settings import LoadOptions

OPTIONS = LoadOptions(device="cpu")


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """`make(name, *overrides)`: the artifact of tiny in bfloat16, whose scales float16 holds exactly."""

    def artifact(name: str, *overrides: str) -> Path:
        save.save(load.load(reference.parse("tiny"), LoadPlan(dtype="bfloat16")), tmp_path / "bf16")
        chosen = recipe.load(name, techniques.find, overrides)
        optimize(str(tmp_path / "bf16"), chosen, tmp_path / "artifact", OPTIONS)
        return tmp_path / "artifact"

    return artifact


@pytest.mark.parametrize(
    ("name", "overrides", "kind"),
    [
        ("rtn_int4", (), "q4_0"),
        ("rtn_int4", (), "q8_0"),
        ("rtn_int4", ("steps.0.rtn.group_size=32",), "q4_0"),
        ("rtn_int8", (), "q8_0"),
        ("int8", (), "q8_0"),
    ],
)
def test_a_symmetric_grid_is_stored_as_it_is(name: str, overrides: tuple[str, ...], kind: str, make: Any, tmp_path: Path) -> None:
    made = export(str(make(name, *overrides)), "gguf", kind, tmp_path / "model.gguf", OPTIONS)
    assert made.exact >= 14
    assert "14 layers of the source are packed: they were dequantized first" in made.notes
    assert "14 of 14 packed layers keep their integers, with scales in float16" in made.notes
    source = load.load(reference.parse(str(tmp_path / "artifact")), LoadPlan(dtype="float32"))
    read = load.load(reference.parse(str(tmp_path / "model.gguf")))
    ids = torch.arange(3, 60)[None]
    source.model(ids)  # plain transformers unpacks at the first run
    for layer in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.1.{layer}.weight"
        assert torch.equal(source.model.get_parameter(name), read.model.get_parameter(name))


def test_a_type_without_room_rounds_again_and_says_so(make: Any, tmp_path: Path) -> None:
    made = export(str(make("rtn_int8")), "gguf", "q4_0", tmp_path / "model.gguf", OPTIONS)
    assert "0 of 14 packed layers keep their integers, with scales in float16, 14 were rounded again" in made.notes
    assert made.against_source.top1_agreement < 1


def test_what_has_no_plain_weights_is_refused(make: Any, tmp_path: Path) -> None:
    folder = make("int8_naive")
    with pytest.raises(InputError, match="int8_naive runs when infopt opens it, and no file holds its result"):
        export(str(folder), "gguf", "q8_0", tmp_path / "model.gguf", OPTIONS)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["Q8_0", "Q4_0", "Q4_1"]),
    groups=st.integers(1, 3),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_grid_that_fits_comes_back_bit_for_bit(kind: str, groups: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = (-128, 127) if kind == "Q8_0" else (-8, 7)
    q = rng.integers(low, high + 1, (4, groups, 32 * blocks)).astype(np.float32)
    scale = np.exp2(rng.integers(-6, 3, (4, groups))).astype(np.float32)  # powers of two: every product is exact
    weight = (q * scale[..., None]).reshape(4, -1)
    made = storage.encode(weight, kind, scale)
    assert made.keeps_grid
    assert made.is_exact
    assert np.array_equal(made.dense, weight)


def test_groups_that_cut_blocks_are_rounded_again() -> None:
    weight = np.arange(-48, 48, dtype=np.float32).reshape(1, 96) / 4
    made = storage.encode(weight, "Q8_0", np.full((1, 2), 0.25, np.float32))  # groups of 48
    assert not made.keeps_grid
