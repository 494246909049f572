"""Stored mode: results folders are judged where machine and method match, and refused where they do not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from infopt import figures
from infopt.arms import is_stored
from infopt.cli import app
from infopt.compare import compare_stored, mismatch
from infopt.comparison import Comparison
from infopt.errors import Exit, InputError, NotComparableError
from infopt.gates import parse_gates
from infopt.judgement import Verdict
from infopt.result import Arm, Block, Run, Sample, Value, dump, read_run

Write = Callable[..., Path]
ENVIRONMENT: dict[str, Any] = {
    "device": "cpu", "driver": None, "cuda": None, "power_cap_w": None, "cpu": "EPYC", "threads": 2, "torch": "2.13",
    "transformers": "5.23", "fingerprint": "f", "os": "Linux 6", "libraries": {},
}  # fmt: skip
GATE = {"tpot_s.p50": {"max_regress": "3%"}}


def value(key: str, number: float) -> dict[str, Value]:
    found, _ = figures.find(key)
    return {key: Value(value=number, unit=found.unit, id=found.id)}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a results folder: five blocks of two requests, 0.1 s to the first token and `tpot` to each next one."""

    def make(
        name: str,
        tpot: float = 0.010,
        *,
        noise: float | None = 0.003,
        gates: Any = None,
        weights: float = 100.0,
        environment: dict[str, Any] | None = None,
        workload_hash: str = "w",
        complete: bool = True,
        **other: Any,
    ) -> Path:
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        blocks = tuple(Block(arm=name, index=i, round=i, position=0, wall_s=1.0) for i in range(5))
        recipe = {"version": 1, "name": name, "gates": gates or {}}
        run = Run(
            id=name, name=name, created_utc="2031-01-01T00:00:00+00:00", is_complete=complete,
            incomplete_reason=None if complete else "interrupted", infopt_version="0",
            arm=Arm(label=name, model="demo", reference="demo", reference_hash="0", recipe=recipe, engine="transformers",
                    dtype="float32", device="cpu"),
            workload={"name": "128+32x1"}, workload_hash=workload_hash, environment=ENVIRONMENT | (environment or {}),
            figures=value("tpot_s.p50", tpot) | value("weights_bytes", weights), blocks=blocks,
            noise={} if noise is None else {"tpot_s.p50": noise}, warnings=(f"{name}: a warning",),
        ).model_copy(update=other)  # fmt: skip
        (folder / "run.json").write_text(dump(run), encoding="utf-8")
        with (folder / "samples.jsonl").open("w", encoding="utf-8") as stream:
            for block in range(5):
                for index in range(2):
                    step = tpot * (1 + 0.001 * block)
                    sample = Sample(
                        arm=name, block=block, index=index, batch=1, prompt_tokens=8, out_tokens=5,
                        emission_s=tuple(0.1 + step * i for i in range(5)), emission_tokens=(1,) * 5,
                    )  # fmt: skip
                    stream.write(sample.model_dump_json() + "\n")
        return folder

    return make


def compared(*folders: Path, gates: Any = None, strict: bool = False, across_versions: bool = False) -> Comparison:
    chosen = None if gates is None else parse_gates(gates, "gates")
    return compare_stored(folders, gates=chosen, is_strict=strict, across_versions=across_versions)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def refused(result: Result, code: Exit, message: str) -> None:
    assert result.exit_code == code, result.stderr
    assert isinstance(result.exception, SystemExit | None)
    error, *hints = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert len(hints) <= 1
    assert result.stdout == ""


# --- Verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tpot", "verdict", "code"),
    [
        (0.0100, Verdict.PASS, Exit.OK),
        (0.0080, Verdict.IMPROVED, Exit.OK),
        (0.0120, Verdict.FAIL, Exit.GATE_FAILED),
        (0.0102, Verdict.PASS, Exit.OK),
        (0.0103, Verdict.INCONCLUSIVE, Exit.OK),
    ],
)
def test_two_runs_are_judged_by_the_baselines_noise(write: Write, tpot: float, verdict: Verdict, code: Exit) -> None:
    document = compared(write("base"), write("new", tpot, noise=None), gates=GATE)
    (found,) = [each for each in document.judgements["new"] if each.gate]
    assert found.verdict is verdict
    assert found.effect == pytest.approx(tpot / 0.010, rel=1e-6)
    assert (document.mode, document.baseline, document.is_complete, document.exit_code) == ("stored", "base", True, code)
    assert [arm.label for arm in document.arms] == ["base", "new"]
    assert document.warnings == ("base: a warning", "new: a warning")


