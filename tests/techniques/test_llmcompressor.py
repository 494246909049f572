"""llm-compressor: what it is asked for, what becomes of its answer, and, where it is installed, that it answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_techniques import CALIBRATION, chosen

from infopt import optimize, recipe, techniques
from infopt.backends.environments import LLMCOMPRESSOR
from infopt.errors import InfoptError, InputError, RecipeError
from infopt.model import checkpoint, load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.protocols import Context, Machine, Prediction
from infopt.settings import LoadOptions
from infopt.techniques.llmcompressor import PRESETS, READ_BY, LlmCompressor, LlmCompressorOptions

METHODS = ["gptq", "rtn", *PRESETS]
#: Rounds as infopt does, in the place of llm-compressor: the same formats.
ROUND = """
from infopt.layers import rounding
from infopt.layers.grid import Grid
from infopt.model import load, reference, save
from infopt.techniques.llmcompressor import PRESETS
grids = {name: grid for name, grid in PRESETS.values()}
found = job.options["scheme"]
rule = Grid(found["weights"]["num_bits"], found["weights"]["group_size"]) if isinstance(found, dict) else grids[found]
job.say("rounding")
save.save(rounding.round_layers(load.load(reference.parse(str(job.model))), job.options["ignore"], rule, "", job.say), job.out)
"""


def technique(**options: Any) -> LlmCompressor:
    return LlmCompressor(LlmCompressorOptions(**options))


@pytest.mark.parametrize("method", METHODS)
def test_says_what_it_wants_in_the_words_of_the_library(method: str) -> None:
    given = {"bits": 8, "group_size": None, "act_order": False, "damping": 0.05}
    job = technique(method=method, **{o: v for o, v in given.items() if method in READ_BY[o]})._job(["lm_head"])
    assert job["ignore"] == ["lm_head"]
    assert (job["gptq"] is not None) == method.endswith("gptq")
    assert job["gptq"] in (None, {"actorder": None, "dampening_frac": 0.05})
    assert (job["smoothing"] is not None) == method.startswith("smoothquant")
    if method in ("gptq", "rtn"):
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
        assert job["scheme"] == {"targets": ["Linear"], "weights": weights}
    else:
        assert job["scheme"] == PRESETS[method][0]


@pytest.mark.parametrize("method", METHODS)
def test_text_is_needed_only_where_it_is_read(method: str) -> None:
    needs = technique(method=method).needs
    assert needs.calibration == (method in ("gptq", "smoothquant", "smoothquant_gptq", "nvfp4"))
    assert needs.environment is LLMCOMPRESSOR


def test_the_answer_is_stored_as_it_was_written(
    stand_in: Callable[[str], Path], build: Callable[..., Bundle], logits: Callable[[Bundle], torch.Tensor], tmp_path: Path
) -> None:
    seen = stand_in(ROUND)
    made = technique(method="gptq", group_size=32, ignore=["lm_head", "*.1.mlp.*"])
    bundle = build(made)
    job = json.loads(seen.read_text(encoding="utf-8"))
    assert job["ids"] == [list(window) for window in CALIBRATION]
    assert job["options"]["ignore"] == [*(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")), "lm_head"]
    assert len(bundle.packed) == 11
    save.save(bundle, tmp_path / "saved")
    plain = load.load(reference.parse(str(tmp_path / "saved")))
    torch.testing.assert_close(logits(plain), logits(bundle), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["rtn", "w8a8", "mxfp4a16"])
def test_an_artifact_records_the_environment_and_predicts_its_bytes(
    method: str, stand_in: Callable[[str], Path], tmp_path: Path
) -> None:
    seen = stand_in(ROUND)
    chosen = recipe.parse({"version": 1, "name": "one", "steps": [{"llmcompressor": {"method": method}}]}, techniques.find)
    document = optimize.optimize("tiny", chosen, tmp_path / "out", LoadOptions(device="cpu"))
    assert json.loads(seen.read_text(encoding="utf-8"))["ids"] == [], "no text where the method reads none"
    assert document.versions["environment llmcompressor"] == LLMCOMPRESSOR.provenance()
    assert LLMCOMPRESSOR.lock_hash in LLMCOMPRESSOR.provenance()
    size = shapes.shapes(reference.parse("tiny"))
    before = Prediction(4 * size.parameters, 4 * size.parameters, None)
    predicted = technique(method=method).predict(size, before, Machine("cpu", read_bytes_per_s=2e10))
    assert predicted.weights_bytes == pytest.approx(checkpoint.tensor_bytes(tmp_path / "out"), rel=0.03)


def test_a_failure_over_there_is_one_line_here(stand_in: Callable[[str], Path], build: Callable[..., Bundle]) -> None:
    stand_in("raise RuntimeError('no such thing')")
    with pytest.raises(InfoptError, match=r"llmcompressor ended with code 1: .*RuntimeError: no such thing"):
        build(technique(method="rtn"))


def test_nothing_runs_where_nothing_is_to_be_done(tiny_bundle: Bundle) -> None:
    assert technique(ignore=["*"]).apply(tiny_bundle, Context()) is tiny_bundle


def test_refuses_what_cannot_work(tiny_bundle: Bundle) -> None:
    size = shapes.shapes(reference.parse("tiny"))
    with pytest.raises(RecipeError, match=r"s\.group_size: found 48, which does not divide"):
        technique(group_size=48).check(size, "s")
    with pytest.raises(RecipeError, match="shares its weight"):
        technique(ignore=()).check(size, "s")
    technique(method="nvfp4").check(size, "s")  # the format fixes its group
    with pytest.raises(InputError, match="a calibrated step needs text"):
        technique().apply(tiny_bundle, Context())


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("fp8", {"bits": 8}), ("nvfp4", {"group_size": 32}), ("w8a8", {"symmetric": False}), ("rtn", {"act_order": False}),
        ("smoothquant", {"damping": 0.1}), ("gptq", {"smoothing": 0.1}), ("mxfp4", {"batch_size": 2}),
    ],
)  # fmt: skip
def test_options_that_the_method_does_not_read_are_refused(method: str, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(RecipeError, match=rf"^steps\[0\]\.llmcompressor: method {method} does not read {name}, which is of"):
        chosen({"llmcompressor": {"method": method, **option}})


def test_another_lock_makes_another_artifact(stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("")
    chosen = recipe.parse({"version": 1, "name": "one", "steps": [{"llmcompressor": {"method": "rtn"}}]}, techniques.find)
    ref = reference.parse("tiny")
    first = optimize.build_key(ref, chosen, LoadOptions(device="cpu"))
    monkeypatch.setattr(type(LLMCOMPRESSOR), "lock_hash", "another")
    assert optimize.build_key(ref, chosen, LoadOptions(device="cpu")) != first


def test_for_real(
    installed: Callable[..., None], build: Callable[..., Bundle], logits: Callable[[Bundle], torch.Tensor],
    tiny_bundle: Bundle, tmp_path: Path,
) -> None:  # fmt: skip
    """Its GPTQ keeps the output closer to the model's than rounding does."""
    installed(LLMCOMPRESSOR)
    bundle = build(technique(method="gptq"))
    assert len(bundle.packed) == 14
    save.save(bundle, tmp_path / "saved")
    plain = load.load(reference.parse(str(tmp_path / "saved")))
    torch.testing.assert_close(logits(plain), logits(bundle), rtol=0, atol=1e-5)
    ids = torch.tensor(CALIBRATION)

    def error(found: Bundle) -> float:
        with torch.inference_mode():
            return float((found.model(input_ids=ids).logits - tiny_bundle.model(input_ids=ids).logits).square().mean())

    assert error(bundle) < 0.8 * error(build(techniques.find("rtn")(techniques.find("rtn").Options())))
