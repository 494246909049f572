"""AutoRound: what it is asked for, how its integers are packed, and, where it is installed, that it learns."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stub_techniques import CALIBRATION

from infopt import techniques
from infopt.backends import work
from infopt.backends.environments import AUTOROUND
from infopt.errors import InputError, RecipeError
from infopt.model import load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.protocols import Context
from infopt.techniques.autoround import AutoRound, AutoRoundOptions

#: In the place of auto-round: integers and scales that a seed gives.
INVENT = """
import json, torch
from safetensors import safe_open
from safetensors.torch import save_file
bits, size, tensors = job.options["bits"], job.options["group_size"], {}
half = 1 << (bits - 1)
torch.manual_seed(0)
with safe_open(job.model / "model.safetensors", "pt") as stored:
    for key in stored.keys():
        name = key.removesuffix(".weight")
        if "_proj" in name and name not in job.options["ignore"]:
            rows, inner = stored.get_slice(key).get_shape()
            groups = inner // (size or inner)
            tensors[f"{name}.q"] = torch.randint(-half, half, (rows, inner), dtype=torch.int8)
            tensors[f"{name}.scale"] = (torch.rand(rows, groups) + 0.5).to(torch.float16).float() * 0.01
            tensors[f"{name}.scale"][::2] *= -1 if job.options["symmetric"] else 1
            if not job.options["symmetric"]:
                tensors[f"{name}.zero"] = torch.randint(-half, half, (rows, groups)).float()
job.out.mkdir()
save_file(tensors, job.out / "rounded.safetensors")
save_file(tensors, job.options_file)
"""


def technique(**options: Any) -> AutoRound:
    return AutoRound(AutoRoundOptions(**options))


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 8, "group_size": None}, {"bits": 2, "group_size": 16}])
def test_packs_the_integers_it_was_given(
    options: dict[str, Any],
    stand_in: Callable[[str], Path],
    build: Callable[..., Bundle],
    logits: Callable[[Bundle], torch.Tensor],
    tmp_path: Path,
) -> None:
    given = tmp_path / "given.safetensors"
    seen = stand_in(INVENT.replace("job.options_file", repr(str(given))))
    made = technique(**options)
    bundle = build(made)
    job = json.loads(seen.read_text(encoding="utf-8"))
    assert job["ids"] == [list(window) for window in CALIBRATION]
    assert job["options"]["scale_dtype"] == "float32"
    assert job["options"]["ignore"] == ["lm_head"]
    from safetensors.torch import load_file

    integers = load_file(given)
    assert len(bundle.packed) == 14
    for name in bundle.packed:
        weight = bundle.model.get_submodule(name).weight
        scale = integers[f"{name}.scale"]
        q = integers[f"{name}.q"].float().view(*scale.shape, -1)
        if f"{name}.zero" in integers:
            q = q - integers[f"{name}.zero"][..., None]
        assert torch.equal(weight, (q * scale[..., None]).view_as(weight)), name
    save.save(bundle, tmp_path / "saved")
    plain = load.load(reference.parse(str(tmp_path / "saved")))
    torch.testing.assert_close(logits(plain), logits(bundle), rtol=0, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_worker_finds_the_integers_in_a_rounded_layer(
    symmetric: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(work.SCRIPTS))
    worker = importlib.import_module("autoround_worker")
    made = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (6, 4, 16), generator=made)
    scale = (torch.rand(6, 4, generator=made) + 0.1).half()
    zp = 8 if symmetric else torch.randint(0, 16, (6, 4), generator=made)
    if symmetric:
        scale[::2] *= -1
    zero = torch.zeros(6, 4) if symmetric else zp - 8.0
    weight = ((q - zero[..., None]) * scale.float()[..., None]).view(6, 64).to(dtype)
    layer = SimpleNamespace(weight=weight, scale=scale, zp=zp, bits=4, sym=symmetric)
    found = worker.integers(layer)
    assert torch.equal(found["q"].view_as(q), q)
    assert torch.equal(found["scale"], scale.float())
    assert ("zero" in found) is not symmetric
    if not symmetric:
        assert torch.equal(found["zero"], zero)


def test_the_grid_in_the_words_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(work.SCRIPTS))
    worker = importlib.import_module("autoround_worker")
    found = worker.scheme({"bits": 3, "group_size": None, "symmetric": False})
    assert found == {"bits": 3, "group_size": -1, "sym": False, "data_type": "int", "act_bits": 16}


def test_scales_are_learned_in_the_dtype_that_is_stored(stand_in: Callable[[str], Path], build: Callable[..., Bundle]) -> None:
    seen = stand_in("raise SystemExit(1)")
    for options, dtype, stored in (({}, "bfloat16", "bfloat16"), ({"scale_dtype": "float16"}, "float32", "float16")):
        with pytest.raises(Exception, match="autoround ended with code 1"):
            build(technique(**options), dtype=dtype)
        assert json.loads(seen.read_text(encoding="utf-8"))["options"]["scale_dtype"] == stored


def test_refuses_what_cannot_work(tiny_bundle: Bundle) -> None:
    size = shapes.shapes(reference.parse("tiny"))
    with pytest.raises(RecipeError, match=r"s\.group_size: found 48, which does not divide"):
        technique(group_size=48).check(size, "s")
    with pytest.raises(InputError, match="a calibrated step needs text"):
        technique().apply(tiny_bundle, Context())
    assert technique(ignore=["*"]).apply(tiny_bundle, Context()) is tiny_bundle


def test_for_real(installed: Callable[..., None], build: Callable[..., Bundle], tiny_bundle: Bundle) -> None:
    """A few steps keep the output closer to the model's than rounding does."""
    installed(AUTOROUND)
    bundle = build(technique(iters=20))
    ids = torch.tensor(CALIBRATION)

    def error(found: Bundle) -> float:
        with torch.inference_mode():
            return float((found.model(input_ids=ids).logits - tiny_bundle.model(input_ids=ids).logits).square().mean())

    assert error(bundle) < 0.8 * error(build(techniques.find("rtn")(techniques.find("rtn").Options())))
