"""Mixed widths: sensitivities are true KLDs, the choice keeps its budget and is the best there is, the files say so."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stub_techniques import CALIBRATION, chosen

from infopt.calibrate import sensitivity
from infopt.calibrate.sensitivity import Probe, Unit, allot, hull, measure, predicted
from infopt.errors import InputError, RecipeError
from infopt.layers import packing
from infopt.layers.grid import Grid
from infopt.model import checkpoint, load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.protocols import Context
from infopt.techniques.mixed import MixedOptions

CONTEXT = Context(calibration_ids=CALIBRATION)
KINDS = ("tiny", "tiny-qwen2", "tiny-gemma3")


def opened(kind: str = "tiny") -> Bundle:
    return load.load(reference.parse(kind))


def true_kld(changed: Bundle, original: Bundle, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        p = original.model(input_ids=ids).logits.double().log_softmax(-1)
        q = changed.model(input_ids=ids).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sensitivity_is_the_kld_of_the_whole_model(kind: str) -> None:
    bundle, original, windows = opened(kind), opened(kind), CALIBRATION[:2]
    probe = Probe.of(bundle, windows, bundle.device)
    assert probe.kld() == pytest.approx(0, abs=1e-6)
    for index in range(len(probe.blocks)):
        name = f"model.layers.{index}.mlp.down_proj"
        layer = bundle.model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        rounded = packing.pack(layer.weight, Grid(3, 32))[1]
        found = measure(probe, index, {layer: rounded})
        other = opened(kind)
        other.model.get_submodule(name).weight.data = rounded
        assert found == pytest.approx(true_kld(other, original, torch.tensor(windows)), rel=1e-3)
        assert probe.kld() == pytest.approx(0, abs=1e-6), "the layer was put back"


units = st.lists(
    st.tuples(st.lists(st.floats(1e-5, 1), min_size=3, max_size=3), st.integers(1, 9)).map(
        lambda drawn: Unit(("x",), dict(zip((3, 4, 6), drawn[0], strict=True)), {w: w * drawn[1] for w in (3, 4, 6)})
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(units, st.floats(0, 1))
def test_no_choice_within_the_bytes_spent_is_better(found: list[Unit], share: float) -> None:
    low, high = (sum(unit.bytes[w] for unit in found) for w in (3, 6))
    budget = low + share * (high - low)
    allot(found, budget)
    spent, cost = sum(unit.bytes[unit.bits] for unit in found), predicted(found)
    assert spent <= budget
    best = min(
        sum(unit.kld[w] for unit, w in zip(found, widths, strict=True))
        for widths in itertools.product((3, 4, 6), repeat=len(found))
        if sum(unit.bytes[w] for unit, w in zip(found, widths, strict=True)) <= budget
    )
    # Greedy on the hull loses at most the last step that did not fit.
    assert cost <= best + max(unit.kld[3] - min(unit.kld.values()) for unit in found) + 1e-12
    if share == 1:
        assert cost == pytest.approx(best)


@settings(deadline=None)
@given(units, st.floats(0, 2))
def test_a_kld_budget_is_reached_and_no_step_is_wasted(found: list[Unit], limit: float) -> None:
    allot(found, max_kld=limit)
    least = sum(min(unit.kld.values()) for unit in found)
    assert predicted(found) <= max(limit, least) + 1e-12
    for unit in found:
        for narrower in (width for width in unit.kld if width < unit.bits):
            saved = unit.kld[narrower] - unit.kld[unit.bits]
            assert saved > 0, "no bytes are spent to make it worse"


@settings(deadline=None)
@given(units, st.floats(0, 2))
def test_without_its_last_step_a_kld_budget_is_not_reached(found: list[Unit], limit: float) -> None:
    allot(found, max_kld=limit)
    taken = [(gain, i, width) for i, unit in enumerate(found) for gain, width in hull(unit) if width <= unit.bits]
    if taken:
        _, last, reached = min(taken)
        found[last].bits = max((width for _, i, width in taken if i == last and width < reached), default=3)
        assert predicted(found) > limit


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_loads_back_and_says_what_it_chose(
    kind: str, method: str, make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    technique = make("mixed", method=method, group_size=32)
    technique.check(shapes.shapes(reference.parse(kind)), "steps[0].mixed")
    bundle = build(technique, kind)
    save.save(bundle, tmp_path / "out")
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    torch.testing.assert_close(logits(again), logits(bundle), rtol=0, atol=1e-5)

    said = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    held_out = torch.tensor(CALIBRATION[: said["tokens"] // 64])
    assert said["measured_kld"] == pytest.approx(true_kld(bundle, opened(kind), held_out), rel=1e-3)
    stored = checkpoint.read_header(tmp_path / "out" / "model.safetensors")
    for unit in said["units"]:
        for layer in unit["layers"]:
            rows, words = stored[f"{layer}.weight_packed"]["shape"]
            assert words == -(-bundle.model.get_submodule(layer).in_features * unit["bits"] // 32)
            assert rows == bundle.model.get_submodule(layer).out_features
    assert len({unit["bits"] for unit in said["units"]}) > 1, "one width everywhere is no mixture"
    picture = ElementTree.parse(tmp_path / "out" / "sensitivity.svg").getroot()
    assert len(picture.findall(".//{*}title")) == len(said["units"])


def test_layers_that_engines_fuse_share_a_width(make: Callable[..., Any], build: Callable[..., Any]) -> None:
    said = json.loads(build(make("mixed", method="rtn")).files["sensitivity.json"])
    parts = {tuple(name.rpartition(".")[2] for name in unit["layers"]) for unit in said["units"]}
    assert parts == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}


def test_long_windows_are_cut_to_what_is_measured_on(make: Callable[..., Any]) -> None:
    long = tuple(tuple(range(3, 250)) * 3 for _ in range(4))
    held_out, rest = make("mixed")._split(long)
    assert [len(window) for window in held_out] == [512]
    assert rest == long[1:]


def test_spends_no_more_than_the_uniform_width(make: Callable[..., Any], build: Callable[..., Any], tmp_path: Path) -> None:
    save.save(build(make("mixed", method="rtn", average_bits=4.0)), tmp_path / "mixed")
    save.save(build(make("rtn", bits=4)), tmp_path / "uniform")
    assert checkpoint.tensor_bytes(tmp_path / "mixed") <= checkpoint.tensor_bytes(tmp_path / "uniform")


def test_a_quality_budget(make: Callable[..., Any], build: Callable[..., Any]) -> None:
    loose, tight = (
        json.loads(build(make("mixed", method="rtn", average_bits=None, max_kld=k)).files["sensitivity.json"])
        for k in (0.2, 0.02)
    )
    assert tight["predicted_kld"] <= 0.02
    assert tight["bytes"] > loose["bytes"]
    with pytest.raises(InputError, match="max_kld 1e-09 is out of reach"):
        build(make("mixed", method="rtn", average_bits=None, max_kld=1e-9))


def test_budgets_that_make_no_sense_are_refused(make: Callable[..., Any], tiny_bundle: Bundle) -> None:
    for options, told in (
        ({"average_bits": 5.0, "max_kld": 0.1}, "one of the two"),
        ({"average_bits": 7.0}, "lies outside widths 3 … 6"),
        ({"widths": [5, 8]}, "average_bits 4 lies outside widths 5 … 8"),
        ({"widths": [4]}, "at least 2 items"),
    ):
        with pytest.raises(ValidationError, match=told):
            MixedOptions(**options)
    assert MixedOptions(max_kld=0.1).bits == 6
    with pytest.raises(RecipeError, match=r"^steps\[0\]\.mixed: found average_bits and max_kld; allowed: one of the two$"):
        chosen({"mixed": {"average_bits": 5.0, "max_kld": 0.05}})
    with pytest.raises(RecipeError, match="names a width twice"):
        make("mixed", widths=[4, 4, 3]).check(shapes.shapes(reference.parse("tiny")), "steps[0].mixed")
    with pytest.raises(InputError, match="found 1 samples"):
        make("mixed").apply(tiny_bundle, replace(CONTEXT, calibration_ids=CALIBRATION[:1]))


def test_sensitivities_are_not_measured_twice(make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    measured: list[int] = []
    measure = sensitivity.measure
    monkeypatch.setattr(
        sensitivity, "measure", lambda probe, index, *rest: (measured.append(index), measure(probe, index, *rest))[1]
    )
    context = replace(CONTEXT, unfinished=tmp_path / "0-mixed", progress=lines.append)
    stopping = replace(context, progress=lambda line: (lines.append(line), line == "sensitivity, block 2/2" and sys.exit()))
    with pytest.raises(SystemExit):
        make("mixed").apply(opened(), stopping)
    assert lines[-2:] == ["sensitivity, block 1/2", "sensitivity, block 2/2"]
    assert set(measured) == {0}
    measured.clear()
    first = make("mixed").apply(opened(), context)
    assert set(measured) == {1}, "the first block is known"
    assert first.files == make("mixed").apply(opened(), CONTEXT).files
    lines.clear()
    again = make("mixed").apply(opened(), context)
    assert not any(line.startswith(("sensitivity", "block")) for line in lines)
    assert again.files["sensitivity.json"] == first.files["sensitivity.json"]
    assert all(torch.equal(again.packed[n]["weight_packed"], p["weight_packed"]) for n, p in first.packed.items())
