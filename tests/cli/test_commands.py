"""Every command on the tiny model: what it prints for people, and the one JSON document for programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner, Result

from infopt import __version__, recipe, techniques
from infopt.cli import app, shell
from infopt.compare import Protocol
from infopt.comparison import Comparison
from infopt.errors import Exit, InputError
from infopt.process import WorkerProcess
from infopt.result import Run, read_run

CPU = ("--device", "cpu")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring processes that play a script (see fake_worker.py)."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setattr(WorkerProcess, "module", "fake_worker")


def run(*arguments: Any, code: Exit = Exit.OK) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "\x1b" not in result.output or "Usage:" in result.output, "colour in a pipe"  # CI may force it on help texts
    return result


def document(*arguments: Any, code: Exit = Exit.OK) -> Any:
    """The one JSON document that a command prints; NaN and Infinity are refused."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(run(*arguments, "--json", code=code).stdout, parse_constant=refuse)


def commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        found.append((name,))
        found += [(name, inner) for inner in getattr(command, "commands", {})]
    return found


# --- Help and version ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_explains_itself(command: tuple[str, ...], flag: str) -> None:
    text = run(*command, flag).stdout
    assert "Usage:" in text
    assert len(re.sub(r"\W+", " ", text).split()) > 15


def test_every_option_has_a_help_text() -> None:
    for names in commands():
        command = get_command(app)
        for name in names:
            command = command.commands[name]  # type: ignore[attr-defined]
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{' '.join(names)}: {parameter.name}"


def test_no_arguments_is_help() -> None:
    result = CliRunner().invoke(app, [])
    assert "Usage:" in result.output


def test_the_version() -> None:
    assert run("--version").stdout == f"infopt {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "infopt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"infopt {__version__}\n"


# --- Recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_shown_and_checked() -> None:
    names = list(recipe.shipped())
    assert [line.split()[0] for line in run("recipes", "list").stdout.splitlines()] == names
    rows = document("recipes", "list")["recipes"]
    assert [row["name"] for row in rows] == names
    assert all(row["about"] for row in rows)
    assert run("recipes", "show", "int8").stdout == recipe.shipped()["int8"].read_text(encoding="utf-8")
    resolved = yaml.safe_load(run("recipes", "show", "int4_lookup", "--resolved").stdout)
    assert resolved == recipe.load("int4_lookup", techniques.find).as_dict()
    assert run("recipes", "check", "baseline", "int8").stdout == "baseline: ok\nint8: ok\n"
    assert run("recipes", "check", "int8", "--set", "steps.0.int8.activations=none").stdout == "int8: ok\n"


def test_a_need_that_is_absent_is_noted_in_the_doctors_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    ok, note = run("recipes", "check", "quanto_int4").stdout.splitlines()
    assert ok == "quanto_int4: ok"
    assert note.startswith("note: quanto_int4: steps[0].quanto: needs a C++ compiler, and none is on the PATH: e.g. apt-get")
    assert run("recipes", "check", "quanto_int8").stdout == "quanto_int8: ok\n"
    lines = run("doctor").stdout.splitlines()
    (line,) = [line for line in lines if "recipe quanto_int4" in line]
    assert line.startswith("missing")
    assert "needs a C++ compiler" in line
    assert not any("recipe quanto_int8" in line for line in lines)


def test_the_schema_is_one_document() -> None:
    found = json.loads(run("recipes", "schema").stdout)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["properties"]["steps"]["items"]["properties"]["int8"]["description"]


# --- This machine, and models ----------------------------------------------------------------------------------------


def test_the_doctor_finds_what_is_here() -> None:
    text = run("doctor").stdout
    findings = {each["name"]: each for each in document("doctor")["findings"]}
    assert findings["torch"]["level"] == "ok"
    assert findings["device"]["level"] == "ok"
    assert findings["demo model"]["fix"] == "infopt models fetch demo"
    for name in findings:
        assert name in text


def test_inspect_tells_shapes_bytes_and_limits() -> None:
    found = document("inspect", "tiny", "--context", "256", *CPU)
    assert (found["architecture"], found["layers"], found["parameters"]) == ("LlamaForCausalLM", 2, 94528)
    assert found["stored_bytes"] == 94528 * 4
    assert found["kv_bytes_at_context"] == 256 * found["kv_bytes_per_token_16bit"]
    assert found["bytes"]["float32"] == 94528 * 4
    assert found["bytes"]["bfloat16"] == 94528 * 2
    assert found["bytes"]["int4 group 64"] < found["bytes"]["int8"] < found["bytes"]["bfloat16"]
    assert 32 in found["group_sizes"]
    assert found["machine"]["read_bytes_per_s"] > 1e8
    text = run("inspect", "tiny", "--context", "256", *CPU).stdout
    assert "2 layers" in text
    assert "at 256 tokens" in text


