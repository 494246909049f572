"""Arms: MODEL[:RECIPE] in, checked specifications with distinct labels out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infopt import arms
from infopt.arms import ArmSpec
from infopt.artifact import Artifact
from infopt.errors import InputError, RecipeError
from infopt.result import dump


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """What an artifact looks like before its weights are read: provenance and a recipe."""
    folder = tmp_path / "tiny-int8"
    folder.mkdir()
    document = Artifact(
        created_utc="2031-01-01T00:00:00+00:00", infopt_version="0", reference="tiny", reference_description="tiny",
        reference_hash="0", recipe={}, steps=(), load_back=(), calibration_hash=None, seed=0, versions={}, bytes_before=2,
        bytes_after=1,
    )  # fmt: skip
    (folder / "infopt.json").write_text(dump(document), encoding="utf-8")
    (folder / "recipe.yaml").write_text("{version: 1, name: int8, steps: [int8], cache: {kind: static}}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("text", "model", "recipe"),
    [
        ("demo", "demo", None),
        ("demo:int8", "demo", "int8"),
        ("demo:recipes/int8.yaml", "demo", "recipes/int8.yaml"),
        ("org/name:int8", "org/name", "int8"),
        ("base+adapter:int8", "base+adapter", "int8"),
        (":int8", ":int8", None),
    ],
)
def test_a_colon_parts_model_and_recipe(text: str, model: str, recipe: str | None) -> None:
    assert arms.split(text) == (model, recipe)


def test_a_folder_with_a_colon_in_its_name_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "my:model"
    folder.mkdir()
    assert arms.split(str(folder)) == (str(folder), None)
    assert arms.split(f"{folder}:int8") == (str(folder), "int8")


def test_a_model_alone_runs_as_it_is() -> None:
    found = arms.spec("some/model", None)
    assert (found.label, found.model, found.recipe.name, found.is_artifact) == ("model", "some/model", "as_stored", False)
    assert found.recipe.steps == ()


def test_overrides_and_dtype_reach_the_recipe() -> None:
    found = arms.spec("tiny", "int8", ["steps.0.int8.activations=none", "engine.dtype=float16"], "float32")
    assert found.recipe.steps[0].options.model_dump()["activations"] == "none"
    assert found.recipe.engine.dtype == "float32"


def test_an_unknown_engine_or_dtype_is_refused_before_anything_is_read() -> None:
    with pytest.raises(RecipeError, match=r"^engine\.name: unknown engine 'transformer'; did you mean 'transformers'\?"):
        arms.spec("tiny", None, ["engine.name=transformer"])
    with pytest.raises(RecipeError, match=r"^engine\.dtype: found \"bf16\"; allowed: auto, float32"):
        arms.spec("tiny", None, dtype="bf16")


def test_labels_differ_also_as_names_of_files() -> None:
    found = arms.parse(["tiny", "tiny", "tiny:baseline", "x/tiny", "a b:int8", "a-b:int8"])
    assert [each.label for each in found] == ["tiny", "tiny (2)", "baseline", "tiny (3)", "int8", "int8 (2)"]
    assert len({arms.file_name(each.label) for each in found}) == len(found)


def test_labels_that_meet_as_file_names_are_told_apart(tmp_path: Path) -> None:
    for name, label in (("one", "a b"), ("two", "a/b")):
        (tmp_path / f"{name}.yaml").write_text(f"{{version: 1, name: {label}}}", encoding="utf-8")
    found = arms.parse([f"tiny:{tmp_path}/one.yaml", f"tiny:{tmp_path}/two.yaml"])
    assert [each.label for each in found] == ["a b", "a/b (2)"]


@pytest.mark.parametrize(
    ("label", "name"), [("int8", "int8"), ("tiny (A/A)", "tiny-A-A"), ("../..", "arm"), ("ü", "arm"), ("a:b.yaml", "a-b.yaml")]
)
def test_a_label_as_a_file_name(label: str, name: str) -> None:
    assert arms.file_name(label) == name


def test_an_arm_survives_the_way_to_its_worker() -> None:
    spec = arms.spec("tiny", "int4_lookup", ["sampling.temperature=0.5"])
    again = ArmSpec.from_dict(json.loads(json.dumps(spec.as_dict())))
    assert (again.label, again.model, again.is_artifact) == (spec.label, spec.model, spec.is_artifact)
    assert again.recipe.as_dict() == spec.recipe.as_dict()
    assert again.recipe.gates == spec.recipe.gates


def test_an_artifact_brings_its_own_recipe(artifact: Path) -> None:
    found = arms.spec(str(artifact), None)
    assert (found.label, found.is_artifact) == ("tiny-int8", True)
    assert [step.name for step in found.recipe.steps] == ["int8"]
    assert found.recipe.cache.kind == "static"


def test_an_artifact_runs_under_another_run_time_half(artifact: Path) -> None:
    assert arms.spec(str(artifact), None, ["sampling.temperature=1"], "float32").recipe.engine.dtype == "float32"
    found = arms.spec(str(artifact), "prompt_lookup")
    assert found.label == "tiny-int8:prompt_lookup"
    assert found.is_artifact
    assert found.recipe.speculative is not None


def test_the_weights_of_an_artifact_are_not_changed_again(artifact: Path) -> None:
    with pytest.raises(InputError, match=r"tiny-int8 is already optimized; recipe 'rtn_int4' would change") as caught:
        arms.spec(str(artifact), "rtn_int4")
    assert caught.value.hint == "give the reference model instead: tiny:rtn_int4"
    with pytest.raises(InputError, match=r"is already optimized; --set would change its weights again"):
        arms.spec(str(artifact), None, ["steps.0.int8.activations=group"])


def test_a_broken_artifact_is_refused(artifact: Path) -> None:
    (artifact / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match=r"recipe\.yaml: no such recipe file"):
        arms.spec(str(artifact), None)
    (artifact / "infopt.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"infopt\.json: broken JSON"):
        arms.spec(str(artifact), "rtn_int4")
