"""Bad input ends in one line of error, a hint, and the right exit code: no traceback, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import EllipsisType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from infopt.cli import app
from infopt.errors import Exit

INFOPT = Path(sys.executable).with_name("infopt")
EXAMPLE = Path(__file__).parents[2] / "results" / "examples" / "demo"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, message: str, code: Exit = Exit.USAGE, hint: str | EllipsisType | None = "") -> None:
    """`hint`: what the hint holds; None: there is none; `...`: there may be one."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert result.stdout == ""
    error, *rest = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert [line.partition(": ")[0] for line in rest] in ([], ["hint"])
    if hint is not ...:
        assert bool(rest) == (hint is not None)
        assert (hint or "") in "".join(rest)


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def nothing_but(*names: str) -> bool:
    return sorted(path.name for path in Path().iterdir()) == sorted(names)


# --- Recipes ---------------------------------------------------------------------------------------------------------

RECIPES = {
    "{version: 1, stepz: []}": ("stepz: unknown key 'stepz'; did you mean 'steps'?", "schema"),
    "{version: 1, steps: [{rtn: {bit: 4}}]}": ("steps[0].rtn.bit: unknown key 'bit'; did you mean 'bits'?", None),
    "{version: 1, steps: [{rtn: {bits: four}}]}": ('steps[0].rtn.bits: found "four"; allowed: 2, 3, 4, 8', None),
    "{version: 1, steps: [rtm]}": ("steps[0]: unknown technique 'rtm'; did you mean 'rtn'?", "infopt recipes list"),
    "{version: 1, engine: {name: vlm}}": ("engine.name: unknown engine 'vlm'", None),
    "{version: 1, gates: {tpot.p50: {max: 1}}}": ("gates.tpot.p50: unknown figure 'tpot.p50'", ""),
    "steps: [": ("own.yaml: not valid YAML", None),
    "[]": ("own.yaml: found []; allowed: a mapping", "infopt recipes show baseline"),
}
COMMANDS = {
    "optimize": ("optimize", "tiny", "-r", "own.yaml", "-o", "out"),
    "dry-run": ("optimize", "tiny", "-r", "own.yaml", "-o", "out", "--dry-run"),
    "bench": ("bench", "tiny", "-r", "own.yaml"),
    "compare": ("compare", "tiny", "tiny:own.yaml"),
    "generate": ("generate", "tiny", "hello", "-r", "own.yaml"),
    "check": ("recipes", "check", "own.yaml"),
}


@pytest.mark.parametrize("text", RECIPES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_recipe_that_is_wrong_is_refused_by_every_command(command: str, text: str) -> None:
    write("own.yaml", text)
    message, hint = RECIPES[text]
    refused(run(*COMMANDS[command]), message, hint=hint)
    assert nothing_but("own.yaml")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_recipe_that_is_not_there(command: str) -> None:
    refused(run(*COMMANDS[command]), "own.yaml: no such recipe file", hint="infopt recipes list")
    assert nothing_but()


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "check"])  # which notes it
def test_a_recipe_whose_need_is_absent(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("no-programs").mkdir()
    monkeypatch.setenv("PATH", "no-programs")
    monkeypatch.delenv("CXX", raising=False)
    write("own.yaml", "{version: 1, steps: [{quanto: {weights: int4}}]}")
    refused(run(*COMMANDS[command]), "steps[0].quanto: needs a C++ compiler, and none is on the PATH", hint="infopt doctor")
    assert nothing_but("own.yaml", "no-programs")


def test_a_group_size_that_does_not_divide() -> None:
    write("own.yaml", "{version: 1, steps: [{rtn: {group_size: 100}}]}")
    refused(run(*COMMANDS["optimize"]), "steps[0].rtn.group_size: found 100, which does not divide the ", hint=None)
    assert nothing_but("own.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.0.rtn.bit=8", "steps[0].rtn.bit: unknown key"),
        ("steps.7.rtn.bits=8", "no such step; the recipe has 1"),
        ("nonsense", "allowed: path=value"),
        ("engine.dtype=int8", "engine.dtype: found"),
    ],
)
def test_an_override_that_leads_nowhere(override: str, message: str) -> None:
    refused(run("optimize", "tiny", "-r", "rtn_int4", "-o", "out", "--set", override), message, hint=...)
    assert nothing_but()