def test_without_a_self_test_only_strict_ends_with_four(write: Write) -> None:
    base, new = write("base", noise=None), write("new", 0.02)
    assert compared(base, new, gates=GATE).exit_code == Exit.OK
    assert compared(base, new, gates=GATE, strict=True).exit_code == Exit.INCONCLUSIVE


def test_gates_come_from_the_candidates_own_recipe_unless_given(write: Write) -> None:
    base, new = write("base", gates={"weights_bytes": {"max": 1}}), write("new", 0.02, gates=GATE)
    gated = [each.figure for each in compared(base, new).judgements["new"] if each.gate]
    assert gated == ["tpot_s.p50"]
    gated = [each.figure for each in compared(base, new, gates={"weights_bytes": {"max": 1}}).judgements["new"] if each.gate]
    assert gated == ["weights_bytes"]


def test_every_result_is_compared_with_the_first(write: Write) -> None:
    document = compared(write("base"), write("same"), write("slow", 0.02), gates=GATE)
    assert {label: found[0].verdict for label, found in document.judgements.items()} == {
        "same": Verdict.PASS,
        "slow": Verdict.FAIL,
    }
    assert document.exit_code == Exit.GATE_FAILED


def test_a_run_is_compared_with_itself_under_another_label(write: Write) -> None:
    base = write("base")
    document = compared(base, base, gates=GATE)
    assert list(document.judgements) == ["base (2)"]
    assert document.judgements["base (2)"][0].verdict is Verdict.PASS


# --- What must match -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [{"cpu": "Xeon"}, {"threads": 1}, {"device": "H200"}, {"driver": "1"}, {"cuda": "13"}, {"power_cap_w": 700.0}],
)
def test_another_machine_is_not_comparable(write: Write, other: dict[str, Any]) -> None:
    base, new = write("base"), write("new", environment=other)
    document = compared(base, new, gates=GATE)
    (found,) = document.judgements["new"]
    (field,) = other
    assert found.verdict is Verdict.NOT_COMPARABLE
    assert str(found.note).startswith(f"{field}: ")
    assert document.exit_code == Exit.NOT_COMPARABLE
    assert compared(base, new, gates=GATE, across_versions=True).exit_code == Exit.NOT_COMPARABLE


def test_another_workload_is_not_comparable(write: Write) -> None:
    document = compared(write("base"), write("new", workload_hash="v"))
    (found,) = document.judgements["new"]
    assert found.verdict is Verdict.NOT_COMPARABLE
    assert "workload" in str(found.note)
    assert document.exit_code == Exit.NOT_COMPARABLE


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_another_version_needs_a_word(write: Write, library: str) -> None:
    base, new = write("base"), write("new", environment={library: "1.0"})
    assert compared(base, new, gates=GATE).exit_code == Exit.NOT_COMPARABLE
    assert compared(base, new, gates=GATE, across_versions=True).exit_code == Exit.OK


def test_what_a_recipe_changes_never_counts(write: Write) -> None:
    base, new = read_run(write("base")), read_run(write("new", gates=GATE))
    other = new.model_copy(
        update={
            "arm": new.arm.model_copy(update={"dtype": "bfloat16", "engine": "vllm", "recipe": {}, "model": "other"}),
            "environment": new.environment | {"os": "Linux 7", "python": "3.14"},
        }
    )
    assert mismatch(base, other, across_versions=False) is None


def test_one_candidate_of_two_that_does_not_match_still_ends_with_five(write: Write) -> None:
    document = compared(write("base"), write("slow", 0.02), write("elsewhere", environment={"cpu": "Xeon"}), gates=GATE)
    assert document.judgements["slow"][0].verdict is Verdict.FAIL
    assert document.exit_code == Exit.NOT_COMPARABLE