def test_models_are_listed_and_shown() -> None:
    assert document("models", "list") == {"schema_version": 1, "models": []}
    shown = document("models", "show", "tiny")
    assert (shown["kind"], shown["architecture"]) == ("tiny", "LlamaForCausalLM")
    assert shown["weights_bytes"] == 94528 * 4
    assert "LlamaForCausalLM" in run("models", "show", "tiny").stdout


# --- Models at work --------------------------------------------------------------------------------------------------


def test_generate_answers_and_sets_two_answers_side_by_side() -> None:
    plain = run("generate", "tiny", "hello", "--tokens", "8", *CPU).stdout
    assert plain.endswith("\n")
    found = document("generate", "tiny", "hello", "--tokens", "8", "--beside", "tiny:prompt_lookup", *CPU)
    first, second = found["answers"]
    assert first["text"] + "\n" == plain
    assert first["output_ids"] == second["output_ids"]
    assert 1 <= len(first["output_ids"]) <= 8
    assert (first["label"], second["label"]) == ("tiny", "prompt_lookup")
    beside = run("generate", "tiny", "hello", "--tokens", "8", "--beside", "tiny:int8_naive", *CPU).stdout.splitlines()
    assert beside[0] == "--- tiny (tiny, random weights, seed 0)"
    assert beside[-1].startswith("--- the same")


def test_generate_takes_a_recipe_and_a_temperature() -> None:
    sampled = document("generate", "tiny", "hello", "-r", "baseline", "--temperature", "5", "--tokens", "12", "--raw", *CPU)
    greedy = document("generate", "tiny", "hello", "--tokens", "12", "--raw", *CPU)
    assert sampled["answers"][0]["output_ids"] != greedy["answers"][0]["output_ids"]


CANDIDATES = ("--set", "sampling.candidates=3", "--temperature", "1", "--tokens", "6", *CPU)


def test_generate_shows_the_chosen_candidate_and_why() -> None:
    asked = ("generate", "tiny:native_exact", "hello", "--set", "sampling.choose=mean_logprob", *CANDIDATES)
    (answer,) = document(*asked)["answers"]
    rows = answer["candidates"]
    levels = [row["mean_logprob"] for row in rows]
    assert (len(rows), answer["chosen"]) == (3, levels.index(max(levels)))
    assert (answer["text"], answer["output_ids"]) == (rows[answer["chosen"]]["text"], rows[answer["chosen"]]["output_ids"])
    text = run(*asked).stdout
    assert text.endswith(f"\n--- candidate {answer['chosen'] + 1} of 3: {answer['why']}\n")
    assert f"{max(levels):.3f} nats per token" in answer["why"]


def test_generate_shows_all_candidates_where_nothing_chooses() -> None:
    (answer,) = document("generate", "tiny", "hello", *CANDIDATES)["answers"]
    assert (answer["chosen"], answer["why"]) == (None, None)
    assert {row["mean_logprob"] for row in answer["candidates"]} == {None}
    text = run("generate", "tiny", "hello", *CANDIDATES).stdout
    assert text == "".join(f"--- candidate {i} of 3\n{row['text']}\n" for i, row in enumerate(answer["candidates"], start=1))


def test_generate_checks_candidates_by_the_users_rules() -> None:
    stock = ("generate", "tiny", "hello", "--set", "engine.name=transformers", *CANDIDATES)
    checked = (*stock, "--set", "sampling.choose=check")
    rows = [row["text"] for row in document(*stock)["answers"][0]["candidates"]]
    (answer,) = document(*checked, "--expect", json.dumps({"contains": rows[2]}))["answers"]
    assert (answer["chosen"], answer["text"]) == (rows.index(rows[2]), rows[2])
    for flags, message in (
        (checked, "the prompt 'prompt' has no rules; choose: check needs some"),
        ((*checked, "--expect", "{"), "--expect: broken JSON"),
        ((*checked, "--expect", '{"is": "x"}'), "--expect: expect: unknown key 'is'"),
        (("generate", "tiny", "hello", "--expect", "{}"), "--expect has no effect without sampling.choose=check"),
        ((*stock, "--set", "sampling.choose=mean_logprob"), "found mean_logprob with engine transformers; allowed with"),
    ):
        result = run(*flags, code=Exit.USAGE)
        assert message in result.stderr
        assert "hint: " in result.stderr