def test_optimize_needs_a_recipe() -> None:
    refused(run("optimize", "tiny"), "optimize needs a recipe", hint="infopt recipes list")


@pytest.mark.parametrize("command", [("bench", "tiny"), ("compare", "tiny", "tiny:int8"), ("generate", "tiny", "hi")])
def test_a_dtype_that_is_none(command: tuple[str, ...]) -> None:
    refused(run(*command, "--dtype", "fp7"), 'engine.dtype: found "fp7"; allowed: auto, float32, bfloat16, float16', hint=None)


# --- Models ----------------------------------------------------------------------------------------------------------


def damaged(tiny_folder: Path, how: str) -> str:
    """A copy of the tiny model that something happened to; its path."""
    folder = Path("model")
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "corrupt":
        weights.write_bytes(b"\xff" * 64 + data[64:])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "gone":
        weights.unlink()
    elif how == "config":
        (folder / "config.json").write_text("{", encoding="utf-8")
    elif how == "pickle":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"x")
    return str(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors"),
        ("corrupt", "model.safetensors"),
        ("empty", "model.safetensors"),
        ("gone", "model"),
        ("config", "config.json"),
        ("pickle", "pytorch_model.bin"),
    ],
)
def test_a_damaged_model_is_refused(tiny_folder: Path, how: str, message: str) -> None:
    model = damaged(tiny_folder, how)
    for command in (("inspect", model), ("optimize", model, "-r", "int8", "-o", "out"), ("generate", model, "hi")):
        refused(run(*command), message)
    assert nothing_but("model")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not a gguf at all"])
def test_a_damaged_gguf_is_refused(content: bytes) -> None:
    Path("model.gguf").write_bytes(content)
    for command in (("inspect", "model.gguf"), ("optimize", "model.gguf", "-r", "int8", "-o", "out")):
        refused(run(*command), "model.gguf")
    assert nothing_but("model.gguf")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./gone", "./gone: no such file or folder"),
        ("gone.gguf", "gone.gguf: no such file or folder"),
        ("tinny", "unknown model 'tinny'; did you mean 'tiny"),
        ("", "an empty model reference"),
        ("tiny+./gone", "gone"),
    ],
)
def test_a_model_that_is_not_there(model: str, message: str) -> None:
    refused(run("inspect", model), message)
    refused(run("optimize", model, "-r", "int8", "-o", "out"), message)
    assert nothing_but()


def test_a_result_is_no_model() -> None:
    Path("result").mkdir()
    write("result/run.json", "{}")
    refused(run("inspect", "result"), "a results folder, not a model", hint="infopt compare takes results")


def test_an_output_folder_in_use_is_refused_and_kept() -> None:
    Path("out").mkdir()
    write("out/mine", "precious")
    refused(run("optimize", "tiny", "-r", "int8", "-o", "out"), "out: exists and is not empty", hint="choose a new folder")
    assert Path("out/mine").read_text(encoding="utf-8") == "precious"


def test_an_artifact_that_is_cut_off_is_refused(tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, "artifact")
    write("artifact/infopt.json", '{"schema_version": 1')
    write("artifact/recipe.yaml", "{version: 1, steps: [int8]}")
    refused(run("generate", "artifact", "hi"), "infopt.json: broken JSON", hint="")