def test_what_decides_prompts_and_figures_must_match(write: Write) -> None:
    base = write("base")
    others = {
        "seed": {"settings": {"options": {"seed": 1}}},
        "objectives": {"settings": {"objectives": {"ttft_s": 0.5}}},
        "definition": {"figures": {"tpot_s.p50": Value(value=0.01, unit="s", id="tpot_s.v2")}},
    }
    for name, other in others.items():
        document = compared(base, write(name, **other), gates=GATE)
        (found,) = document.judgements[name]
        assert found.verdict is Verdict.NOT_COMPARABLE
        assert str(found.note).startswith(f"{name}: ")
    assert "tpot_s.v1 against tpot_s.v2" in str(found.note)


# --- Quality ---------------------------------------------------------------------------------------------------------

PPL = {"ppl_ratio": {"max": 1.02}}
BARE = {"speculative": None, "sampling": None, "cache": None, "engine": None}


def judged(write: Write, name: str, quality: dict[str, Any], base: Path | None = None, **run: Any) -> tuple[Verdict | None, str]:
    """Of a run with a perplexity ratio of 1.00 to 1.01."""
    ratio = Value(value=1.005, low=1.0, high=1.01, unit="ratio", id="ppl_ratio.v1")
    known = value("tpot_s.p50", 0.01) | {"ppl_ratio": ratio}
    known_quality = {"reference": "demo", "reference_hash": "0", "reference_way": BARE} | quality
    new = write(name, figures=known, quality=known_quality, **run)
    (found,) = compared(base or write(f"base-of-{name}"), new, gates=PPL, strict=True).judgements[name][:1]
    return found.verdict, str(found.note)


def test_quality_is_judged_where_the_baseline_is_its_reference(write: Write) -> None:
    assert judged(write, "same", {})[0] is Verdict.PASS
    for name, quality, reason in (
        ("other", {"reference_hash": "1"}, "measured against demo, which is not the baseline"),
        ("sampled", {"reference_way": BARE | {"sampling": {"temperature": 1.0}}}, "run in another way"),
        ("old", {"reference_hash": None}, "does not tell which model"),
    ):
        verdict, note = judged(write, name, quality)
        assert verdict is Verdict.INCONCLUSIVE
        assert reason in note


@pytest.mark.parametrize(("tier", "name"), [("fidelity", "text"), ("behaviour", "prompts"), ("tasks", "items")])
def test_quality_on_other_material_is_not_judged(write: Write, tier: str, name: str) -> None:
    base = write("base", quality={tier: {f"{name}_hash": "a"}})
    assert judged(write, "same", {tier: {f"{name}_hash": "a"}}, base)[0] is Verdict.PASS
    verdict, note = judged(write, "other", {tier: {f"{name}_hash": "b"}}, base)
    assert verdict is Verdict.INCONCLUSIVE
    assert name in note


# --- Through the command ---------------------------------------------------------------------------------------------


def test_the_command_prints_one_document(write: Write, tmp_path: Path) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text("tpot_s.p50: {max_regress: 3%}\n", encoding="utf-8")
    result = run(write("base"), write("slow", 0.02), "--gates", gates, "--json", "--junit", tmp_path / "out" / "junit.xml")
    assert result.exit_code == Exit.GATE_FAILED
    document = Comparison.model_validate(json.loads(result.stdout))
    assert document.judgements["slow"][0].verdict is Verdict.FAIL
    assert "<failure" in (tmp_path / "out" / "junit.xml").read_text(encoding="utf-8")


def test_the_command_prints_a_table(write: Write) -> None:
    result = run(write("base"), write("new", gates=GATE))
    assert result.exit_code == Exit.OK
    assert "PASS" in result.stdout
    assert "tpot_s.p50" in result.stdout


def test_a_missing_baseline_ends_with_five(write: Write, tmp_path: Path) -> None:
    new = write("new")
    gone = tmp_path / "results" / "gone"
    refused(run(gone, new), Exit.NOT_COMPARABLE, "no baseline result there")
    refused(run(tmp_path / "ci-cache" / "baseline", new), Exit.NOT_COMPARABLE, "no baseline result there")
    gone.mkdir()
    refused(run(gone, new), Exit.NOT_COMPARABLE, "no baseline result there")


