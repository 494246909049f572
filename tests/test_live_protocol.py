"""The protocol of live runs, on scripted workers: order of blocks, shared baseline, restarts, redone blocks, added pairs,
arms that fail, interrupts. Milliseconds instead of models; `test_live.py` does the same with real ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infopt import arms, process
from infopt.bench import bench
from infopt.compare import Protocol, compare
from infopt.comparison import Comparison, read_comparison
from infopt.errors import Exit, InputError, LoadBackError, Terminated, WorkerError
from infopt.gates import parse_gates
from infopt.judgement import Judgement, Verdict
from infopt.process import WorkerProcess
from infopt.result import Run, read_run, read_samples
from infopt.settings import LoadOptions, QualitySettings, Settings, WorkloadSpec

PLAIN = Settings(quality=None)
GATE = {"tpot_s.p50": {"max_regress": "3%"}}


class Counted(WorkerProcess):
    """Counts the processes started under each name."""

    module = "fake_worker"
    started: Counter[str]

    def __init__(self, name: str, *arguments: Any) -> None:
        Counted.started[name] += 1
        super().__init__(name, *arguments)


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    Counted.started = Counter()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(process, "_CLOSE_S", 5.0)
    for module in ("arm_run", "bench", "compare"):
        monkeypatch.setattr(f"infopt.{module}.WorkerProcess", Counted)
    return Counted.started


def run_compare(
    models: str, results: Path, protocol: Protocol | None = None, settings: Settings = PLAIN, gates: Any = None, **named: Any
) -> tuple[Comparison, Path]:
    protocol = protocol or Protocol(pairs=6)
    if gates is not None:
        protocol = replace(protocol, gates=parse_gates(gates, "gates"))
    return compare(arms.parse(models.split()), WorkloadSpec(), LoadOptions(), settings, protocol, results=results, **named)


def run_bench(
    model: str | arms.ArmSpec, results: Path, settings: Settings = PLAIN, blocks: int = 4, **named: Any
) -> tuple[Run, Path]:
    spec = arms.spec(model, None) if isinstance(model, str) else model
    return bench(spec, WorkloadSpec(), LoadOptions(), settings, blocks=blocks, results=results, **named)


def arm(folder: Path, label: str) -> Run:
    return read_run(folder / "arms" / arms.file_name(label))


def only(document: Comparison, label: str, key: str = "tpot_s.p50") -> Judgement:
    (found,) = [each for each in document.judgements[label] if each.figure == key]
    return found


# --- Order -----------------------------------------------------------------------------------------------------------


def test_rounds_alternate_and_candidates_share_the_baselines_block(tmp_path: Path, scripted: Counter[str]) -> None:
    lines: list[str] = []
    document, folder = run_compare("fast a-fast b-fast", tmp_path, progress=lines.append)
    rounds = [line.removeprefix("round ").split(": ") for line in lines if line.startswith("round ")]
    order = [[label for number, label in rounds if number == str(n)] for n in range(1, 7)]
    assert [each[0] for each in order[::2]] == ["fast"] * 3
    assert [each[-1] for each in order[1::2]] == ["fast"] * 3
    assert order[1] == order[0][::-1]
    assert all(sorted(each) == ["a-fast", "b-fast", "fast"] for each in order)
    for label in ("fast", "a-fast", "b-fast"):
        blocks = arm(folder, label).blocks
        assert [block.index for block in blocks] == list(range(6))
        assert [block.position for block in blocks] == [each.index(label) for each in order]
    assert scripted == {"preparing": 1, "fast": 1, "a-fast": 1, "b-fast": 1}, "workers stay up in quick mode"
    assert document.pairs == 6


def test_the_order_of_candidates_depends_on_the_seed_alone(tmp_path: Path) -> None:
    def order(seed: int) -> list[int]:
        specs = arms.parse([*("fast", "a", "b", "c", "d")])
        options = LoadOptions(seed=seed)
        _, folder = compare(specs, WorkloadSpec(), options, PLAIN, Protocol(pairs=1), results=tmp_path / str(seed))
        return [arm(folder, spec.label).blocks[0].position for spec in specs]

    first = order(1)
    assert first == order(1)
    assert first != order(2)


# --- Verdicts --------------------------------------------------------------------------------------------------------


def test_gates_decide_and_the_exit_code_says_so(tmp_path: Path) -> None:
    document, folder = run_compare("fast slow other-fast", tmp_path, gates=GATE)
    assert only(document, "slow").verdict is Verdict.FAIL
    assert only(document, "slow").effect == pytest.approx(1.5, rel=0.01)
    assert only(document, "other-fast").verdict is Verdict.PASS
    assert document.exit_code == Exit.GATE_FAILED
    assert read_comparison(folder) == document
    assert document.baseline == "fast"
    assert (folder / "report.md").stat().st_size > 0
    assert (folder / "report.html").stat().st_size > 0
    assert run_compare("fast other-fast", tmp_path, gates=GATE)[0].exit_code == Exit.OK


def test_pairs_see_through_drift(tmp_path: Path) -> None:
    document, _ = run_compare("drift drift-slow", tmp_path, gates=GATE)
    assert only(document, "drift-slow").verdict is Verdict.FAIL
    assert only(document, "drift-slow").effect == pytest.approx(1.5, rel=0.01)


def test_one_token_outputs_never_pass_a_gate_on_tpot(tmp_path: Path) -> None:
    document, folder = run_compare("one other-one", tmp_path, Protocol(pairs=6, is_strict=True), gates=GATE)
    assert only(document, "other-one").verdict is Verdict.INCONCLUSIVE
    assert document.exit_code == Exit.INCONCLUSIVE
    assert arm(folder, "one").figures["tpot_s.p50"].value is None
    assert any("12 of 12 requests" in line for line in document.warnings)


def test_the_self_test_judges_the_baseline_against_itself(tmp_path: Path) -> None:
    document, folder = run_compare("fast slow", tmp_path, Protocol(pairs=6, self_test=True), gates=GATE)
    assert {each.figure for each in document.self_test} >= {"tpot_s.p50", "ttft_s.p50", "e2e_s.p50"}
    assert all(each.gate is None and each.verdict is not Verdict.FAIL for each in document.self_test)
    assert [each.label for each in document.arms] == ["fast", "slow"]
    noise = arm(folder, "fast").noise
    assert 0 < noise["tpot_s.p50"] < 0.01
    assert {"tpot_s.p95", "throughput_tok_per_s"} <= set(noise)
    assert arm(folder, "slow").noise == {}
    assert arm(folder, "fast (A/A)").is_complete


def test_one_arm_is_nothing_to_compare_unless_with_itself(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to compare"):
        run_compare("fast", tmp_path)
    assert list(tmp_path.iterdir()) == []
    document, _ = run_compare("fast", tmp_path, Protocol(pairs=2, self_test=True))
    assert document.judgements == {}
    assert document.self_test


# --- Gate mode -------------------------------------------------------------------------------------------------------


def test_gate_mode_starts_a_process_per_block(tmp_path: Path, scripted: Counter[str]) -> None:
    _, folder = run_compare("fast slow", tmp_path, Protocol(pairs=3, is_gate_mode=True), gates=GATE)
    assert scripted == {"preparing": 1, "fast": 3, "slow": 3}
    assert arm(folder, "fast").figures["mbu"].samples == 3 * 2, "the requests of every process count"
    assert len({block.energy_j for block in arm(folder, "fast").blocks}) == 3, "three process ids"


def test_gate_mode_redoes_a_block_that_ran_beside_other_load(tmp_path: Path) -> None:
    _, folder = run_compare("fast busy", tmp_path, Protocol(pairs=2, is_gate_mode=True))
    busy = arm(folder, "busy")
    assert [(block.index, block.is_redone, block.flags) for block in busy.blocks] == [(0, True, ()), (1, True, ())]
    stored = [(sample.block, sample.index) for sample in read_samples(folder / "arms" / "busy")]
    assert stored == [(block, index) for block in range(2) for index in range(3)], "the first tries are gone from the file"
    assert not any(block.is_redone for block in arm(folder, "fast").blocks)
    assert busy.figures["mbu"].samples == 2 * 2, "those of the first tries do not"


def test_quick_mode_redoes_a_few_blocks_then_reports_other_load_and_goes_on(tmp_path: Path) -> None:
    document, folder = run_compare("fast busy", tmp_path, Protocol(pairs=6))
    assert [block.is_redone for block in arm(folder, "busy").blocks] == [True] * 4 + [False] * 2
    assert any("busy" in line and "other processes" in line for line in document.warnings)


def test_pairs_are_added_while_a_gate_is_open(tmp_path: Path) -> None:
    tight = {"tpot_s.p50": {"max_regress": "0.01%"}}
    document, _ = run_compare("fast other-fast", tmp_path, Protocol(pairs=6, max_pairs=16), gates=tight)
    assert document.pairs == 16
    assert only(document, "other-fast").verdict is Verdict.INCONCLUSIVE
    document, _ = run_compare("fast slow", tmp_path, Protocol(pairs=8, max_pairs=18), gates=GATE)
    assert document.pairs == 8
    assert only(document, "slow").verdict is Verdict.FAIL


def test_a_look_counts_the_gates_that_are_measured_last(tmp_path: Path) -> None:
    gates = GATE | {"ppl_ratio": {"max": 1.02}, "kld.mean": {"max": 1}, "top1_agreement": {"min": 0.5}}
    protocol, settings = Protocol(pairs=8, max_pairs=13), Settings(quality=QualitySettings())
    document, _ = run_compare("fast slow", tmp_path, protocol, gates=GATE)
    assert document.pairs == 8
    document, _ = run_compare("fast slow", tmp_path, protocol, settings, gates=gates)
    assert document.pairs == 13, "at a quarter of it 8 pairs can decide nothing, and Holm will ask for that"
    assert only(document, "slow").verdict is Verdict.FAIL


def test_workers_start_one_by_one(tmp_path: Path, scripted: Counter[str]) -> None:
    known: dict[str, Counter[str]] = {}
    run_compare("fast slow", tmp_path, Protocol(pairs=1), progress=lambda line: known.setdefault(line, scripted.copy()))
    assert known["fast: opening"] == {"preparing": 1, "fast": 1}
    assert known["slow: opening"] == {"preparing": 1, "fast": 1, "slow": 1}


def test_a_question_that_no_pair_can_settle_adds_none(tmp_path: Path) -> None:
    document, _ = run_compare("one other-one", tmp_path, Protocol(pairs=8, max_pairs=18), gates=GATE)
    assert document.pairs == 8


def test_the_self_test_is_no_question(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("{version: 1, gates: {tpot_s.p50: {max_regress: 0.01%}}}", encoding="utf-8")
    document, _ = run_compare(f"fast:{own} other-fast", tmp_path, Protocol(pairs=8, max_pairs=18, self_test=True))
    assert document.pairs == 8, "the baseline's own gates judge nobody"


# --- Quality ---------------------------------------------------------------------------------------------------------


def test_quality_is_judged_against_the_first_arm(tmp_path: Path) -> None:
    settings = Settings(quality=QualitySettings())
    document, folder = run_compare("fast small slow", tmp_path, settings=settings, gates={"ppl_ratio": {"max": 1.02}})
    for label in ("small", "slow"):
        assert only(document, label, "ppl_ratio").verdict is Verdict.PASS
        assert document.arm(label).quality == {"reference": "fast"}
        assert arm(folder, label).figures["ppl_ratio"].value == 1.0
    assert "ppl_ratio" not in document.arm("fast").figures


@pytest.mark.parametrize("command", [run_compare, run_bench])
def test_quality_that_cannot_be_judged_is_refused_before_anything_is_timed(
    tmp_path: Path, scripted: Counter[str], command: Callable[..., Any]
) -> None:
    arguments = "fast unfit" if command is run_compare else arms.spec("unfit", "prompt_lookup")
    with pytest.raises(InputError, match="vocabularies differ"):
        command(arguments, tmp_path, settings=Settings())
    assert scripted == {"preparing": 1}, "no arm was opened"
    assert list(tmp_path.iterdir()) == []


def test_quality_that_fails_keeps_what_was_measured(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="out of memory"):
        run_compare("fast badly", tmp_path, settings=Settings(quality=QualitySettings()))
    (folder,) = tmp_path.iterdir()
    document = read_comparison(folder)
    assert (document.is_complete, document.incomplete_reason) == (False, "out of memory")
    assert arm(folder, "badly").figures["tpot_s.p50"].value is not None
    assert document.exit_code == Exit.FAILED


# --- Arms that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("broken", "does not reload"),
        ("oom", "out of memory"),
        ("dies", "was killed"),
        ("leaves", "ended with code 3: last words"),
        ("garbage", "which is no event"),
        ("bytes", "which is no event"),
    ],
)
def test_an_arm_that_fails_is_its_result_and_the_others_go_on(tmp_path: Path, model: str, reason: str) -> None:
    document, folder = run_compare(f"fast {model} slow", tmp_path, gates=GATE, settings=Settings(quality=QualitySettings()))
    assert reason in str(document.arm(model).error)
    assert only(document, model).verdict is Verdict.INCONCLUSIVE
    assert only(document, "slow").verdict is Verdict.FAIL
    assert document.pairs == 6
    assert document.exit_code == Exit.FAILED
    assert document.is_complete
    if model in ("dies", "leaves", "garbage", "bytes"):
        failed = arm(folder, model)
        assert not failed.is_complete
        assert [block.index for block in failed.blocks] == [0]
        assert len(list(read_samples(folder / "arms" / model))) == 3 + 2, "the samples of the broken block are there too"


def test_a_baseline_that_fails_ends_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="was killed"):
        run_compare("dies slow", tmp_path)
    (folder,) = tmp_path.iterdir()
    document = read_comparison(folder)
    assert not document.is_complete
    assert "was killed" in str(document.incomplete_reason)
    assert document.exit_code == Exit.FAILED
    assert [(block.index, block.position) for block in arm(folder, "slow").blocks] == [(0, 1), (1, 0)]


@pytest.mark.parametrize("models", ["fast refused", "refused fast"])
def test_a_refused_arm_ends_the_comparison_and_leaves_nothing(tmp_path: Path, models: str) -> None:
    with pytest.raises(InputError, match="the prompt is too long"):
        run_compare(models, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_requests_that_fail_are_counted_and_told(tmp_path: Path) -> None:
    run, _ = run_bench("errs", tmp_path, Settings(quality=None, objectives={"ttft_s": 60.0}))
    assert any("errs: 4 requests failed, the first with IndexError: too long" in line for line in run.warnings)
    assert run.figures["goodput_share"].value == 0.5
    assert run.figures["tpot_s.p50"].samples == 4


# --- Interrupts ------------------------------------------------------------------------------------------------------


def interrupt_in(round: int, error: type[BaseException]) -> Callable[[str], None]:
    def progress(line: str) -> None:
        if line.startswith((f"round {round}: slow", f"slow: block {round}")):
            raise error

    return progress


@pytest.mark.parametrize(("error", "reason"), [(KeyboardInterrupt, "interrupted"), (Terminated, "terminated")])
def test_an_interrupted_comparison_keeps_its_blocks(tmp_path: Path, error: type[BaseException], reason: str) -> None:
    with pytest.raises(error):
        run_compare("fast slow", tmp_path, progress=interrupt_in(3, error))
    (folder,) = tmp_path.iterdir()
    document = read_comparison(folder)
    assert (document.is_complete, document.incomplete_reason, document.judgements) == (False, reason, {})
    for label, blocks in (("fast", 3), ("slow", 2)):
        stored = arm(folder, label)
        assert (stored.is_complete, stored.incomplete_reason, len(stored.blocks)) == (False, reason, blocks)
        assert len(list(read_samples(folder / "arms" / label))) == 3 * blocks


def test_an_interrupt_does_not_wait_for_a_busy_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker sleeps for a minute in its second block; the samples that it sent are kept."""

    class Impatient(Counted):
        def call(self, command: str, on_event: Any = lambda event: None, **arguments: Any) -> Any:
            def watch(event: Any) -> None:
                on_event(event)
                if event.get("sample", {}).get("block") == 1 and event["sample"]["index"] == 1:
                    raise KeyboardInterrupt

            return super().call(command, watch, **arguments)

    monkeypatch.setattr("infopt.arm_run.WorkerProcess", Impatient)
    monkeypatch.setattr(process, "_CLOSE_S", 1000.0)
    with pytest.raises(KeyboardInterrupt):
        run_bench("hangs", tmp_path)
    (folder,) = tmp_path.iterdir()
    run = read_run(folder)
    assert (run.is_complete, run.incomplete_reason, len(run.blocks)) == (False, "interrupted", 1)
    assert [(sample.block, sample.index) for sample in read_samples(folder)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_run_is_called_what_its_folder_is(tmp_path: Path) -> None:
    run, folder = run_bench("fast", tmp_path, blocks=1)
    assert run.id == folder.name
    _, folder = run_compare("fast slow", tmp_path, Protocol(pairs=1))
    assert arm(folder, "slow").id == f"{folder.name}/arms/slow"


def test_results_keep_no_path_that_was_typed_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own, text = tmp_path / "here" / "own.yaml", tmp_path.parent / "elsewhere.txt"
    own.parent.mkdir()
    own.write_text(f"{{version: 1, calibration: {{text: {text}}}, speculative: {{draft: prompt_lookup}}}}", encoding="utf-8")
    settings = Settings(quality=QualitySettings(text=str(text), prompts_file=str(own), choices_file="as/typed.jsonl"))
    spec = arms.spec(str(tmp_path / "here" / "fast"), str(own))
    run, _ = run_bench(spec, Path("results"), settings, blocks=1)
    assert run.arm.model == "here/fast"
    assert run.arm.recipe["calibration"]["text"] == "elsewhere.txt"
    kept = run.settings["quality"]
    assert (kept["text"], kept["prompts_file"], kept["choices_file"]) == ("elsewhere.txt", "here/own.yaml", "as/typed.jsonl")


# --- One arm ---------------------------------------------------------------------------------------------------------


def test_a_bench_is_a_complete_run(tmp_path: Path, scripted: Counter[str]) -> None:
    run, folder = run_bench("slow", tmp_path, Settings(quality=None, price_per_hour=3.6, objectives={"ttft_s": 0.5}))
    assert read_run(folder) == run
    assert (run.is_complete, run.noise, len(run.blocks)) == (True, {}, 4)
    assert run.figures["tpot_s.p50"].value == pytest.approx(0.015, rel=0.01)
    assert run.figures["goodput_share"].value == 1.0
    assert run.figures["usd_per_mtok_output"].value == pytest.approx(3.6 / 3600 * 1e6 * 0.015, rel=0.01)
    assert run.figures["host_rss_peak_bytes"].value == 1000
    assert run.limits["weights_touched_bytes"] == 100
    assert run.figures["kv_bytes"].value == (8 + 5) * 2 * 4
    assert run.settings["options"]["seed"] == 0
    assert scripted == {"preparing": 1, "slow": 1}
    assert sorted(path.name for path in folder.iterdir()) == ["report.md", "run.json", "samples.jsonl"]


def test_a_bench_of_the_model_itself_has_no_quality_to_judge(tmp_path: Path) -> None:
    spec = arms.spec("fast", "baseline")
    run, _ = bench(spec, WorkloadSpec(), LoadOptions(), Settings(), blocks=2, results=tmp_path)
    assert run.quality == {}
    spec = arms.spec("fast", "prompt_lookup")
    run, _ = bench(spec, WorkloadSpec(), LoadOptions(), Settings(), blocks=2, results=tmp_path)
    assert run.quality == {"reference": "fast"}


def test_a_bench_with_a_self_test_knows_its_noise(tmp_path: Path) -> None:
    run, folder = run_bench("fast", tmp_path, self_test=True)
    assert 0 < run.noise["tpot_s.p50"] < 0.01
    assert len(list(read_samples(folder))) == 12
    assert [block.position for block in run.blocks] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("model", "error", "left"),
    [("refused", InputError, 0), ("broken", LoadBackError, 0), ("oom", WorkerError, 1), ("dies", WorkerError, 1)],
)
def test_a_bench_that_fails_keeps_what_it_has(tmp_path: Path, model: str, error: type[Exception], left: int) -> None:
    with pytest.raises(error):
        run_bench(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == left
    for folder in tmp_path.iterdir():
        run = read_run(folder)
        assert not run.is_complete
        assert run.incomplete_reason
        assert len(run.blocks) == (1 if model == "dies" else 0)


def test_samples_are_plain_json_lines(tmp_path: Path) -> None:
    _, folder = run_bench("fast", tmp_path, blocks=1)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["warmup"] for row in rows] == [True, False, False]
    assert {row["arm"] for row in rows} == {"fast"}