# --- Flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "0"), "--prompt '0': allowed: whole numbers of 1 or more"),
        (("--prompt", "1,x"), "--prompt '1,x': allowed: whole numbers"),
        (("--batch", "1,,2"), "--batch '1,,2': allowed: whole numbers"),
        (("--slo", "ttft_s"), "--slo 'ttft_s': allowed: FIGURE=SECONDS"),
        (("--slo", "ttft_s=fast"), "--slo 'ttft_s=fast': allowed: FIGURE=SECONDS"),
        (("--slo", "ttft_s=nan"), "--slo 'ttft_s=nan': allowed: FIGURE=SECONDS"),
        (("--slo", "ttft_s=-1"), "--slo 'ttft_s=-1': allowed: FIGURE=SECONDS"),
        (("--slo", "ttf_s=1"), "unknown objective 'ttf_s'; did you mean 'ttft_s'?"),
        (("--slo", "mbu=1"), "unknown objective 'mbu'"),
        (("--price-per-hour", "-1"), "price per hour is -1.0"),
        (("--price-per-hour", "inf"), "price per hour is inf"),
        (("--price-per-hour", "1", "--utilisation", "0"), "utilisation is 0.0"),
        (("--price-per-hour", "1", "--utilisation", "1.5"), "utilisation is 1.5"),
        (("--workload", "gone.jsonl"), "gone.jsonl"),
        (("--tasks", "gone.jsonl"), "gone.jsonl"),
        (("--checks", "gone.jsonl"), "gone.jsonl"),
        (("--text", "gone.txt"), "gone.txt"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_runs(flags: tuple[str, ...], message: str) -> None:
    refused(run("bench", "tiny", *flags), message, hint=...)
    assert nothing_but()


@pytest.mark.parametrize(
    "flags",
    [
        ("--new", "0"),
        ("--blocks", "0"),
        ("--requests", "x"),
        ("--threads", "0"),
        ("--threads", "99999"),
        ("--no-such-flag",),
        ("--seed", "a"),
    ],
)
def test_what_typer_refuses_is_a_mistake_in_usage(flags: tuple[str, ...]) -> None:
    assert run("bench", "tiny", *flags).exit_code == Exit.USAGE
    assert nothing_but()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompts.jsonl"),
        ("\n\n", "prompts.jsonl"),
        ("{", "prompts.jsonl:1"),
        ('{"prompt": 3}', "prompts.jsonl:1"),
        ('{"prompt": "hi"}\n{"promt": "hi"}', "prompts.jsonl:2"),
    ],
)
@pytest.mark.parametrize("flag", ["--workload", "--checks"])
def test_a_prompts_file_that_is_no_good(flag: str, text: str, message: str) -> None:
    write("prompts.jsonl", text)
    for command in (("bench", "tiny"), ("compare", "tiny", "tiny:prompt_lookup")):
        refused(run(*command, flag, "prompts.jsonl"), message, hint=...)
    assert nothing_but("prompts.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpot_s.p5: {max: 1}", "unknown figure 'tpot_s.p5'; did you mean 'tpot_s.p"),
        ("tpot_s.p50: {max_regres: 3%}", "unknown condition 'max_regres'; did you mean 'max_regress'?"),
        ("tpot_s.p50: 3%", "found "),
        ("", "holds no gate"),
        ("tpot_s.p50: [", "not valid YAML"),
    ],
)
def test_gates_that_are_no_gates(text: str, message: str) -> None:
    write("gates.yaml", text)
    refused(run("compare", "tiny", "tiny:int8", "--gates", "gates.yaml"), message, hint=...)
    assert nothing_but("gates.yaml")


def test_a_gates_file_that_is_not_there() -> None:
    refused(run("compare", "tiny", "tiny:int8", "--gates", "gone.yaml"), "gone.yaml: no such gates file", hint=None)


def test_one_arm_is_nothing_to_compare() -> None:
    refused(run("compare", "tiny"), "one arm is nothing to compare", hint="infopt compare demo demo:int8")
    assert nothing_but()


def test_a_device_that_is_not_there() -> None:
    for command in (("inspect", "tiny"), ("optimize", "tiny", "-r", "int8", "-o", "out"), ("generate", "tiny", "hi")):
        refused(run(*command, "--device", "tpu"), "tpu")
    assert nothing_but()