def test_a_missing_candidate_is_bad_input(write: Write, tmp_path: Path) -> None:
    refused(run(write("base"), tmp_path / "results" / "gone"), Exit.USAGE, "no run.json")


def test_an_incomplete_run_is_refused(write: Write) -> None:
    base, cut = write("base"), write("cut", complete=False)
    refused(run(base, cut), Exit.USAGE, "not complete (interrupted)")
    refused(run(cut, base), Exit.USAGE, "not complete (interrupted)")


def test_a_half_written_folder_is_refused(write: Write) -> None:
    base, half = write("base"), write("half")
    (half / "run.json").unlink()
    refused(run(base, half), Exit.USAGE, "half: no run.json")
    refused(run(half, base), Exit.USAGE, "half: no run.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "broken JSON"),
        ('{"schema_version": 1', "broken JSON"),
        ("[]", "schema_version None"),
        ('{"schema_version": 2}', "schema_version 2"),
        ('{"schema_version": 1, "id": 3}', "run.json: id:"),
    ],
)
def test_a_broken_document_is_refused(write: Write, content: str, message: str) -> None:
    base, broken = write("base"), write("broken")
    (broken / "run.json").write_text(content, encoding="utf-8")
    refused(run(base, broken), Exit.USAGE, message)


def test_samples_that_are_gone_or_broken_are_refused(write: Write) -> None:
    base, new = write("base"), write("new")
    samples = (new / "samples.jsonl").read_text(encoding="utf-8")
    (new / "samples.jsonl").write_text("{}\n" + samples, encoding="utf-8")
    refused(run(base, new), Exit.USAGE, "samples.jsonl:1: not a sample")
    (new / "samples.jsonl").unlink()
    refused(run(base, new), Exit.USAGE, "no samples.jsonl")


def test_a_comparison_is_no_run_but_its_arms_are(write: Write) -> None:
    base, new = write("base"), write("new")
    whole = new.parent / "comparison"
    (whole / "arms").mkdir(parents=True)
    (whole / "compare.json").write_text("{}", encoding="utf-8")
    new.rename(whole / "arms" / "new")
    result = run(base, whole)
    refused(result, Exit.USAGE, "a comparison, not a run")
    assert f"{whole}/arms/NAME" in result.stderr
    assert run(base, whole / "arms" / "new").exit_code == Exit.OK


def test_one_result_is_nothing_to_compare(write: Write) -> None:
    refused(run(write("base")), Exit.USAGE, "one result is nothing to compare")


@pytest.mark.parametrize("other", ["demo", "tiny:int8", "org/model:int8"])
def test_results_and_models_are_not_mixed(write: Write, other: str) -> None:
    base = write("base")
    refused(run(base, other), Exit.USAGE, f"base is a stored result and {other} a model")
    refused(run(other, base), Exit.USAGE, f"base is a stored result and {other} a model")


def test_an_artifact_is_a_model_wherever_it_lies(write: Write) -> None:
    base = write("base")
    artifact = base.parent / "int8"
    artifact.mkdir()
    (artifact / "config.json").write_text("{}", encoding="utf-8")
    (artifact / "infopt.json").write_text("{}", encoding="utf-8")
    assert not is_stored([str(artifact), "demo"])
    with pytest.raises(InputError, match=r"is a stored result and .*int8 a model"):
        is_stored([str(base), str(artifact)])


def test_models_are_models() -> None:
    assert not is_stored(["demo", "demo:int8"])
    assert not is_stored(["org/model", "org/model:int8"])
    assert is_stored(["results/a", "results/b"])


def test_a_missing_baseline_raises(write: Write, tmp_path: Path) -> None:
    with pytest.raises(NotComparableError):
        compared(tmp_path / "results" / "gone", write("new"))


def test_it_starts_no_torch(write: Write) -> None:
    heavy = "print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    code = f"import atexit, sys; atexit.register(lambda: {heavy}); from infopt.cli import main; main()"
    arguments = ["compare", str(write("base")), str(write("new", gates=GATE))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
