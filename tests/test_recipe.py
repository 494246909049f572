"""The grammar of recipes: what is accepted, what is refused and with which words, and what a resolved recipe says again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_techniques import find

from infopt import recipe, techniques
from infopt.errors import RecipeError
from infopt.recipe import Recipe
from infopt.sections import SECTIONS


def parse(text: str) -> Recipe:
    return recipe.parse(yaml.safe_load(text), find)


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(name: str) -> Recipe:
    return recipe.load(name, find)


# --- What is accepted ------------------------------------------------------------------------------------------------


def test_an_empty_recipe_changes_nothing_and_has_every_default() -> None:
    found = recipe.parse({"version": 1}, find, default_name="empty")
    assert found == Recipe(name="empty")
    assert found.as_dict() == {
        "version": 1,
        "name": "empty",
        "about": "",
        "steps": [],
        "sampling": {
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "candidates": 1,
            "choose": None,
            "answer": None,
        },
        "cache": {"kind": "dynamic", "dtype": "auto", "prefix": False},
        "engine": {
            "name": "native",
            "weights": "auto",
            "head": "auto",
            "way": "auto",
            "dtype": "auto",
            "compile": "never",
            "attention": "auto",
        },
        "calibration": {"text": "bundled", "samples": 128, "tokens": 256, "seed": 0},
        "gates": {},
    }


@pytest.mark.parametrize("steps", ["[round]", "[{round: }]", "[{round: {}}]"])
def test_a_step_without_options_has_its_defaults(steps: str) -> None:
    (step,) = parse(f"{{version: 1, steps: {steps}}}").steps
    assert step.as_dict() == {"round": {"bits": 4, "group_size": 64, "exact": True, "ignore": ["lm_head"]}}


def test_steps_keep_their_order_and_their_place() -> None:
    found = parse("{version: 1, steps: [{int8: {ignore: [q_proj]}}, int8_naive]}")
    assert [step.name for step in found.steps] == ["int8", "int8_naive"]
    assert found.place(1) == "steps[1].int8_naive"


def test_gates_are_those_of_the_section() -> None:
    found = parse("{version: 1, gates: {tpot_s.p50: {max_regress: 3%}, ppl_ratio: {max: 1.02, min: 0.9}}}")
    assert [(gate.figure, gate.condition, gate.limit) for gate in found.gates] == [
        ("tpot_s.p50", "max_regress", 0.03),
        ("ppl_ratio", "max", 1.02),
        ("ppl_ratio", "min", 0.9),
    ]
    assert found.as_dict()["gates"] == {"tpot_s.p50": {"max_regress": 0.03}, "ppl_ratio": {"max": 1.02, "min": 0.9}}


def test_an_empty_section_is_its_default() -> None:
    assert parse("{version: 1, cache: , speculative: , steps: , gates: }") == recipe.parse({"version": 1}, find)


# --- What is refused, and how ----------------------------------------------------------------------------------------

REFUSED = {
    # document: (where, what was found, what is allowed or nearest)
    "[]": ("", "found []", "a mapping"),
    "hello": ("", 'found "hello"', "a mapping"),
    "{version: 1, stepz: []}": ("stepz", "unknown key 'stepz'", "did you mean 'steps'?"),
    "{version: 1, 7: x}": ("7", "unknown key '7'", "known: about, cache"),
    "{}": ("version", "found nothing", "allowed: 1"),
    "{version: 2}": ("version", "found 2", "allowed: 1"),
    "{version: true}": ("version", "found true", "allowed: 1"),
    "{version: '1'}": ("version", 'found "1"', "allowed: 1"),
    "{version: 1, name: 3}": ("name", "found 3", "text"),
    "{version: 1, about: [a]}": ("about", 'found ["a"]', "text"),
    "{version: 1, name: 2020-01-01}": ("name", "found datetime.date(2020, 1, 1)", "text"),
    "{version: 1, steps: {}}": ("steps", "found {}", "a list"),
    "{version: 1, steps: [3]}": ("steps[0]", "found 3", "one technique"),
    "{version: 1, steps: [{round: {}, int8: {}}]}": ("steps[0]", "found {", "one technique"),
    "{version: 1, steps: [int8, rtm]}": ("steps[1]", "unknown technique 'rtm'", "did you mean 'rtn'?"),
    "{version: 1, steps: [zzz]}": ("steps[0]", "unknown technique 'zzz'", "known: "),
    "{version: 1, steps: [{round: 4}]}": ("steps[0].round", "found 4", "{bits, group_size"),
    "{version: 1, steps: [{round: {bit: 4}}]}": ("steps[0].round.bit", "unknown key 'bit'", "did you mean 'bits'?"),
    "{version: 1, steps: [{round: {4: 4}}]}": ("steps[0].round.4", "unknown key '4'", "known: bits"),
    "{version: 1, steps: [{round: {bits: 5}}]}": ("steps[0].round.bits", "found 5", "4, 8"),
    "{version: 1, steps: [{round: {bits: '4'}}]}": ("steps[0].round.bits", 'found "4"', "4, 8"),
    "{version: 1, steps: [{round: {group_size: '64'}}]}": (
        "steps[0].round.group_size",
        'found "64"',
        "a whole number ≥ 8 or null",
    ),
    "{version: 1, steps: [{round: {group_size: 64.5}}]}": (
        "steps[0].round.group_size",
        "found 64.5",
        "a whole number ≥ 8 or null",
    ),
    "{version: 1, steps: [{round: {exact: 1}}]}": ("steps[0].round.exact", "found 1", "true or false"),
    "{version: 1, steps: [{round: {ignore: lm_head}}]}": ("steps[0].round.ignore", 'found "lm_head"', "a list"),
    "{version: 1, engine: fast}": ("engine", 'found "fast"', "{name, weights, head, way, dtype, compile, attention}"),
    "{version: 1, engine: {dtype: bf16}}": ("engine.dtype", 'found "bf16"', "auto, float32, bfloat16, float16"),
    "{version: 1, engine: {dtyp: auto}}": ("engine.dtyp", "unknown key 'dtyp'", "did you mean 'dtype'?"),
    "{version: 1, sampling: {temperature: 9}}": ("sampling.temperature", "found 9", "a number ≥ 0 ≤ 5"),
    "{version: 1, sampling: {temperature: .nan}}": ("sampling.temperature", "found NaN", "a number"),
    "{version: 1, sampling: {top_p: 0}}": ("sampling.top_p", "found 0", "a number > 0 ≤ 1"),
    "{version: 1, sampling: {top_p: '1'}}": ("sampling.top_p", 'found "1"', "a number"),
    "{version: 1, sampling: {choose: best}}": ("sampling.choose", 'found "best"', "mean_logprob, majority, check or null"),
    "{version: 1, sampling: {candidates: 8}}": ("sampling", "found candidates: 8 at temperature 0", "temperature above 0"),
    "{version: 1, sampling: {choose: check}}": ("sampling", "found choose: check with candidates: 1", "candidates: 2 or more"),
    "{version: 1, sampling: {temperature: 1, candidates: 2, answer: x}}": (
        "sampling",
        "found answer: 'x' with choose: null",
        "choose: majority",
    ),
    "{version: 1, sampling: {temperature: 1, candidates: 2, choose: majority, answer: '('}}": (
        "sampling",
        "found answer: '('",
        "a pattern of Python's re",
    ),
    "{version: 1, speculative: {tokens: 3}}": ("speculative.draft", "is missing", ""),
    "{version: 1, speculative: {draft: prompt_lokup}}": (
        "speculative",
        "found draft: prompt_lokup",
        "did you mean 'prompt_lookup'?",
    ),
    "{version: 1, speculative: {draft: self, among: [a/b]}}": ("speculative", "found among", "draft: auto"),
    "{version: 1, speculative: {draft: prompt_lookup, layers: 3}}": ("speculative", "found layers", "draft: self or auto"),
    "{version: 1, calibration: {samples: 0, tokens: 1}}": ("calibration.samples", "found 0", "(and 1 more)"),
    "{version: 1, gates: [a]}": ("gates", 'found ["a"]', "figures with their conditions"),
    "{version: 1, gates: {tpot_s.p51: {max: 1}}}": ("gates.tpot_s.p51", "unknown figure", "did you mean 'tpot_s.p"),
    "{version: 1, gates: {tpot_s: {max: 1}}}": ("gates.tpot_s", "one value per request", "statistic"),
    "{version: 1, gates: {ppl_ratio: {mx: 1}}}": ("gates.ppl_ratio.mx", "unknown condition 'mx'", "did you mean 'max'?"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_is_named_with_its_place_and_what_is_allowed(text: str) -> None:
    where, found, allowed = REFUSED[text]
    with pytest.raises(RecipeError) as caught:
        parse(text)
    message = str(caught.value)
    assert caught.value.path == where
    assert message.startswith(f"{where}: " if where else "recipe: ")
    assert found in message
    assert allowed in message
    assert "\n" not in message


def test_a_missing_key_says_what_it_takes() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("{version: 1, speculative: {}}")
    assert caught.value.hint == "allowed: text"


def test_long_values_are_cut() -> None:
    with pytest.raises(RecipeError) as caught:
        parse(f"{{version: 1, engine: {'x' * 500}}}")
    assert len(str(caught.value)) < 160


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
KEYS = st.sampled_from(
    ["version", "name", "about", "extends", *SECTIONS, "steps", "gates", "round", "int8", "bits", "tokens", "dtype", "max"]
)
VALUES: st.SearchStrategy[Any] = st.deferred(
    lambda: SCALARS | st.lists(VALUES, max_size=3) | st.dictionaries(KEYS | SCALARS, VALUES, max_size=4)
)


@given(document=st.dictionaries(KEYS, VALUES, max_size=6) | VALUES)
@settings(deadline=None, max_examples=300)
def test_any_document_is_a_recipe_or_one_line(document: Any) -> None:
    if isinstance(document, dict) and "version" in document:
        document["version"] = 1
    message = ""
    try:
        recipe.parse(document, find)
    except RecipeError as error:
        message = str(error)
    assert "\n" not in message


# --- Files: where they lie, what they extend -------------------------------------------------------------------------


def test_a_file_goes_before_a_shipped_recipe_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe.locate("baseline") == recipe.locate("recipes/baseline.yaml") == recipe.shipped()["baseline"]
    write(tmp_path, "recipes/baseline.yaml", "version: 1")
    assert recipe.locate("recipes/baseline.yaml") == Path("recipes/baseline.yaml")


@pytest.mark.parametrize("name", ["gone.yaml", "elsewhere/recipes/baseline.yaml", "recipes/gone.yaml", "/nowhere/baseline"])
def test_a_missing_file_is_refused_even_when_a_shipped_recipe_has_its_name(name: str) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe file") as caught:
        recipe.locate(name)
    assert caught.value.hint == "infopt recipes list"


def test_an_unknown_name_has_a_nearest_one() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'baselin'; did you mean 'baseline'\?"):
        recipe.locate("baselin")


def test_extending_merges_sections_and_replaces_steps_and_gates(tmp_path: Path) -> None:
    write(
        tmp_path,
        "base.yaml",
        """
        version: 1
        name: base
        about: the base
        steps: [round]
        sampling: {temperature: 0.5, top_k: 3}
        speculative: {draft: prompt_lookup, tokens: 5}
        gates: {ppl_ratio: {max: 1.02}}
        """,
    )
    own = write(
        tmp_path,
        "own.yaml",
        """
        version: 1
        extends: base.yaml
        steps: [int8]
        sampling: {temperature: 0.7}
        speculative:
        gates: {weights_bytes: {max_regress: 1%}}
        """,
    )
    found = load(own)
    assert found.name == "own"
    assert found.about == ""
    assert [step.name for step in found.steps] == ["int8"]
    assert (found.sampling.temperature, found.sampling.top_k) == (0.7, 3)
    assert found.speculative is None
    assert [gate.figure for gate in found.gates] == ["weights_bytes"]
    assert found.source == own


def test_what_is_not_said_is_inherited_through_several_files(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "{version: 1, steps: [round], gates: {ppl_ratio: {max: 1.02}}}")
    write(tmp_path, "deep/b.yaml", "{version: 1, extends: ../a.yaml, cache: {kind: static}}")
    found = load(write(tmp_path, "c.yaml", "{version: 1, extends: deep/b.yaml, engine: {dtype: float32}}"))
    assert [step.name for step in found.steps] == ["round"]
    assert (found.cache.kind, found.engine.dtype) == ("static", "float32")
    assert [gate.figure for gate in found.gates] == ["ppl_ratio"]


def test_a_shipped_recipe_can_be_extended_by_name(tmp_path: Path) -> None:
    assert load(write(tmp_path, "mine.yaml", "{version: 1, extends: baseline}")).steps == ()


def test_a_circle_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "{version: 1, extends: b.yaml}")
    write(tmp_path, "b.yaml", "{version: 1, extends: a.yaml}")
    with pytest.raises(RecipeError, match=r"^extends: .*a\.yaml extends itself through a\.yaml → b\.yaml"):
        load(first)
    with pytest.raises(RecipeError, match="extends itself"):
        load(write(tmp_path, "self.yaml", "{version: 1, extends: self.yaml}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{version: 1, extends: 3}", "extends: found 3; allowed: a recipe's name or path"),
        ("{version: 1, extends: gone.yaml}", "gone.yaml: no such recipe file"),
        ("[a]", 'found ["a"]; allowed: a mapping'),
        ("", "found nothing; allowed: a mapping"),
        ("version: [", "not valid YAML"),
        ("version: 1\nname: a\nname: b", "key 'name' stands twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(tmp_path, "mine.yaml", text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load(str(tmp_path / "mine.yaml"))


# --- Resolved, and as a schema ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_resolved_recipe_says_the_same_again(name: str) -> None:
    found = load(name)
    again = recipe.parse(yaml.safe_load(found.as_yaml()), find, source=found.source)
    assert again == found
    assert again.as_yaml() == found.as_yaml()


#: PyYAML reads the exotic line breaks U+0085, U+2028 and U+2029 back as spaces.
TEXT = st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"))


@given(
    bits=st.sampled_from([4, 8]),
    group=st.none() | st.integers(8, 512),
    ignore=st.lists(st.text(TEXT, min_size=1, max_size=6), max_size=3),
    temperature=st.floats(0, 5),
    about=st.text(TEXT, max_size=30),
    limit=st.floats(0, 0.99),
)
@settings(deadline=None, max_examples=100)
def test_any_recipe_survives_its_yaml(
    bits: int, group: int | None, ignore: list[str], temperature: float, about: str, limit: float
) -> None:
    document = {
        "version": 1,
        "name": "any",
        "about": about,
        "steps": [{"round": {"bits": bits, "group_size": group, "ignore": ignore}}],
        "sampling": {"temperature": temperature},
        "gates": {"tpot_s.p50": {"max_regress": limit}},
    }
    found = recipe.parse(document, find)
    assert recipe.parse(yaml.safe_load(found.as_yaml()), find) == found


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found = recipe.schema({name: techniques.find(name) for name in techniques.names()})
    jsonschema.Draft202012Validator.check_schema(found)
    return found


@pytest.mark.parametrize("name", recipe.shipped())
def test_the_schema_accepts_every_shipped_recipe(schema: dict[str, Any], name: str) -> None:
    text = recipe.shipped()[name].read_text(encoding="utf-8")
    jsonschema.validate(yaml.safe_load(text), schema)
    jsonschema.validate(load(name).as_dict(), schema)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{version: 2}",
        "{version: 1, stepz: []}",
        "{version: 1, steps: [{rtm: {}}]}",
        "{version: 1, steps: [{rtn: {bit: 4}}]}",
        "{version: 1, steps: [{rtn: {bits: 5}}]}",
        "{version: 1, steps: [{rtn: {}, int8: {}}]}",
        "{version: 1, engine: {dtyp: auto}}",
        "{version: 1, gates: {tpot_s.p51: {max: 1}}}",
        "{version: 1, gates: {ppl_ratio: {mx: 1}}}",
    ],
)
def test_the_schema_refuses_what_the_grammar_refuses(schema: dict[str, Any], text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), schema)
    with pytest.raises(RecipeError):
        parse(text)
