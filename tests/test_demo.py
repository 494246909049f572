"""The demo on the real model, with one pair and little text: what it promises of quality holds, fast or slow machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import infopt.demo
from infopt.cli import app
from infopt.compare import Protocol
from infopt.comparison import Comparison
from infopt.settings import QualitySettings, WorkloadSpec

ARMS = ("demo:baseline", "demo:baseline", "demo:int8", "demo:int8_naive")


@pytest.fixture(scope="module")
def ran(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """`infopt demo --json` with fewer arms, pairs and tokens."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infopt.demo, "ARMS", ARMS)
        patch.setattr(infopt.demo, "PROTOCOL", Protocol(pairs=1))
        patch.setattr(infopt.demo, "WORKLOAD", WorkloadSpec(prompt_tokens=32, new_tokens=4, requests=1))
        patch.setattr(infopt.demo, "QUALITY", QualitySettings(fidelity_tokens=1536, choice_items=4, behaviour_prompts=1))
        return CliRunner().invoke(app, ["demo", "--json", "--results", str(results)]), results


@pytest.fixture(scope="module")
def found(ran: tuple[Result, Path]) -> Comparison:
    return Comparison.model_validate(json.loads(ran[0].stdout))


def test_a_failed_gate_is_its_lesson_not_its_failure(ran: tuple[Result, Path], found: Comparison) -> None:
    assert ran[0].exit_code == 0
    assert found.exit_code == 3
    assert found.is_complete


def test_the_naive_int8_fails_its_quality_gate(found: Comparison) -> None:
    verdicts = {each.figure: each for each in found.judgements["int8_naive"] if each.gate}
    assert verdicts["ppl_ratio"].verdict == "FAIL"
    assert (verdicts["ppl_ratio"].candidate or 0) > 2


def test_the_honest_int8_keeps_the_model(found: Comparison) -> None:
    ratio = found.arm("int8").figures["ppl_ratio"]
    assert ratio.value is not None
    assert 0.99 < ratio.value <= 1.01
    judged = {each.figure: each for each in found.judgements["int8"] if each.gate}["ppl_ratio"]
    assert judged.verdict == "PASS", judged


def test_the_baseline_against_itself_is_the_same_model(found: Comparison) -> None:
    again = found.arm("baseline (2)").figures
    assert again["kld.mean"].value == 0
    assert again["ppl_ratio"].value == 1
    assert not [each for each in found.judgements["baseline (2)"] if each.verdict == "FAIL" and each.gate]


def test_reports_say_what_was_really_loaded(ran: tuple[Result, Path]) -> None:
    (folder,) = ran[1].iterdir()
    for name in ("report.md", "report.html", "compare.json"):
        assert "dequantized from Q4_1/Q8_0" in (folder / name).read_text(encoding="utf-8")
