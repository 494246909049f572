"""`bench` and `compare` on the tiny model through real worker processes. One run serves many tests: processes cost seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infopt import arms
from infopt.compare import Protocol, compare, compare_stored
from infopt.comparison import Comparison, read_comparison
from infopt.errors import Exit
from infopt.figures import FIGURES
from infopt.gates import parse_gates
from infopt.judgement import Judgement, Verdict
from infopt.process import WorkerProcess
from infopt.result import Run, Sample, read_run, read_samples
from infopt.settings import LoadOptions, QualitySettings, Settings, WorkloadSpec

PAIRS, REQUESTS, NEW, PROMPT = 6, 2, 4, 16
WORKLOAD = WorkloadSpec(prompt_tokens=PROMPT, new_tokens=NEW, requests=REQUESTS)
QUALITY = QualitySettings(fidelity_tokens=2048, choice_items=4, behaviour_prompts=2)
CPU = LoadOptions(device="cpu", threads=1)
INT8 = """
version: 1
name: int8-own
steps: [{int8: {}}]
gates:
  weights_bytes: {min_improve: 40%}
  ppl_ratio: {max: 1.2}
  tpot_s.p50: {max_regress: 3%}
"""
LABELS = ("tiny", "int8-own", "prompt_lookup")


@dataclass(frozen=True)
class Live:
    document: Comparison
    folder: Path
    lines: list[str]
    cache: Path

    def run(self, label: str) -> Run:
        return read_run(self.folder / "arms" / arms.file_name(label))

    def samples(self, label: str) -> list[Sample]:
        return list(read_samples(self.folder / "arms" / arms.file_name(label)))

    def judgement(self, label: str, key: str) -> Judgement:
        (found,) = [each for each in self.document.judgements[label] if each.figure == key]
        return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live-cache")


@pytest.fixture(autouse=True)
def _one_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOPT_CACHE", str(cache))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Live:
    """Three arms and the baseline's twin, six pairs."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "int8.yaml").write_text(INT8, encoding="utf-8")
    specs = arms.parse(["tiny", f"tiny:{folder}/int8.yaml", "tiny:prompt_lookup"])
    settings = Settings(price_per_hour=1.0, objectives={"ttft_s": 60.0}, quality=QUALITY, warmup_cap=3)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFOPT_CACHE", str(cache))
        document, written = compare(
            specs, WORKLOAD, CPU, settings, Protocol(pairs=PAIRS, self_test=True),
            results=folder / "results", progress=lines.append,
        )  # fmt: skip
    return Live(document, written, lines, cache)


# --- What is left ----------------------------------------------------------------------------------------------------


def test_every_arm_is_a_complete_run(live: Live) -> None:
    assert re.fullmatch(r"\d{8}T\d{6}Z-compare-tiny-int8-own-prompt_lookup-[0-9a-f]{6}", live.folder.name)
    assert {path.name for path in live.folder.iterdir()} == {"arms", "compare.json", "report.md", "report.html"}
    assert {path.name for path in (live.folder / "arms").iterdir()} == {"tiny", "tiny-A-A", "int8-own", "prompt_lookup"}
    for label in (*LABELS, "tiny (A/A)"):
        folder = live.folder / "arms" / arms.file_name(label)
        assert {path.name for path in folder.iterdir()} == {"run.json", "samples.jsonl", "report.md"}
        run = live.run(label)
        assert (run.is_complete, run.arm.label, len(run.blocks)) == (True, label, PAIRS)
    assert read_comparison(live.folder) == live.document
    assert live.document.is_complete


