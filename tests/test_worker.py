"""The measuring process's commands, answered in this process: workloads, figures, quality, and every kind of error."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from infopt import arms, worker
from infopt.errors import InputError
from infopt.settings import LoadOptions, QualitySettings, WorkloadSpec

OPTIONS = asdict(LoadOptions(device="cpu"))
SHAPE = WorkloadSpec(prompt_tokens=8, new_tokens=3, requests=2)
#: Peaks as an earlier process would have measured them.
MACHINE = {"device": "cpu", "read_bytes_per_s": 1e10, "flops": {"float32": 1e11}, "last_level_cache_bytes": None}
NO_QUALITY = QualitySettings(fidelity_tokens=0, choice_items=0, behaviour_prompts=0)
Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ask() -> Ask:
    """Sends one command to a worker that lives as long as the test; returns all its events."""
    answers = io.StringIO()
    one = worker.Worker(answers)

    def send(command: str, **arguments: Any) -> list[dict[str, Any]]:
        answers.seek(0)
        answers.truncate()
        one.serve(io.StringIO(json.dumps({"command": command, **arguments}) + "\n"))
        return [json.loads(line) for line in answers.getvalue().splitlines()]

    return send


def arm(model: str, recipe: str | None = None, is_artifact: bool = False) -> dict[str, Any]:
    return {**arms.spec(model, recipe).as_dict(), "is_artifact": is_artifact}


def opened(ask: Ask, model: dict[str, Any], workload: WorkloadSpec = SHAPE, machine: Any = MACHINE) -> dict[str, Any]:
    *progress, answer = ask("open", arm=model, options=OPTIONS, workload=asdict(workload), machine=machine)
    assert answer["event"] == "answer", answer
    assert {event["event"] for event in progress} <= {"progress"}
    return dict(answer["value"])


def block(ask: Ask, index: int = 0) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    *events, answer = ask("block", index=index, round=index, position=0, is_first=False, warmup_cap=2, warmup_later=1)
    assert answer["event"] == "answer", answer
    return [event["sample"] for event in events if event["event"] == "sample"], answer["value"]


def error(events: list[dict[str, Any]]) -> dict[str, Any]:
    assert events[-1]["event"] == "error"
    return events[-1]


# --- Measuring -------------------------------------------------------------------------------------------------------


def test_an_arm_is_opened_measured_and_finished(ask: Ask) -> None:
    facts = opened(ask, arm("tiny"), machine=None)
    assert (facts["reference"], facts["device"], facts["dtype"]) == ("tiny, random weights, seed 0", "cpu", "float32")
    assert facts["figures"]["weights_bytes"]["value"] == 94528 * 4
    assert facts["machine"]["read_bytes_per_s"] > 0
    samples, taken = block(ask)
    assert [sample["warmup"] for sample in samples] == [True, False, False]
    assert taken["wall_s"] > 0
    (answer,) = ask("finish", machine=facts["machine"])
    assert answer["value"]["figures"]["kv_bytes"]["value"] == 11 * 2 * 2 * 2 * 16 * 4
    mfu = answer["value"]["figures"]["mfu"]  # null, with the reason, where a busy machine's peak came out too low
    assert (mfu["value"] is None) == (mfu["reason"] is not None)
    assert mfu["value"] is None or 0 < mfu["value"] <= 1


def test_a_peak_measured_before_is_not_measured_again(ask: Ask) -> None:
    assert opened(ask, arm("tiny"))["machine"]["read_bytes_per_s"] == MACHINE["read_bytes_per_s"]


def test_the_users_prompts_are_the_workload(ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two", "max_tokens": 2}\n', encoding="utf-8")
    facts = opened(ask, arm("tiny"), WorkloadSpec(new_tokens=5, prompts_file=str(file)))
    assert facts["workload"]["name"] == "mine"
    samples, _ = block(ask)
    assert [sample["out_tokens"] for sample in samples if not sample["warmup"]] == [5, 2]


def test_weights_that_no_file_holds_are_counted_as_they_are_run(ask: Ask) -> None:
    naive = arm("tiny", "int8_naive")
    *_, prepared = ask("prepare", arm=naive, options=OPTIONS)
    facts = opened(ask, {**naive, "model": prepared["value"]["folder"], "is_artifact": True})
    figures = facts["figures"]
    assert figures["weights_bytes"]["value"] == 94528 * 4
    assert figures["resident_weights_bytes"]["value"] < 0.7 * figures["weights_bytes"]["value"]
    block(ask)
    assert ask("finish", machine=facts["machine"])[-1]["event"] == "answer"


def test_an_arm_that_leaves_the_weights_alone_is_ready(ask: Ask) -> None:
    (answer,) = ask("prepare", arm=arm("tiny", "prompt_lookup"), options=OPTIONS)
    assert answer["value"]["folder"] is None


# --- Quality ---------------------------------------------------------------------------------------------------------


def test_only_the_tiers_that_were_asked_for(ask: Ask) -> None:
    candidates = [arm("tiny", "static_cache")]
    for settings, tiers in (
        (NO_QUALITY, set()),
        (QualitySettings(fidelity_tokens=64, choice_items=0, behaviour_prompts=0), {"fidelity"}),
        (QualitySettings(fidelity_tokens=0, choice_items=2, behaviour_prompts=0), {"tasks"}),
        (QualitySettings(fidelity_tokens=0, choice_items=0, behaviour_prompts=1), {"behaviour"}),
    ):
        events = ask("assess", reference=arm("tiny"), candidates=candidates, options=OPTIONS, settings=asdict(settings))
        (found,) = [event for event in events if event["event"] == "quality"]
        assert found["label"] == "static_cache"
        assert set(found["quality"]) == {"figures", "reference", *tiers}
        assert bool(found["quality"]["figures"]) == bool(tiers)


def test_the_users_files_take_the_place_of_the_bundled_ones(ask: Ask, tmp_path: Path) -> None:
    text, checks = tmp_path / "text.txt", tmp_path / "checks.jsonl"
    text.write_text("A plain text about nothing in particular. " * 20, encoding="utf-8")
    checks.write_text('{"prompt": "one", "max_tokens": 2, "expect": {"contains": "certainly"}}\n', encoding="utf-8")
    settings = QualitySettings(fidelity_tokens=64, choice_items=0, behaviour_prompts=1, text=str(text), prompts_file=str(checks))
    events = ask("assess", reference=arm("tiny"), candidates=[arm("tiny")], options=OPTIONS, settings=asdict(settings))
    (found,) = [event["quality"] for event in events if event["event"] == "quality"]
    assert found["fidelity"]["text"] == str(text)
    assert found["figures"]["kld.mean"]["value"] == pytest.approx(0, abs=1e-9)
    assert (found["behaviour"]["checked"], found["behaviour"]["same"]) == (1, 1)


def test_text_that_an_arm_was_calibrated_on_does_not_judge_it(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infopt.needs import Needs
    from infopt.techniques.int8_naive import Int8Naive

    monkeypatch.setattr(Int8Naive, "needs", Needs(calibration=True))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{number}" for number in range(200)), encoding="utf-8")
    candidate = arms.spec("tiny", "int8_naive", [f"calibration.text={text}", "calibration.samples=1", "calibration.tokens=16"])
    *_, prepared = ask("prepare", arm=candidate.as_dict(), options=OPTIONS)
    ready = {**candidate.as_dict(), "model": prepared["value"]["folder"], "is_artifact": True}
    settings = QualitySettings(fidelity_tokens=64, choice_items=0, behaviour_prompts=0)
    asked = {"reference": arm("tiny"), "candidates": [ready], "options": OPTIONS}
    assert ask("assess", **asked, settings=asdict(settings))[-1]["event"] == "answer"
    found = error(ask("assess", **asked, settings=asdict(replace(settings, text=str(text)))))
    assert "calibration and evaluation text share" in found["message"]


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_a_workload_that_does_not_fit_the_context_is_refused(ask: Ask) -> None:
    for shape in (WorkloadSpec(prompt_tokens=100_000, new_tokens=1), WorkloadSpec(prompt_tokens=8, new_tokens=100_000)):
        found = error(ask("open", arm=arm("tiny"), options=OPTIONS, workload=asdict(shape), machine=MACHINE))
        assert (found["kind"], "context" in found["message"]) == ("InputError", True)


def test_a_batch_that_speculation_cannot_run_is_refused_when_the_arm_opens(ask: Ask) -> None:
    shape = WorkloadSpec(prompt_tokens=8, new_tokens=2, batch=4)
    found = error(ask("open", arm=arm("tiny", "prompt_lookup"), options=OPTIONS, workload=asdict(shape), machine=MACHINE))
    assert found["kind"] == "InputError"
    assert found["hint"] == "use batch 1"


def test_a_refusal_keeps_its_hint_and_the_worker_goes_on(ask: Ask) -> None:
    found = error(ask("open", arm=arm("./gone"), options=OPTIONS, workload=asdict(SHAPE), machine=MACHINE))
    assert (found["kind"], found["message"]) == ("InputError", "./gone: no such file or folder")
    assert found["hint"]
    assert opened(ask, arm("tiny"))


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_what_nobody_foresaw_is_one_line_and_the_traceback_goes_to_the_log(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: Exception, message: str
) -> None:
    def fail(*arguments: Any) -> Any:
        raise raised

    monkeypatch.setattr("infopt.optimize.ensure", fail)
    found = error(ask("prepare", arm=arm("tiny"), options=OPTIONS))
    assert (found["kind"], found["message"]) == ("WorkerError", message)
    assert ("Traceback" in capsys.readouterr().err) == (not isinstance(raised, MemoryError))


def test_an_unknown_command_is_an_error(ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    assert error(ask("explode"))["kind"] == "WorkerError"


def test_numbers_that_json_does_not_know_are_never_sent(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.Worker, "do_prepare", lambda self, **arguments: float("nan"))
    assert error(ask("prepare"))["kind"] == "WorkerError"


def test_a_workload_needs_a_file_that_is_there(tiny_bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        worker.build_workload(WorkloadSpec(prompts_file=str(tmp_path / "gone.jsonl")), tiny_bundle.tokenizer, 512)
