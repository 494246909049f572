"""The measuring process's commands, answered in this process: workloads, figures, quality, and every kind of error."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from infopt import arms, assess, worker
from infopt.errors import InputError
from infopt.model import load, reference
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
    (answer,) = ask("finish")
    assert answer["value"]["figures"]["host_rss_peak_bytes"]["value"] > 0
    assert answer["value"]["figures"]["candidates_cost_ratio"]["reason"] == "the recipe draws 1 candidate"
    traffic = facts["traffic"]
    assert (traffic["weights_bytes"], traffic["kv_element_bytes"], traffic["dtype"]) == (94208 * 4, 2, "float32"), (
        "norms left out"
    )
    assert facts["engine"] == "native"
    assert facts["notes"][0].startswith("native engine: whole steps, ")


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_candidates_are_weighed_against_one(ask: Ask, engine: str) -> None:
    sets = ["sampling.temperature=1.0", "sampling.candidates=3", "sampling.choose=majority", f"engine.name={engine}"]
    opened(ask, arms.spec("tiny", "baseline", sets).as_dict())
    samples, _ = block(ask)
    assert {sample["batch"] for sample in samples} == {3}
    found = ask("finish")[-1]["value"]["figures"]["candidates_cost_ratio"]
    assert (found["samples"], found["reason"]) == (SHAPE.requests, None)
    assert found["value"] > 0


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
    assert facts["traffic"]["dtype"] == "int8", "what it multiplies in"
    block(ask)
    assert ask("finish")[-1]["event"] == "answer"


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
        assert set(found["quality"]) == {"figures", "failed", "reference", "reference_hash", "reference_way", *tiers}
        assert bool(found["quality"]["figures"]) == bool(tiers)


def test_the_users_files_take_the_place_of_the_bundled_ones(ask: Ask, tmp_path: Path) -> None:
    text, checks = tmp_path / "text.txt", tmp_path / "checks.jsonl"
    text.write_text("A plain text about nothing in particular. " * 20, encoding="utf-8")
    checks.write_text('{"prompt": "one", "max_tokens": 2, "expect": {"contains": "certainly"}}\n', encoding="utf-8")
    settings = QualitySettings(fidelity_tokens=64, choice_items=0, behaviour_prompts=1, text=str(text), prompts_file=str(checks))
    events = ask("assess", reference=arm("tiny"), candidates=[arm("tiny")], options=OPTIONS, settings=asdict(settings))
    (found,) = [event["quality"] for event in events if event["event"] == "quality"]
    assert found["fidelity"]["text"] == "text.txt"
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
    own = asdict(replace(settings, text=str(text)))
    assert "calibration and evaluation text share" in error(ask("check_quality", **asked, settings=own))["message"]
    *_, event, answer = ask("assess", **asked, settings=own)
    assert answer["event"] == "answer"
    assert "calibration and evaluation text share" in event["quality"]["failed"]["fidelity"]


def other_vocabulary(folder: Path) -> str:
    """A tiny model of another vocabulary, saved."""
    from infopt.model import save, tiny
    from infopt.model.bundle import Bundle

    model, tokenizer = tiny.make()
    model.resize_token_embeddings(model.config.vocab_size + 3)  # type: ignore[attr-defined]
    save.save(Bundle(model, tokenizer, "other"), folder)
    return str(folder)


def test_quality_that_cannot_be_judged_is_refused_before_any_weight_is_read(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infopt.pipeline.open_arm", lambda *arguments: pytest.fail("a model was opened"))
    empty, long = tmp_path / "one.txt", tmp_path / "long.jsonl"
    empty.write_text("x", encoding="utf-8")
    long.write_text(json.dumps({"prompt": "word " * 2000}) + "\n", encoding="utf-8")
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"question": "word " * 2000, "choices": ["a", "b"], "answer": 0}) + "\n", encoding="utf-8")
    default = QualitySettings(choice_items=2, behaviour_prompts=2)
    other = other_vocabulary(tmp_path / "other")
    assert ask("check_quality", reference=arm("tiny"), candidates=[arm("tiny")], options=OPTIONS, settings=asdict(default)) == [
        {"event": "answer", "value": None}
    ]
    for model, settings, message in (
        (other, default, "vocabularies differ"),
        ("tiny", replace(default, text=str(empty)), "a window needs 2 tokens"),
        ("tiny", replace(default, prompts_file=str(long)), "the model's context is"),
        ("tiny", replace(default, choices_file=str(items)), "the model's context is"),
    ):
        asked = {"reference": arm("tiny"), "candidates": [arm(model)], "options": OPTIONS, "settings": asdict(settings)}
        found = error(ask("check_quality", **asked))
        assert (found["kind"], message in found["message"]) == ("InputError", True), found
        assert found["hint"]


def test_a_choice_by_rules_needs_prompts_with_rules(ask: Ask, tmp_path: Path) -> None:
    checks = tmp_path / "checks.jsonl"
    checks.write_text('{"prompt": "one", "expect": {"json": true}}\n{"id": "free", "prompt": "two"}\n', encoding="utf-8")
    sets = ["sampling.temperature=1.0", "sampling.candidates=2", "sampling.choose=check"]
    settings = asdict(QualitySettings(fidelity_tokens=0, choice_items=0, behaviour_prompts=2, prompts_file=str(checks)))
    asked = {"reference": arm("tiny"), "options": OPTIONS, "settings": settings}
    assert ask("check_quality", candidates=[arm("tiny")], **asked)[-1]["event"] == "answer"
    found = error(ask("check_quality", candidates=[arms.spec("tiny", "baseline", sets).as_dict()], **asked))
    assert "checks.jsonl:2: the prompt 'free' has no rules; choose: check needs some" in found["message"]
    assert '"expect"' in found["hint"]


def test_windows_are_as_long_as_text_and_context_allow() -> None:
    settings = QualitySettings(fidelity_tokens=1024)
    for tokens, contexts, length, count in ((5000, (), 512, 2), (100, (0,), 100, 1), (5000, (128, 0, 256), 128, 8)):
        windows = assess._windows(range(tokens), settings, *contexts)
        assert (len(windows[0]), len(windows)) == (length, count)


def test_a_tier_that_fails_leaves_the_others(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("out of\nluck")

    settings = asdict(QualitySettings(fidelity_tokens=64, choice_items=2, behaviour_prompts=1))
    asked = {"reference": arm("tiny"), "candidates": [arm("tiny")], "options": OPTIONS, "settings": settings}
    monkeypatch.setattr("infopt.quality.tasks.score_choices", fail)
    *_, event, answer = ask("assess", **asked)
    assert answer["event"] == "answer"
    quality = event["quality"]
    assert quality["failed"] == {"tasks": "RuntimeError: out of"}
    assert quality["figures"]["mc.accuracy"]["value"] is None
    assert quality["figures"]["mc.accuracy"]["reason"] == "RuntimeError: out of"
    assert quality["figures"]["kld.mean"]["value"] == pytest.approx(0, abs=1e-9)
    assert "tasks" not in quality
    opened: list[str] = []

    def once(spec: Any, *rest: Any) -> Any:
        opened.append(spec.label)
        return fail() if len(opened) > 1 else load.load(reference.parse("tiny"))

    monkeypatch.setattr("infopt.pipeline.open_arm", once)
    *_, event, answer = ask("assess", **asked)
    assert answer["event"] == "answer"
    assert set(event["quality"]["failed"]) == {"fidelity", "behaviour", "tasks"}
    assert len(opened) == 2


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_a_workload_that_does_not_fit_the_context_is_refused(ask: Ask) -> None:
    for shape in (WorkloadSpec(prompt_tokens=100_000, new_tokens=1), WorkloadSpec(prompt_tokens=8, new_tokens=100_000)):
        found = error(ask("open", arm=arm("tiny"), options=OPTIONS, workload=asdict(shape), machine=MACHINE))
        assert (found["kind"], "context" in found["message"]) == ("InputError", True)


STOCK_LOOKUP = arms.spec("tiny", "prompt_lookup", ["engine.name=transformers"]).as_dict()


def test_the_shapes_of_a_sweep_are_checked_before_the_first_is_measured(ask: Ask) -> None:
    def check(model: dict[str, Any], *shapes: WorkloadSpec) -> list[dict[str, Any]]:
        return ask("check", arm=model, options=OPTIONS, workloads=[asdict(shape) for shape in shapes])

    assert check(arm("tiny"), SHAPE, replace(SHAPE, batch=4))[-1]["event"] == "answer"
    assert "context" in error(check(arm("tiny"), SHAPE, replace(SHAPE, prompt_tokens=100_000)))["message"]
    assert check(arm("tiny", "prompt_lookup"), SHAPE, replace(SHAPE, batch=4))[-1]["event"] == "answer"
    assert error(check(STOCK_LOOKUP, SHAPE, replace(SHAPE, batch=4)))["hint"] == "use batch 1"


def test_a_batch_that_speculation_cannot_run_is_refused_when_the_arm_opens(ask: Ask) -> None:
    shape = WorkloadSpec(prompt_tokens=8, new_tokens=2, batch=4)
    found = error(ask("open", arm=STOCK_LOOKUP, options=OPTIONS, workload=asdict(shape), machine=MACHINE))
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
