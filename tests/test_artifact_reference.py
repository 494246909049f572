"""An artifact outlives the model it was made from: what is measured stands, and quality is never judged against another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from infopt import arms
from infopt.bench import bench
from infopt.optimize import optimize
from infopt.result import Run
from infopt.settings import LoadOptions, QualitySettings, Settings, WorkloadSpec

OPTIONS = LoadOptions(threads=1)
SETTINGS = Settings(quality=QualitySettings(fidelity_tokens=64, choice_items=0, behaviour_prompts=0), warmup_cap=1)
SHAPE = WorkloadSpec(prompt_tokens=8, new_tokens=2, requests=1)


@pytest.fixture
def made(tiny_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(reference, artifact made from it)."""
    source, artifact = tmp_path / "mymodel", tmp_path / "mymodel-int8"
    shutil.copytree(tiny_folder, source)
    optimize(str(source), arms.load_recipe("int8"), artifact, OPTIONS)
    return source, artifact


def measured(artifact: Path) -> Run:
    run, _ = bench(arms.spec(str(artifact), None), SHAPE, OPTIONS, SETTINGS, blocks=1, results=artifact.parent / "results")
    assert run.is_complete
    assert run.figures["tpot_s.p50"].value is not None
    return run


def test_quality_is_judged_against_the_reference(made: tuple[Path, Path]) -> None:
    assert measured(made[1]).figures["kld.mean"].value is not None


def test_a_reference_that_is_gone_costs_the_quality_only(made: tuple[Path, Path]) -> None:
    shutil.rmtree(made[0])
    run = measured(made[1])
    assert "kld.mean" not in run.figures
    assert any("quality was not judged" in line for line in run.warnings)


def test_another_model_in_the_references_place_is_noticed(made: tuple[Path, Path]) -> None:
    config = made[0] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.1}), encoding="utf-8")
    run = measured(made[1])
    assert "kld.mean" not in run.figures
    assert any("not the model this was made from" in line for line in run.warnings)


def test_an_artifact_below_the_home_folder_is_an_artifact(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(made[1].parent))
    spec = arms.spec("~/mymodel-int8", None)
    assert spec.is_artifact
    assert spec.recipe.steps[0].name == "int8"