def test_an_empty_prompt() -> None:
    refused(run("generate", "tiny", "  "), "the prompt is empty")


def test_a_prompt_longer_than_the_context() -> None:
    refused(run("generate", "tiny", "word " * 5000), "the model's context allows 2048", hint="shorten the prompt")
    refused(
        run("bench", "tiny", "--prompt", "5000", "--no-quality"), "the model's context allows 2048", hint="shorten the prompt"
    )
    assert nothing_but()


# --- Results ---------------------------------------------------------------------------------------------------------


def test_a_half_written_result_is_named_as_such() -> None:
    Path("results/half").mkdir(parents=True)
    write("results/half/samples.jsonl", "")
    for command in (("results", "show"), ("results", "export", "--to", "html")):
        refused(run(*command, "results/half"), "results/half: half-written, samples but no run.json", hint="again")
    refused(run("compare", "results/half", "results/half"), "results/half: no run.json, so this is not a finished result")
    assert [path.name for path in Path("results/half").iterdir()] == ["samples.jsonl"]


def test_results_and_models_are_not_mixed(tiny_folder: Path) -> None:
    Path("results/one").mkdir(parents=True)
    write("results/one/run.json", "{}")
    refused(run("compare", "results/one", tiny_folder), "results/one is a stored result and ", hint="bench the model first")


def test_an_export_that_there_is_none_of() -> None:
    refused(run("results", "export", EXAMPLE, "--to", "htm"), "unknown format 'htm'; did you mean 'html'?")
    assert nothing_but()


# --- Files that cannot be written ------------------------------------------------------------------------------------


def test_a_file_in_the_way_of_the_artifact() -> None:
    write("file", "")
    refused(run("optimize", "tiny", "-r", "int8", "-o", "file"), "file: exists and is a file")
    refused(run("optimize", "tiny", "-r", "int8", "-o", "file/out"), "file/out: cannot be written", Exit.FAILED)
    assert nothing_but("file")


@pytest.mark.parametrize("command", [("bench", "tiny"), ("compare", "tiny", "tiny:prompt_lookup")])
@pytest.mark.parametrize("results", ["file", "file/results"])
def test_a_file_in_the_way_of_the_results_is_told_before_anything_is_measured(command: tuple[str, ...], results: str) -> None:
    write("file", "")
    refused(run(*command, "--results", results), f"{results}: results cannot be written there", hint="--results FOLDER")


def test_a_file_in_the_way_of_the_verdicts_is_told_before_anything_is_measured() -> None:
    write("file", "")
    refused(run("compare", "tiny", "tiny:int8", "--junit", "file/junit.xml"), "file: File exists", Exit.FAILED, "another file")
    assert nothing_but("file")


# --- The installed program -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optimize", "tiny", "-r", "own.yaml"), "steps[0].rtn.bit: unknown key 'bit'; did you mean 'bits'?"),
        (("compare", "results/gone", "results/also"), "results/gone: no baseline result there"),
        (("models", "show", "./gone"), "./gone: no such file or folder"),
        (("results", "show", "gone"), "gone: no such folder"),
    ],
)
def test_the_installed_program_ends_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    write("own.yaml", "{version: 1, steps: [{rtn: {bit: 4}}]}")
    done = subprocess.run([INFOPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == (Exit.NOT_COMPARABLE if arguments[0] == "compare" else Exit.USAGE)
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == f"error: {message}"
    assert len(done.stderr.splitlines()) <= 2


def test_a_reader_that_leaves_is_no_traceback() -> None:
    """`infopt recipes schema | head -1`."""
    code = f"{INFOPT} recipes schema | head -1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "{"
    assert done.stderr == ""


def test_a_refusal_with_json_prints_no_half_document() -> None:
    refused(run("optimize", "tiny", "-r", "gone", "--json"), "unknown recipe 'gone'", hint="infopt recipes list")
