"""The grammar of gates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from infopt.errors import Exit, InputError, RecipeError
from infopt.gates import Gate, load_gates, parse_gates


def gate(condition: str, limit: float, key: str = "tpot_s.p50") -> Gate:
    return Gate.model_validate({"figure": key, "condition": condition, "limit": limit})


# --- Grammar ---------------------------------------------------------------------------------------------------------


def test_every_condition_is_read_with_its_units() -> None:
    gates = parse_gates(
        {
            "tpot_s.p50": {"max_regress": "3%", "max": 0.05},
            "decode_tok_per_s.p50": {"max_regress": 0.03},
            "weights_bytes": {"min_improve": "40%", "max": "100 MB"},
            "kld.mean": {"max": 0.05},
            "mc.accuracy": {"max_drop": "2%", "min": "30%"},
            "mc.delta": {"min": -0.02},
        },
        "gates",
    )
    assert [(g.figure, g.condition, g.limit) for g in gates] == [
        ("tpot_s.p50", "max_regress", 0.03),
        ("tpot_s.p50", "max", 0.05),
        ("decode_tok_per_s.p50", "max_regress", 0.03),
        ("weights_bytes", "min_improve", 0.4),
        ("weights_bytes", "max", 100_000_000),
        ("kld.mean", "max", 0.05),
        ("mc.accuracy", "max_drop", 0.02),
        ("mc.accuracy", "min", 0.3),
        ("mc.delta", "min", -0.02),
    ]
    assert [g.text for g in gates[:2]] == ["max_regress 3.0 %", "max 50.0 ms"]
    assert gates[3].tau == -0.4
    assert parse_gates(None, "gates") == ()


@pytest.mark.parametrize(
    ("mapping", "path", "words"),
    [
        ({"tpots_s.p50": {"max": 1}}, "gates.tpots_s.p50", "did you mean 'tpot_s.p50'"),
        ({"tpot_s": {"max": 1}}, "gates.tpot_s", "name a statistic"),
        ({"kld.mean": {"maxx": 1}}, "gates.kld.mean.maxx", "did you mean 'max'"),
        ({"kld.mean": 0.05}, "gates.kld.mean", "found 0.05; allowed: max_regress"),
        ({"kld.mean": {}}, "gates.kld.mean", "allowed: max_regress"),
        ({"kld.mean": {"max": None}}, "gates.kld.mean.max", "found nothing; allowed: a number in nats"),
        ({"kld.mean": {"max": "tiny"}}, "gates.kld.mean.max", 'found "tiny"; allowed: a number in nats'),
        ({"kld.mean": {"max": True}}, "gates.kld.mean.max", "found true"),
        ({"kld.mean": {"max": math.nan}}, "gates.kld.mean.max", "found NaN"),
        ({"kld.mean": {"max": [1]}}, "gates.kld.mean.max", "found [1]"),
        ({"kld.mean": {"max_regress": "3%"}}, "gates.kld.mean.max_regress", "against the reference already"),
        ({"tpot_s.p50": {"max_drop": "3%"}}, "gates.tpot_s.p50.max_drop", "not a share of quality"),
        ({"mc.flips_share": {"max_drop": "3%"}}, "gates.mc.flips_share.max_drop", "not a share of quality"),
        ({"mc.flips_share": {"max": 5}}, "gates.mc.flips_share.max", "may mean 5 % or 500 %"),
        ({"tpot_s.p50": {"max_regress": 3}}, "gates.tpot_s.p50.max_regress", "may mean 3 % or 300 %"),
        ({"tpot_s.p50": {"max_regress": "3"}}, "gates.tpot_s.p50.max_regress", "may mean 3 % or 300 %"),
        ({"tpot_s.p50": {"max_regress": "-3%"}}, "gates.tpot_s.p50.max_regress", "allowed: 0 or more"),
        ({"tpot_s.p50": {"max_regress": "1e999"}}, "gates.tpot_s.p50.max_regress", 'found "1e999"'),
        ({"weights_bytes": {"min_improve": "100%"}}, "gates.weights_bytes.min_improve", "cannot fall by 100 %"),
        ({"decode_tok_per_s.p50": {"max_regress": "100%"}}, "gates.decode_tok_per_s.p50.max_regress", "cannot fall by"),
        ({"weights_bytes": {"max": "4 gigs"}}, "gates.weights_bytes.max", "allowed: a size such as 4GiB"),
        ({3: {"max": 1}}, "gates.3", "allowed: the name of a figure"),
        (["tpot_s.p50"], "gates", "allowed: figures with their conditions"),
    ],
)
def test_a_bad_gate_is_refused_with_its_path(mapping: Any, path: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_gates(mapping, "gates")
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert caught.value.exit_code == Exit.USAGE


def test_beyond_doubling_needs_a_percent_sign() -> None:
    assert parse_gates({"tpot_s.p50": {"max_regress": "300%"}}, "gates")[0].limit == 3.0
    assert parse_gates({"mc.accuracy": {"min": 1}}, "gates")[0].limit == 1.0


def test_gates_are_frozen_and_strict() -> None:
    with pytest.raises(ValidationError, match="extra"):
        Gate.model_validate({"figure": "kld.mean", "condition": "max", "limit": 1, "more": 2})
    with pytest.raises(ValidationError, match="frozen"):
        gate("max", 1).limit = 2  # type: ignore[misc]


@pytest.mark.parametrize("text", ["tpot_s.p50: {max_regress: 3%}\n", "gates:\n  tpot_s.p50: {max_regress: 3%}\n"])
def test_a_gates_file_holds_figures_or_a_gates_section(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ci.yaml"
    path.write_text(text)
    assert load_gates(path) == (gate("max_regress", 0.03),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no gate"),
        (b"gates:\n", "holds no gate"),
        (b"gates: {kld.mean: {max: 1}}\nother: 1\n", "found 'other' beside 'gates'"),
        (b"kld.mean: {max: 1}\nkld.mean: {max: 2}\n", "'kld.mean' stands twice"),
        (b"kld.mean: {max: 1, max: 2}\n", "'max' stands twice"),
        (b"kld.mean: {max: \n", "not valid YAML"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"gates: {kldd.mean: {max: 1}}\n", "ci.yaml: gates.kldd.mean: unknown figure"),
        (b"- kld.mean\n", "allowed: figures with their conditions"),
    ],
)
def test_a_bad_gates_file_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "ci.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_gates(path)
    assert words in str(caught.value)
    assert "ci.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_gates_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such gates file"):
        load_gates(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_gates(tmp_path)