def test_blocks_alternate_and_are_shared(live: Live) -> None:
    places = {label: [block.position for block in live.run(label).blocks] for label in (*LABELS, "tiny (A/A)")}
    assert places["tiny"] == [0, 3] * (PAIRS // 2)
    for index in range(PAIRS):
        assert sorted(place[index] for place in places.values()) == [0, 1, 2, 3]
    assert all(place[0] + place[1] == 3 for place in places.values())


def test_samples_are_those_of_the_workload(live: Live) -> None:
    for label in LABELS:
        samples = live.samples(label)
        lines = (live.folder / "arms" / arms.file_name(label) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(samples)
        measured = [sample for sample in samples if not sample.warmup]
        assert [sample.block for sample in measured] == [block for block in range(PAIRS) for _ in range(REQUESTS)]
        assert {(s.arm, s.batch, s.prompt_tokens, s.out_tokens, s.error) for s in measured} == {(label, 1, PROMPT, NEW, None)}
        for sample in measured:
            assert list(sample.emission_s) == sorted(sample.emission_s)
            assert sum(sample.emission_tokens) == sample.out_tokens
            assert sample.tokenize_s is not None
            assert sample.detokenize_s is not None
        assert any(sample.warmup for sample in samples if sample.block == 0)


def test_arms_meet_the_same_prompts(live: Live) -> None:
    assert len({live.run(label).workload_hash for label in (*LABELS, "tiny (A/A)")}) == 1


def test_figures_are_there_or_null_with_a_reason(live: Live) -> None:
    for label in LABELS:
        figures = live.run(label).figures
        names = set(figures) | {key.rpartition(".")[0] for key in figures}
        quality = {name for name, figure in FIGURES.items() if figure.kind == "quality"}
        assert set(FIGURES) - names - quality == set()
        assert quality <= names or label == "tiny"
        for key, value in figures.items():
            assert value.value is not None or value.reason, key
        for key in ("ttft_s.p50", "tpot_s.p50", "throughput_tok_per_s", "load_s", "first_run_s", "usd_per_mtok_output"):
            assert (figures[key].value or 0) > 0, key
        assert figures["goodput_share"].value == 1.0
        assert figures["device_peak_bytes"].value is None
        assert figures["tpot_s.p50"].samples == PAIRS * REQUESTS


def test_bytes_are_those_of_the_files(live: Live) -> None:
    tiny, int8 = (live.run(label).figures["weights_bytes"].value for label in ("tiny", "int8-own"))
    assert tiny == 94528 * 4
    (artifact,) = (live.cache / "artifacts").glob("int8-own-*")
    file = artifact / "model.safetensors"
    assert int8 == file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    longest = PROMPT + NEW
    assert live.run("tiny").figures["kv_bytes"].value == longest * 2 * 2 * 2 * 16 * 2, "float16 in the native engine"


def test_the_runs_tell_what_they_were(live: Live) -> None:
    tiny, int8 = live.run("tiny"), live.run("int8-own")
    assert tiny.arm.reference == "tiny, random weights, seed 0"
    assert int8.arm.reference == "tiny, random weights, seed 0, optimized by int8-own"
    assert (tiny.arm.dtype, tiny.arm.device, tiny.arm.engine) == ("float32", "cpu", "native")
    assert tiny.environment["threads"] == 1
    assert tiny.environment["fingerprint"] == int8.environment["fingerprint"]
    assert tiny.settings["options"]["threads"] == 1
    assert tiny.settings["price_per_hour"] == 1.0
    assert (tiny.workload["prompt_tokens"], tiny.workload["new_tokens"]) == (PROMPT, NEW)


# --- What is judged --------------------------------------------------------------------------------------------------


def test_gates_reach_their_verdicts(live: Live) -> None:
    assert live.judgement("int8-own", "weights_bytes").verdict is Verdict.IMPROVED
    assert live.judgement("int8-own", "ppl_ratio").verdict is Verdict.PASS
    timed = live.judgement("int8-own", "tpot_s.p50")
    assert timed.verdict is not None
    assert timed.pairs == PAIRS
    assert [each.figure for each in live.document.judgements["int8-own"] if each.gate] == [
        "weights_bytes", "ppl_ratio", "tpot_s.p50",
    ]  # fmt: skip
    gated = [each.verdict for found in live.document.judgements.values() for each in found if each.gate]
    assert live.document.exit_code == (Exit.GATE_FAILED if Verdict.FAIL in gated else Exit.OK)
    assert live.document.pairs == PAIRS
    assert live.document.baseline == "tiny"


def test_the_self_test_is_the_baseline_against_itself(live: Live) -> None:
    assert {each.figure for each in live.document.self_test} >= {"tpot_s.p50", "ttft_s.p50"}
    assert all(each.gate is None for each in live.document.self_test)
    noise = live.run("tiny").noise
    assert 0 < noise["tpot_s.p50"] < 5
    assert "tiny (A/A)" not in [arm.label for arm in live.document.arms]


def test_blocks_of_two_arms_are_pairs(live: Live) -> None:
    for arm in live.document.arms:
        assert len(arm.blocks["tpot_s.p50"]) == PAIRS
        assert all(value and value > 0 for value in arm.blocks["tpot_s.p50"])


def test_speculation_does_not_change_what_is_said(live: Live) -> None:
    run = live.run("prompt_lookup")
    assert run.figures["kld.mean"].value == pytest.approx(0, abs=1e-6)
    assert run.figures["behaviour.same_share"].value == 1.0
    measured = [sample for sample in live.samples("prompt_lookup") if not sample.warmup]
    assert all(sample.drafted is not None and 0 <= (sample.accepted or 0) <= sample.drafted for sample in measured)
    for sample in measured:
        assert sample.out_tokens == NEW
        assert len(sample.emission_tokens) <= NEW
    plain = [sample for sample in live.samples("tiny") if not sample.warmup]
    assert {sample.emission_tokens for sample in plain} == {(1,) * NEW}


def test_quality_has_all_three_tiers(live: Live) -> None:
    quality = live.run("int8-own").quality
    assert quality["reference"] == "tiny, random weights, seed 0"
    assert quality["fidelity"]["windows"] * quality["fidelity"]["window_tokens"] == QUALITY.fidelity_tokens
    assert quality["behaviour"]["prompts"] == QUALITY.behaviour_prompts
    assert quality["tasks"]["items"] == QUALITY.choice_items
    figures = live.run("int8-own").figures
    assert 0 < (figures["kld.mean"].value or 0) < 0.1
    ratio = quality["fidelity"]["ppl"] / quality["fidelity"]["ppl_reference"]
    assert figures["ppl_ratio"].value == pytest.approx(ratio, rel=1e-6)
    assert live.run("tiny").quality == {}


def test_its_arms_can_be_compared_again_as_stored_runs(live: Live) -> None:
    folders = [live.folder / "arms" / label for label in ("tiny", "int8-own")]
    document = compare_stored(folders, gates=parse_gates({"weights_bytes": {"min_improve": "40%"}}, "gates"), is_strict=False)
    assert document.judgements["int8-own"][0].verdict is Verdict.IMPROVED
    assert document.exit_code == Exit.OK
    ratio = parse_gates({"ppl_ratio": {"max": 1.2}}, "gates")
    (found, *_) = compare_stored(folders, gates=ratio, is_strict=False).judgements["int8-own"]
    assert found.verdict is Verdict.PASS, "the baseline is the very model that quality was measured against"
    (found, *_) = compare_stored(folders[::-1], gates=ratio, is_strict=False).judgements["tiny"]
    assert found.verdict is Verdict.INCONCLUSIVE


def test_progress_tells_the_story(live: Live) -> None:
    text = "\n".join(live.lines)
    for part in ("applying int8", "int8-own: opening", "round 1: tiny", f"round {PAIRS}: tiny", "int8-own: fidelity"):
        assert part in text
    assert not any("\n" in line for line in live.lines)


# --- Gate mode, and outputs of one token -----------------------------------------------------------------------------


def test_gate_mode_restarts_and_one_token_has_no_tpot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    class Counted(WorkerProcess):
        def __init__(self, name: str, *arguments: Any) -> None:
            started.append(name)
            super().__init__(name, *arguments)

    monkeypatch.setattr("infopt.arm_run.WorkerProcess", Counted)
    gates = parse_gates({"tpot_s.p50": {"max_regress": "90%"}, "tpot_s.p99": {"max": 1000}}, "gates")
    workload = WorkloadSpec(prompt_tokens=4, new_tokens=1, requests=1)
    document, folder = compare(
        arms.parse(["tiny", "tiny"]), workload, CPU, Settings(quality=None, warmup_cap=1),
        Protocol(pairs=2, is_gate_mode=True, gates=gates, is_strict=True), results=tmp_path,
    )  # fmt: skip
    assert sorted(started) == ["tiny", "tiny", "tiny (2)", "tiny (2)"]
    assert [each.verdict for each in document.judgements["tiny (2)"] if each.gate] == [Verdict.INCONCLUSIVE] * 2
    assert document.exit_code == Exit.INCONCLUSIVE
    run = read_run(folder / "arms" / "tiny")
    assert run.figures["tpot_s.p50"].value is None
    assert run.figures["tpot_s.p50"].reason
    assert (run.figures["ttft_s.p50"].value or 0) > 0
    assert any("at least 2 new tokens" in line for line in document.warnings)


# --- Interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code", "reason"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_in_the_middle_loses_nothing(tmp_path: Path, number: int, code: int, reason: str) -> None:
    command = [sys.executable, "-m", "infopt", "bench", "tiny", "--prompt", "16", "--new", "8", "--blocks", "100000"]
    command += ["--threads", "1", "--no-quality"]
    with (tmp_path / "stderr").open("w+", encoding="utf-8") as stderr:
        running = subprocess.Popen(command, cwd=tmp_path, stderr=stderr, stdout=subprocess.PIPE, start_new_session=True)
        samples = first_sample(tmp_path / "results", running)
        if number == signal.SIGINT:
            os.killpg(running.pid, number)  # as a terminal does: to the parent and to its workers
        else:
            running.send_signal(number)
        stdout, _ = running.communicate(timeout=60)
        stderr.seek(0)
        assert running.returncode == code
        assert stdout == b""
        assert [line.partition(":")[0] for line in stderr.read().splitlines()] == ["error", "hint"]
    run = read_run(samples.parent)
    assert (run.is_complete, run.incomplete_reason) == (False, reason)
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 1
    assert {path.name for path in samples.parent.iterdir()} == {"run.json", "samples.jsonl", "report.md"}
    wait_until_gone(running.pid)


def first_sample(results: Path, running: subprocess.Popen[bytes]) -> Path:
    """`samples.jsonl` once it holds a line."""
    while running.poll() is None:
        for path in results.glob("*/samples.jsonl"):
            if path.stat().st_size:
                return path
        time.sleep(0.02)
    raise AssertionError("it ended before its first sample")


def wait_until_gone(group: int) -> None:
    """Until no process of the session is left; the test's own time-out is what fails otherwise."""
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("a worker outlived its parent")
