"""The artifact cache: one artifact for all arms whose weights are the same, none for arms that leave them alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stub_techniques import chosen, register

from infopt import host, optimize, pipeline
from infopt.arms import ArmSpec
from infopt.artifact import read_artifact
from infopt.model.bundle import Bundle
from infopt.needs import Needs
from infopt.protocols import Context
from infopt.recipe import Recipe
from infopt.settings import LoadOptions
from infopt.techniques.base import Technique

CPU = LoadOptions(device="cpu")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that `ensure` had built; building is a folder with a file."""
    recipes: list[Recipe] = []

    def fake(model: str, recipe: Recipe, out: Path, options: LoadOptions, progress: Any, **rest: Any) -> None:
        recipes.append(recipe)
        (out / "infopt.json").write_text(json.dumps(len(recipes)), encoding="utf-8")

    monkeypatch.setattr(optimize, "optimize", fake)
    monkeypatch.setattr(optimize, "_is_whole", lambda folder: True)
    return recipes


def ensure(built: Recipe, options: LoadOptions = CPU, model: str = "tiny") -> Path | None:
    return optimize.ensure(ArmSpec("own", model, built), options)


def test_an_arm_that_leaves_the_weights_alone_needs_no_artifact(built: list[Recipe], tmp_path: Path) -> None:
    assert ensure(chosen()) is None
    assert ensure(chosen(speculative={"draft": "prompt_lookup"})) is None
    assert optimize.ensure(ArmSpec("own", str(tmp_path), chosen("rtn"), is_artifact=True), CPU) == tmp_path
    assert built == []


def test_the_same_arm_is_built_once(built: list[Recipe]) -> None:
    first = ensure(chosen("rtn"))
    assert first == ensure(chosen("rtn"))
    assert first is not None
    assert first.name.startswith("own-")
    assert len(built) == 1


def test_arms_that_differ_only_in_how_they_run_share_an_artifact(built: list[Recipe]) -> None:
    plain = ensure(chosen("rtn"))
    gates = {"ppl_ratio": {"max": 1.02}}
    assert plain == ensure(chosen("rtn", cache={"kind": "static"}, sampling={"temperature": 1.0}, gates=gates))
    assert plain == ensure(chosen("rtn", engine={"attention": "eager"}, calibration={"samples": 2}))
    assert len(built) == 1
    assert built[0].gates == ()
    assert built[0].engine.attention == "auto"


def test_what_changes_the_weights_changes_the_artifact(built: list[Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [
        ensure(chosen("rtn")),
        ensure(chosen({"rtn": {"bits": 8}})),
        ensure(chosen("rtn", "int8_naive")),
        ensure(chosen("rtn", engine={"dtype": "float16"})),
        ensure(chosen("rtn"), replace(CPU, seed=1)),
        ensure(chosen("rtn"), model="tiny-qwen2"),
        ensure(chosen(engine={"dtype": "float16"})),
    ]
    monkeypatch.setattr(host, "versions", lambda *found: {"torch": "0"})
    folders.append(ensure(chosen("rtn")))
    assert len(set(folders)) == len(folders) == len(built)


def test_a_name_cannot_lead_out_of_the_cache(built: list[Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "cache"))
    found = ensure(replace(chosen("rtn"), name="../../escaped"))
    assert found is not None
    assert found.parent == tmp_path / "cache" / "artifacts"


class Calibrated(Technique):
    """Keeps what it was given."""

    needs = Needs(calibration=True)
    seen: tuple[tuple[int, ...], ...] = ()

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        Calibrated.seen = context.calibration_ids
        return bundle


def test_calibration_reaches_the_step_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    register(Calibrated, monkeypatch)
    small = chosen("calibrated", calibration={"samples": 3, "tokens": 20})
    first = ensure(small)
    assert first is not None
    assert [len(ids) for ids in Calibrated.seen] == [20] * 3
    assert len(str(read_artifact(first).calibration_hash)) == 64
    assert first == ensure(small)
    assert first != ensure(chosen("calibrated", calibration={"samples": 4, "tokens": 20}))
    assert len(Calibrated.seen) == 4


def test_a_saved_arm_opens_under_its_own_run_time_half() -> None:
    """The arm's attention is not in the shared artifact, and still holds."""
    own = chosen({"rtn": {"group_size": 32}}, engine={"attention": "eager"})
    folder = ensure(own)
    opened = pipeline.open_arm(ArmSpec("own", str(folder), own, is_artifact=True), "cpu", CPU)
    assert opened.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("damage", ["config.json", "infopt.json", "model.safetensors"])
def test_an_artifact_that_is_not_as_it_was_made_is_made_again(damage: str) -> None:
    folder = ensure(chosen("rtn"))
    assert folder is not None
    before = (folder / "config.json").read_bytes()
    file = folder / damage
    stamp = (folder / "infopt.json").stat().st_mtime_ns
    assert ensure(chosen("rtn")) == folder
    assert (folder / "infopt.json").stat().st_mtime_ns == stamp, "what is whole is kept"
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    assert ensure(chosen("rtn")) == folder
    assert (folder / "config.json").read_bytes() == before
    assert (folder / "infopt.json").stat().st_mtime_ns > stamp


def test_steps_at_load_see_the_seed_that_the_artifact_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    class Seeded(Technique):
        at_load = True

        def apply(self, bundle: Bundle, context: Context) -> Bundle:
            seeds.append(context.seed)
            return bundle

    register(Seeded, monkeypatch)
    folder = ensure(chosen("seeded"), replace(CPU, seed=7))
    pipeline.reopen(folder or Path(), chosen().engine, "cpu", replace(CPU, seed=1))
    assert set(seeds) == {7}
