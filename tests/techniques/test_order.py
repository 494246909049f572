"""One step packs the weights, none changes them afterwards; a recipe is refused for it before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_techniques import chosen
from typer.testing import CliRunner

from infopt import forecast, optimize, techniques
from infopt.cli import app
from infopt.errors import Exit, RecipeError
from infopt.model.bundle import Bundle
from infopt.settings import LoadOptions
from infopt.techniques.base import Technique

CPU = LoadOptions(device="cpu")
SMALL = {"samples": 4, "tokens": 64}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("gptq", "rtn"), "steps[1].rtn: follows gptq, after which the weights are packed"),
        (("nf4", "smoothquant"), "steps[1].smoothquant: follows nf4, after which the weights are packed"),
        (("rtn", "kv_cache", "gptq"), "steps[2].gptq: follows kv_cache, whose KV scales would not fit then"),
        (
            ("trim_vocab", "distil"),
            "steps[1].distil: follows trim_vocab, after which the model has other tokens than its teacher",
        ),
        (("kv_cache", "kv_cache"), "steps[1].kv_cache: follows kv_cache, whose KV scales would not fit then"),
    ],
)
def test_a_step_that_comes_too_late_is_refused_before_anything_runs(
    steps: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, out = chosen(*steps, calibration=SMALL), tmp_path / "out"
    for name in set(steps):
        monkeypatch.setattr(techniques.find(name), "apply", lambda *arguments: pytest.fail("it ran"))
    for run in (
        lambda: techniques.check_order(own),
        lambda: forecast.forecast("tiny", own, out, CPU),
        lambda: optimize.optimize("tiny", own, out, CPU),
    ):
        with pytest.raises(RecipeError) as caught:
            run()
        assert str(caught.value) == message
    (tmp_path / "own.yaml").write_text(own.as_yaml(), encoding="utf-8")
    checked = CliRunner().invoke(app, ["recipes", "check", str(tmp_path / "own.yaml")])
    assert (checked.exit_code, message in checked.stderr) == (Exit.USAGE, True)


@pytest.mark.parametrize(
    "steps", [("smoothquant", "gptq", "kv_cache"), ("rtn", "int8_naive"), ({"qlora": {"keep": "merged"}}, "rtn")]
)
def test_what_goes_together_is_allowed(steps: tuple[Any, ...]) -> None:
    techniques.check_order(chosen(*steps))


@pytest.mark.parametrize("name", [name for name in techniques.names() if not techniques.find(name).at_load])
def test_a_technique_says_whether_it_packs(name: str, make: Callable[..., Technique], build: Callable[..., Bundle]) -> None:
    technique = make(name)
    made = build(technique)
    is_packed = bool(made.packed) or getattr(made.model, "hf_quantizer", None) is not None
    assert technique.packs is (is_packed and not technique.is_record)
