"""`--set path=value`: what it reaches, and the paths that lead nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stub_techniques import find

from infopt import recipe
from infopt.errors import InputError, RecipeError
from infopt.recipe import Recipe


def load(name: str, *overrides: str) -> Recipe:
    return recipe.load(name, find, overrides)


BASE = "{version: 1, steps: [{round: {bits: 4}}, int8_naive, {int8: }], gates: {tpot_s.p50: {max_regress: 3%}}}"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return write(tmp_path / "base.yaml", BASE)


def test_a_colon_at_the_end_is_no_key(base: str) -> None:
    assert load(base, "calibration.text=hub:").calibration.text == "hub:"


def options(found: Recipe, index: int) -> dict[str, Any]:
    (values,) = found.steps[index].as_dict().values()
    return dict(values)


def test_set_reaches_every_part_of_a_recipe(base: str) -> None:
    found = load(
        base,
        "steps.0.round.bits=8",
        "steps.0.round.group_size=null",
        "steps.0.round.ignore=[lm_head, q_proj]",
        "steps.1.int8_naive.head=false",
        "steps.2.int8.activations=group",
        "gates.tpot_s.p50.max_regress=5%",
        "gates.ppl_ratio.max=1.1",
        "gates.kld.mean.max=0.05",
        "sampling.temperature=0.5",
        "speculative.draft=prompt_lookup",
        "cache={kind: static}",
        "name=other",
    )
    assert options(found, 0)["bits"] == 8
    assert options(found, 0)["group_size"] is None
    assert options(found, 0)["ignore"] == ["lm_head", "q_proj"]
    assert options(found, 1) == {"head": False}
    assert options(found, 2)["activations"] == "group"
    assert {gate.figure: gate.limit for gate in found.gates} == {"tpot_s.p50": 0.05, "ppl_ratio": 1.1, "kld.mean": 0.05}
    assert found.sampling.temperature == 0.5
    assert found.speculative is not None
    assert found.cache.kind == "static"
    assert found.name == "other"


def test_set_overrides_what_is_extended_and_the_last_one_wins(tmp_path: Path, base: str) -> None:
    own = write(tmp_path / "own.yaml", "{version: 1, extends: base.yaml}")
    assert options(load(own, "steps.0.round.bits=4", "steps.0.round.bits=8"), 0)["bits"] == 8
    assert load(own, "steps=").steps == ()


def test_null_takes_a_gate_away(tmp_path: Path) -> None:
    two = write(tmp_path / "two.yaml", "{version: 1, gates: {tpot_s.p50: {max_regress: 3%, max: 1}, ppl_ratio: {max: 1.1}}}")

    def left(*overrides: str) -> set[tuple[str, str]]:
        return {(gate.figure, gate.condition) for gate in load(two, *overrides).gates}

    assert left("gates.ppl_ratio=null") == {("tpot_s.p50", "max_regress"), ("tpot_s.p50", "max")}
    assert left("gates.tpot_s.p50=null") == {("ppl_ratio", "max")}
    assert left("gates.tpot_s.p50.max=null") == {("tpot_s.p50", "max_regress"), ("ppl_ratio", "max")}
    assert left("gates.ppl_ratio.max=") == left("gates.ppl_ratio=null")
    assert left("gates.tpot_s.p50={max: 2}") == {("tpot_s.p50", "max"), ("ppl_ratio", "max")}
    assert left("gates=null") == set()
    for path in ("gates.kld.mean", "gates.ppl_ratio.min", "gates.tpot_s"):
        with pytest.raises(InputError, match="unknown gate"):
            left(f"{path}=null")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.0.round.bits", "allowed: path=value"),
        ("=3", "allowed: path=value"),
        ("engine..dtype=auto", "allowed: path=value"),
        ("engine.dtype=[", "not valid YAML"),
        ("steps.3.round.bits=4", "no such step; the recipe has 3"),
        ("steps.-1.round.bits=4", "no such step"),
        ("steps.x.round.bits=4", "no such step"),
        ("steps.0.rount.bits=4", "unknown step 'rount'; did you mean 'round'?"),
        ("steps.1.round.bits=4", "unknown step 'round'"),
        ("steps.0=round", "names a whole step"),
        ("version.x=1", "version is 1, which has no keys"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(base: str, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(base, override)
    assert message in str(caught.value)
    assert repr(override) in str(caught.value)


def test_set_on_a_recipe_without_steps_says_so() -> None:
    with pytest.raises(InputError, match=r"steps\.0: no such step; the recipe has 0"):
        load("baseline", "steps.0.round.bits=4")


@pytest.mark.parametrize(
    "override", ["steps.0.round.bit=4", "engin.dtype=auto", "engine.dtype=bf16", "engine=fast", "steps=round"]
)
def test_what_is_set_is_checked_like_the_file(base: str, override: str) -> None:
    with pytest.raises(RecipeError):
        load(base, override)
