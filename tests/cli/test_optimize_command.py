"""What `infopt optimize` says of the artifact it made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infopt import __version__, forecast, host
from infopt.artifact import LoadBack, read_artifact
from infopt.cli import app
from infopt.cli.optimize import _checked
from infopt.recipe import Recipe
from infopt.settings import LoadOptions

PLAIN = LoadBack(reader="plain", tokens=64, max_abs_logit_difference=0.5, tolerance=1.0, top1_agreement=0.75)


def run(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["optimize", "tiny", *arguments, "--device", "cpu"])
    assert found.exit_code == 0, found.output
    return found.stdout


def test_every_reader_is_named(tmp_path: Path) -> None:
    lines = run("-r", "int8", "-o", str(tmp_path / "out")).splitlines()
    readers = (f"plain transformers {host.versions()['transformers']}", f"infopt {__version__}")
    assert tuple(check.reader for check in read_artifact(tmp_path / "out").load_back) == readers
    found = [line for line in lines if line.startswith("loaded back by ")]
    assert [line.partition(": logits within ")[0].removeprefix("loaded back by ") for line in found] == list(readers)


def test_a_difference_comes_with_the_share_of_likeliest_tokens_and_a_refusal_with_its_reason() -> None:
    assert _checked(PLAIN) == "loaded back by plain: logits within 0.500, top-1 at 75.0% on 64 tokens"
    rounded = PLAIN.model_copy(update={"top1_agreement": 1.0, "rounded_cache_logit_difference": 0.25})
    assert _checked(rounded) == (
        "loaded back by plain: logits within 0.500 on 64 tokens; within 0.250 with keys and values rounded as the file says"
    )
    refused = LoadBack(
        reader="plain", refusal="too new", tokens=64, max_abs_logit_difference=None, tolerance=0.0, top1_agreement=None
    )
    assert _checked(refused) == "warning: plain does not read it: too new"


@pytest.mark.parametrize(("ignore", "is_idle"), [("['*']", True), ("[lm_head]", False)])
def test_an_artifact_that_nothing_was_done_to_says_so(ignore: str, is_idle: bool, tmp_path: Path) -> None:
    said = run("-r", "rtn_int4", "--set", f"steps.0.rtn.ignore={ignore}", "-o", str(tmp_path / "out"))
    note = "no layer was quantized: the recipe's ignore leaves none"
    assert (f"warning: {note}" in said) == is_idle
    assert (f"**{note}**" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")) == is_idle


def test_a_forecast_counts_imports_that_are_still_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = []
    for imports_s in (0.0, 1000.0):
        monkeypatch.setattr(forecast, "_import_seconds", lambda found=imports_s: found)
        made = forecast.forecast("tiny", Recipe(name="none"), tmp_path / "out", LoadOptions(device="cpu"))
        assert made.seconds is not None
        seconds.append(made.seconds)
    assert 900 < seconds[1] - seconds[0] < 1100


def test_rows_that_calibration_reads_twice_are_told(tmp_path: Path) -> None:
    text = tmp_path / "own.jsonl"
    text.write_text('{"text": "the same text once more and again"}\n' * 400, encoding="utf-8")
    options = ["-r", "gptq_int4", "--set", f"calibration.text={text}", "--set", "calibration.samples=4", "--dry-run"]
    found = CliRunner().invoke(app, ["optimize", "tiny", *options, "--device", "cpu"])
    assert found.exit_code == 0, found.output
    assert re.search(rf"^note: calibration text: of \d+ rows, \d+ repeat others and 0 nearly do \(infopt data check {text}\)$",
                     found.stderr, re.MULTILINE)  # fmt: skip
    assert CliRunner().invoke(app, ["optimize", "tiny", *options, "--device", "cpu", "-q"]).stderr == ""