def test_optimize_predicts_then_writes(tmp_path: Path) -> None:
    step = ("--set", "steps.0.rtn.group_size=32")
    forecast = document("optimize", "tiny", "-r", "rtn_int4", *step, "--dry-run", *CPU)
    assert forecast["peak_bytes"] >= forecast["stored_bytes"]
    text = run("optimize", "tiny", "-r", "rtn_int4", *step, "--dry-run", *CPU).stdout
    assert text.count("fits") == 2
    assert list(tmp_path.iterdir()) == []
    made = document("optimize", "tiny", "-r", "rtn_int4", *step, "-o", "art", *CPU)
    assert made == json.loads((tmp_path / "art" / "infopt.json").read_text(encoding="utf-8"))
    text = run("optimize", "tiny", "-r", "int8_naive", *CPU).stdout
    assert "repeated at load" in text
    assert text.splitlines()[-1] == "artifact: tiny-int8_naive"
    assert (tmp_path / "tiny-int8_naive" / "infopt.json").is_file()
    assert run("generate", "art", "hello", "--tokens", "4", *CPU).stdout


def test_progress_goes_to_stderr_and_quiet_is_silent(tmp_path: Path) -> None:
    loud = run("optimize", "tiny", "-r", "int8", "-o", "a", "-v", *CPU)
    assert "applying int8" in loud.stderr
    assert "applying" not in loud.stdout
    for flag in ("-q", None):
        silent = run("optimize", "tiny", "-r", "int8", "-o", f"b{flag}", *([flag] if flag else []), *CPU)
        assert silent.stderr == ""


# --- Measuring, on scripted workers ----------------------------------------------------------------------------------


def test_bench_prints_a_table_or_one_document(scripted: None, tmp_path: Path) -> None:
    text = run("bench", "fast", "--blocks", "2").stdout
    assert "tpot_s" in text
    (folder,) = (tmp_path / "results").iterdir()
    assert str(folder.relative_to(tmp_path)) in text
    found = Run.model_validate(document("bench", "slow", "--blocks", "2", "--slo", "ttft_s=0.5", "--price-per-hour", "2"))
    assert found.figures["goodput_share"].value == 1.0
    assert (found.figures["usd_per_mtok_output"].value or 0) > 0


def test_a_sweep_is_a_run_per_shape(scripted: None, tmp_path: Path) -> None:
    found = document("bench", "fast", "-r", "prompt_lookup", "--blocks", "1", "--batch", "1,4", "--prompt", "8,16")
    assert found["schema_version"] == 1
    assert len(found["runs"]) == 4
    assert [bool(each["quality"]) for each in found["runs"]] == [True, False, False, False], "once is enough"
    assert len(list((tmp_path / "results").iterdir())) == 4


def test_bench_takes_a_prompts_file(scripted: None, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "hi"}\n', encoding="utf-8")
    assert document("bench", "fast", "-w", "mine.jsonl", "--blocks", "1")["is_complete"]


def test_compare_prints_a_table_or_one_document(scripted: None, tmp_path: Path) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text("gates: {tpot_s.p50: {max_regress: 3%}}", encoding="utf-8")
    arguments = ("compare", "fast", "slow", "--pairs", "6", "--gates", gates)
    result = run(*arguments, code=Exit.GATE_FAILED)
    assert "FAIL" in result.stdout
    assert "slow" in result.stdout
    found = Comparison.model_validate(document(*arguments, "--junit", "deep/junit.xml", code=Exit.GATE_FAILED))
    assert found.exit_code == Exit.GATE_FAILED
    assert "<failure" in Path("deep/junit.xml").read_text(encoding="utf-8")
    assert found.pairs == 6


def test_gate_mode_has_its_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    protocols: list[Protocol] = []

    def stop(specs: Any, workload: Any, options: Any, settings: Any, protocol: Protocol, **named: Any) -> Any:
        protocols.append(protocol)
        raise InputError("enough")

    monkeypatch.setattr("infopt.compare.compare", stop)
    for flags in ((), ("--gate",), ("--gate", "--pairs", "2"), ("--gate", "--max-pairs", "40"), ("--pairs", "7", "--self-test")):
        run("compare", "fast", "other", *flags, code=Exit.USAGE)
    assert [(each.pairs, each.max_pairs, each.is_gate_mode) for each in protocols] == [
        (10, None, False), (20, 30, True), (2, None, True), (20, 40, True), (7, None, False),
    ]  # fmt: skip
    assert protocols[-1].self_test


