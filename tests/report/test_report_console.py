"""Tables on a terminal: complete at every width, plain where colour is unwanted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from infopt.comparison import Comparison
from infopt.judgement import Verdict
from infopt.report.console import print_comparison, print_run
from infopt.report.tables import arm_columns, verdict_rows
from infopt.result import Run


def shown(result: Run | Comparison, width: int, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    if isinstance(result, Run):
        print_run(result, console, Path("results/x/report.md"))
    else:
        print_comparison(result, console, Path("results/x/report.md"))
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


@pytest.mark.parametrize("width", [100, 160, 200])
def test_comparison_looks_as_it_should(comparison: Comparison, width: int, golden: Any) -> None:
    golden(f"comparison-{width}.txt", shown(comparison, width))


def test_run_looks_as_it_should(run: Run, golden: Any) -> None:
    golden("run-100.txt", shown(run, 100))


@pytest.mark.parametrize("width", [60, 80, 100, 130, 160, 240])
def test_no_arm_cell_is_lost_or_cut_at_any_width(comparison: Comparison, width: int) -> None:
    text = shown(comparison, width)
    assert max(map(len, text.splitlines())) <= width
    for column in arm_columns(comparison):
        title, _, unit = column.title.partition(" (")
        assert title in text
        assert unit in text
        assert all(cell in text for cell in column.cells)


def test_every_judgement_keeps_effect_interval_and_verdict_when_narrow(comparison: Comparison) -> None:
    text = shown(comparison, 80)
    for judgements in comparison.judgements.values():
        for row in verdict_rows(judgements):
            assert row.effect in text
            assert row.interval in text
            assert row.word in text
    assert "smallest visible" not in text
    assert "smallest visible" in shown(comparison, 160)


def test_units_in_headers_survive_markup(comparison: Comparison) -> None:
    assert "(ms)" in shown(comparison, 200)


def test_labels_are_never_markup(comparison: Comparison) -> None:
    arm = comparison.arms[0].model_copy(update={"label": "[red]x[/red]"})
    renamed = comparison.model_copy(update={"arms": (arm, *comparison.arms[1:]), "baseline": "[red]x[/red]"})
    assert "[red]x[/red]" in shown(renamed, 160)


def test_colour_on_a_terminal_only_and_never_with_no_color(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" not in shown(comparison, 100)
    assert "\x1b[1;31mFAIL" in shown(comparison, 100, force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in shown(comparison, 100, force_terminal=True)


def test_order_after_the_tables(comparison: Comparison) -> None:
    text = shown(comparison, 160)
    places = [text.index(word) for word in ("note: ", "warning: ", "reference: SmolLM2", "FAIL: int8", "report: ")]
    assert places == sorted(places)


def test_absent_is_a_dash_never_zero(comparison: Comparison) -> None:
    mbu = next(column for column in arm_columns(comparison) if column.key == "mbu")
    assert mbu.cells[-1] == "–"


def test_an_ungated_judgement_does_not_shout(comparison: Comparison) -> None:
    rows = verdict_rows(comparison.judgements["int8_naive"])
    assert [row.is_gated for row in rows] == [True, True, True, False, False]
    assert {row.word for row in rows if not row.is_gated} == {"better", "worse"}


def test_an_arm_that_died_is_an_error_not_a_verdict(comparison: Comparison) -> None:
    dead = comparison.arms[2].model_copy(update={"figures": {}, "error": "out of memory", "blocks": {}})
    unknown = tuple(
        each.model_copy(update={"verdict": Verdict.INCONCLUSIVE, "note": "out of memory"})
        for each in comparison.judgements["nf4"]
    )
    judged = {"int8": comparison.judgements["int8"], "nf4": unknown}
    text = shown(comparison.model_copy(update={"arms": (*comparison.arms[:2], dead), "judgements": judged}), 160)
    assert "nf4 has no result: out of memory" in text
    assert "ERROR" in text
    assert "INCONCLUSIVE: nf4" not in text
    assert text.count("out of memory") == 1


def test_worst_of_two_gates_on_one_figure_is_shown(comparison: Comparison) -> None:
    first = comparison.judgements["int8"][0]
    worse = first.model_copy(update={"gate": "min_improve 20.0 %", "verdict": Verdict.FAIL})
    twice = comparison.model_copy(update={"judgements": {"int8": (first, worse)}})
    column = next(column for column in arm_columns(twice) if column.verdicts)
    assert column.cells[1] == "FAIL"


def test_incomplete_results_say_so(comparison: Comparison, run: Run) -> None:
    cut = {"is_complete": False, "incomplete_reason": "interrupted"}
    assert "incomplete: interrupted" in shown(run.model_copy(update=cut), 100)
    text = shown(comparison.model_copy(update={**cut, "judgements": {}}), 100)
    assert "incomplete: interrupted" in text
    assert "No gates" not in text
