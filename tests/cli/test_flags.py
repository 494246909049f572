"""Flags that go together, and those that do not: nothing is ignored in silence, nothing is refused after work has begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from infopt.cli import app
from infopt.errors import Exit
from infopt.process import WorkerProcess


@pytest.fixture(autouse=True)
def _scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, and measuring processes that play a script (see fake_worker.py)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setattr(WorkerProcess, "module", "fake_worker")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(message: str, *arguments: Any) -> None:
    result = run(*arguments)
    assert result.exit_code == Exit.USAGE, result.output
    assert message in result.stderr
    assert not Path("results").exists(), "nothing was measured"


def test_a_shape_that_does_not_fit_ends_a_sweep_before_it_begins() -> None:
    refused("the prompt is too long", "bench", "fast", "--prompt", "8,2000", "--blocks", "1")
    assert run("bench", "fast", "--prompt", "8,16", "--blocks", "1").exit_code == 0


def test_objectives_serve_comparisons_too() -> None:
    found = run("compare", "fast", "slow", "--pairs", "2", "--no-quality", "--slo", "tpot_s=0.012", "--json")
    arms = {arm["label"]: arm["figures"]["goodput_share"]["value"] for arm in json.loads(found.stdout)["arms"]}
    assert arms == {"fast": 1.0, "slow": 0.0}


def test_prompts_may_stop_at_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.jsonl").write_text('{"prompt": "hi"}', encoding="utf-8")
    asked: list[Any] = []
    call = WorkerProcess.call

    def watch(self: WorkerProcess, command: str, *rest: Any, **arguments: Any) -> Any:
        asked.extend([arguments["workload"]["ignore_eos"]] if command == "open" else [])
        return call(self, command, *rest, **arguments)

    monkeypatch.setattr(WorkerProcess, "call", watch)
    for flags in ((), ("--stop-at-eos",)):
        assert run("bench", "fast", "-w", "mine.jsonl", "--blocks", "1", *flags).exit_code == 0
        assert run("compare", "fast", "slow", "-w", "mine.jsonl", "--pairs", "1", "--no-quality", *flags).exit_code == 0
    assert asked == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--no-quality", "--text", "mine.txt"), "--text has no effect beside --no-quality"),
        (("--no-quality", "--tasks", "mine.jsonl"), "--tasks has no effect beside --no-quality"),
        (("--utilisation", "0.5"), "--utilisation has no effect without --price-per-hour"),
        (("-w", "mine.jsonl", "--prompt", "8"), "--prompt has no effect beside --workload"),
        (("-w", "mine.jsonl", "--requests", "3"), "--requests has no effect beside --workload"),
        (("--stop-at-eos",), "--stop-at-eos has no effect without --workload"),
        (("-q", "-v"), "--verbose has no effect beside --quiet"),
    ],
)
@pytest.mark.parametrize("command", [("bench", "fast"), ("compare", "fast", "slow")])
def test_flags_that_would_be_ignored_are_refused(command: tuple[str, ...], flags: tuple[str, ...], message: str) -> None:
    for name in ("mine.txt", "mine.jsonl"):
        Path(name).write_text('{"prompt": "hi"}', encoding="utf-8")
    refused(message, *command, *flags)


def test_flags_of_the_other_mode_of_compare_are_refused() -> None:
    refused("--across-versions has no effect on arms that run now", "compare", "fast", "slow", "--across-versions")
    refused("5 pairs at most, but 10 to begin with", "compare", "fast", "slow", "--max-pairs", "5")
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "run.json").write_text("{}", encoding="utf-8")
    for flag in (("--pairs", "3"), ("--gate",), ("--slo", "ttft_s=1"), ("--seed", "1"), ("--no-quality",), ("--allow-leakage",)):
        refused("has no effect on stored results", "compare", "a", "b", *flag)


def test_a_summary_that_cannot_be_written_costs_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "no/such/folder/summary.md")
    for command in (("bench", "fast", "--blocks", "1"), ("compare", "fast", "slow", "--pairs", "1", "--no-quality")):
        found = run(*command, "--json")
        assert found.exit_code == 0
        assert json.loads(found.stdout)["is_complete"]
        assert found.stderr.startswith("warning: no/such/folder/summary.md: No such file or directory")


def test_a_dry_run_refuses_what_the_run_would() -> None:
    Path("taken").mkdir()
    Path("taken", "file").write_text("", encoding="utf-8")
    for flags in ((), ("--dry-run",)):
        refused("taken: exists and is not empty", "optimize", "tiny", "-r", "int8", "-o", "taken", "--device", "cpu", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--resume",), "--resume has no effect beside --dry-run"),
        (("-q", "-v"), "--verbose has no effect beside --quiet"),
    ],
)
def test_a_dry_run_ignores_no_flag(flags: tuple[str, ...], message: str) -> None:
    refused(message, "optimize", "tiny", "-r", "int8", "-o", "out", "--device", "cpu", "--dry-run", *flags)


@pytest.mark.parametrize(("command", "has_hint"), [("bench", True), ("optimize", False)])
def test_only_what_measures_speaks_of_samples(monkeypatch: pytest.MonkeyPatch, command: str, has_hint: bool) -> None:
    def interrupt(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("infopt.arms.spec", interrupt)
    found = run(command, "tiny", "-r", "int8")
    assert found.exit_code == Exit.INTERRUPTED
    assert ("results folder" in found.stderr) == has_hint