def test_strict_ends_with_four_when_a_gate_stays_open(scripted: None, tmp_path: Path) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text("device_peak_bytes: {max: 1GiB}", encoding="utf-8")
    run("compare", "fast", "slow", "--pairs", "2", "--gates", gates, "--no-quality")
    run("compare", "fast", "slow", "--pairs", "2", "--gates", gates, "--no-quality", "--strict", code=Exit.INCONCLUSIVE)


def test_a_failed_arm_ends_with_one_and_still_prints(scripted: None) -> None:
    result = run("compare", "fast", "dies", "--pairs", "2", "--no-quality", code=Exit.FAILED)
    assert "was killed" in result.stdout


def test_results_of_bench_and_compare_are_listed(scripted: None, tmp_path: Path) -> None:
    run("bench", "fast", "--blocks", "1")
    run("compare", "fast", "slow", "--pairs", "1", "--no-quality")
    listed = document("results", "list")["results"]
    assert sorted(each["kind"] for each in listed) == ["comparison", "run"]
    assert {each["status"] for each in listed} == {"complete"}
    for each in listed:
        assert document("results", "show", each["folder"])["is_complete"]


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [(KeyboardInterrupt, Exit.INTERRUPTED, "interrupted"), ("terminated", Exit.TERMINATED, "terminated")],
)
def test_an_interrupt_is_told_in_one_line(
    scripted: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Any, code: Exit, word: str
) -> None:
    import os
    import signal

    def call(self: WorkerProcess, command: str, *arguments: Any, **named: Any) -> Any:
        if command == "block" and named["index"] == 1:
            if error == "terminated":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise error
        return original(self, command, *arguments, **named)

    original = WorkerProcess.call
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(WorkerProcess, "call", call)
    result = run("bench", "fast", "--blocks", "3", code=code)
    assert result.stderr.splitlines() == [
        f"error: {word}",
        "hint: what was measured before is in the results folder, marked incomplete",
    ]
    (folder,) = (tmp_path / "results").iterdir()
    assert (read_run(folder).is_complete, read_run(folder).incomplete_reason) == (False, word)
    assert signal.getsignal(signal.SIGTERM) is before


# --- What every command shares ---------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "/results/run.json")

    monkeypatch.setattr("infopt.recipe.shipped", full)
    result = run("recipes", "list", code=Exit.FAILED)
    assert result.stderr.splitlines() == ["error: /results/run.json: No space left on device", "hint: free some space"]


def test_a_command_runs_outside_of_the_main_thread_too() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(run("recipes", "show", "baseline").stdout))
    thread.start()
    thread.join()
    assert found == [recipe.shipped()["baseline"].read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", ["mps", "cuda"])
def test_the_doctor_names_the_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: name == "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: name == "mps")
    (found,) = [each for each in document("doctor")["findings"] if each["name"] == "device"]
    assert (found["level"], found["text"]) == (
        ("ok", "H200") if name == "cuda" else ("untested", "Apple GPU (MPS); infopt uses the CPU")
    )


def test_the_doctor_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        if name == "bitsandbytes":
            raise metadata.PackageNotFoundError(name)
        return original(name)

    original = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    (found,) = [each for each in document("doctor")["findings"] if each["name"] == "bitsandbytes"]
    assert found["level"] == "missing"
    assert found["fix"].endswith("-m pip install bitsandbytes")


def test_progress_is_one_moving_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with shell.reporting(quiet=False, verbose=False) as progress:
        progress("reading [bold]weights[/bold]")
    assert capsys.readouterr().out == ""


def test_the_demo_forgives_a_failed_gate_unless_asked(scripted: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from infopt import arms
    from infopt import demo as use_case
    from infopt.compare import Protocol, compare
    from infopt.gates import parse_gates
    from infopt.settings import LoadOptions, Settings, WorkloadSpec

    gates = parse_gates({"tpot_s.p50": {"max_regress": "3%"}}, "gates")

    def short(specs: Any, options: LoadOptions, *, results: Path, progress: Any) -> Any:
        protocol = Protocol(pairs=6, gates=gates)
        return compare(arms.parse(["fast", "slow"]), WorkloadSpec(), options, Settings(quality=None), protocol, results=results)

    monkeypatch.setattr(use_case, "demo", short)
    text = run("demo").stdout
    assert "FAIL" in text
    assert "report.html" in text
    run("demo", "--strict-gates", code=Exit.GATE_FAILED)
    assert document("demo")["exit_code"] == Exit.GATE_FAILED
