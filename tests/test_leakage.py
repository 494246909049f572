"""What an arm was calibrated on does not judge it, unless that is allowed, and then it is said."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stub_techniques import chosen, register

from infopt import arm_run, arms, assess, bench, compare, forecast, host, leakage, optimize, pipeline
from infopt.arms import ArmSpec
from infopt.artifact import Artifact, read_artifact
from infopt.data.overlap import Fingerprint, Piece, Words, shares
from infopt.data.texts import BUNDLED, content_hash, read_text
from infopt.errors import InputError, RecipeError
from infopt.model import load
from infopt.model.bundle import Bundle
from infopt.needs import Needs
from infopt.protocols import Context
from infopt.recipe import Recipe
from infopt.settings import LoadOptions, QualitySettings, Settings, WorkloadSpec
from infopt.techniques.base import Technique

CPU = LoadOptions(device="cpu")
ALLOWED = replace(CPU, allow_leakage=True)
QUALITY = QualitySettings(fidelity_tokens=64, choice_items=2, behaviour_prompts=1)
PASSAGE = " ".join(f"word{number}" for number in range(200))


class Calibrated(Technique):
    """Reads calibration text and changes nothing."""

    needs = Needs(calibration=True)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        assert context.calibration_ids
        return bundle


def recipe(text: Path | str, samples: int = 8, tokens: int = 16) -> Recipe:
    return chosen("calibrated", calibration={"text": str(text), "samples": samples, "tokens": tokens})


@pytest.fixture(autouse=True)
def _calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    register(Calibrated, monkeypatch)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(load, "load", read)


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(bench, "WorkerProcess", start)
    monkeypatch.setattr(compare, "WorkerProcess", start)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Artifact, str]]:
    """An artifact that was calibrated on a text that is gone."""
    folder = tmp_path_factory.mktemp("leakage")
    text = folder / "own.txt"
    text.write_text(PASSAGE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFOPT_CACHE", str(folder / "cache"))
        register(Calibrated, patch)
        document = optimize.optimize("tiny", recipe(text), folder / "out", CPU)
        text.unlink()
        yield folder / "out", document, PASSAGE


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


# --- optimize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("evaluation.txt", "evaluation text share"),
        ("hellaswag.jsonl", "multiple-choice items share passages in 30 of 60"),
        ("prompts.jsonl", "prompts share passages in"),
    ],
)
def test_optimize_refuses_text_that_infopt_judges_by(tmp_path: Path, no_weights: None, name: str, what: str) -> None:
    content = (BUNDLED / name).read_text(encoding="utf-8")
    if name == "hellaswag.jsonl":
        items = [json.loads(line) for line in content.splitlines()]
        content = "\n\n".join(f"{item['question']} {item['choices'][item['answer']]}" for item in items)
    elif name == "prompts.jsonl":
        rows = [json.loads(line) for line in content.splitlines()]
        content = "".join(json.dumps({"text": row["prompt"]}) + "\n" for row in rows if "prompt" in row)
    text = write(tmp_path / ("own.jsonl" if name == "prompts.jsonl" else "own.txt"), content)
    with pytest.raises(InputError, match=what) as caught:
        optimize.optimize("tiny", recipe(text, samples=100), tmp_path / "out", CPU)
    assert str(caught.value).startswith("own: calibration and")
    assert "--allow-leakage" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_optimize_says_so_where_it_was_allowed(tmp_path: Path) -> None:
    document = optimize.optimize("tiny", recipe(BUNDLED / "evaluation.txt"), tmp_path / "out", ALLOWED)
    assert len(document.leaks) == 1
    assert "calibration and evaluation text share" in document.leaks[0]
    assert read_artifact(tmp_path / "out").leaks == document.leaks
    assert "**judged on what it has seen**" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_an_artifact_keeps_hash_and_fingerprint(made: tuple[Path, Artifact, str]) -> None:
    folder, document, text = made
    assert document.leaks == ()
    assert document.calibration_hash == content_hash(text)
    assert (folder / leakage.FILE).stat().st_size < 6000
    assert "judged on what it has seen" not in (folder / "README.md").read_text(encoding="utf-8")


def test_without_a_step_that_reads_it_the_text_does_not_matter(tmp_path: Path) -> None:
    free = chosen({"rtn": {"group_size": 32}}, calibration={"text": "gone.txt"})
    document = optimize.optimize("tiny", free, tmp_path / "out", CPU)
    assert document.calibration_hash is None
    assert not (tmp_path / "out" / leakage.FILE).exists()


@pytest.mark.parametrize(
    ("content", "samples", "tokens", "message"),
    [
        ("", 1, 16, "own.txt: the file is empty"),
        ("short", 1, 16, "has 5 tokens, which fill 0 windows of 16; calibration.samples asks for 1"),
        ("x" * 40, 3, 16, "has 40 tokens, which fill 2 windows of 16; calibration.samples asks for 3"),
        ("x" * 5000, 1, 4096, "calibration.tokens: found 4096; allowed: the model's context of 2048 at most"),
        (None, 1, 16, "own.txt: no such file"),
    ],
)
def test_calibration_text_that_is_no_good_is_refused_before_a_weight_is_read(
    tmp_path: Path,
    no_weights: None,
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
    samples: int,
    tokens: int,
    message: str,
) -> None:
    monkeypatch.setattr(host, "measured", lambda device, threads: None)
    if content is not None:
        write(tmp_path / "own.txt", content)
    own = recipe(tmp_path / "own.txt", samples, tokens)
    with pytest.raises(InputError, match=message):
        forecast.forecast("tiny", own, tmp_path / "out", CPU)
    with pytest.raises(InputError, match=message) as caught:
        optimize.optimize("tiny", own, tmp_path / "out", CPU)
    assert caught.value.hint or isinstance(caught.value, RecipeError)
    assert not (tmp_path / "out").exists()


# --- bench and compare -----------------------------------------------------------------------------------------------


def spec(folder: Path) -> ArmSpec:
    return arms.spec(str(folder), None)


def test_an_artifact_is_refused_without_its_text(made: tuple[Path, Artifact, str], tmp_path: Path, no_workers: None) -> None:
    settings = Settings(quality=replace(QUALITY, text=write(tmp_path / "eval.txt", f"Intro. {made[2].upper()}")))
    both = [arms.spec("tiny", None), spec(made[0])]
    for options in (CPU, replace(CPU, seed=1)):
        with pytest.raises(
            InputError, match=r"^out: calibration and evaluation text share 188 runs of 13 words, e\.g\. 'word0 word1"
        ):
            bench.bench(spec(made[0]), WorkloadSpec(), options, settings, blocks=1, results=tmp_path / "results")
        with pytest.raises(InputError, match=r"^out: calibration and evaluation"):
            compare.compare(both, WorkloadSpec(), options, settings, compare.Protocol(), results=tmp_path / "results")
    assert not (tmp_path / "results").exists()
    leakage.require_unseen([spec(made[0])], QUALITY, False)
    leakage.require_unseen([spec(made[0])], settings.quality, True)
    leakage.require_unseen([spec(made[0])], None, False)


def test_a_recipe_is_refused_before_its_steps_run(tmp_path: Path, no_workers: None, no_weights: None) -> None:
    text = write(tmp_path / "own.txt", PASSAGE)
    arm = ArmSpec("own", "tiny", recipe(text))
    settings = Settings(quality=replace(QUALITY, text=text))
    with pytest.raises(InputError, match=r"^own: calibration and evaluation text share"):
        bench.bench(arm, WorkloadSpec(), CPU, settings, blocks=1, results=tmp_path / "results")
    with pytest.raises(AssertionError, match="a process was started"):
        bench.bench(arm, WorkloadSpec(), ALLOWED, settings, blocks=1, results=tmp_path / "results")


def test_items_and_prompts_count_as_much_as_text(made: tuple[Path, Artifact, str], tmp_path: Path) -> None:
    words = made[2].split()
    item = {"question": " ".join(words[5:20]), "choices": ["a", "b"], "answer": 0}
    items = write(tmp_path / "items.jsonl", json.dumps(item) + "\n" + json.dumps({**item, "question": "something else"}))
    prompts = write(tmp_path / "prompts.jsonl", json.dumps({"prompt": " ".join(words[50:59])}))
    found = leakage.found(spec(made[0]), replace(QUALITY, choices_file=items, prompts_file=prompts))
    both = "calibration and {} share passages in 1 of {}, e.g. {!r}"
    assert found == {
        "behaviour": both.format("prompts", 1, " ".join(words[50:58])),
        "tasks": both.format("multiple-choice items", 2, " ".join(words[5:18])),
    }
    only = replace(QUALITY, choices_file=items, prompts_file=prompts, choice_items=0, behaviour_prompts=0)
    assert leakage.found(spec(made[0]), only) == {}, "what is not used does not count"


def test_quality_fails_tier_by_tier_or_tells_that_it_was_allowed(made: tuple[Path, Artifact, str], tmp_path: Path) -> None:
    settings = replace(QUALITY, behaviour_prompts=0, text=write(tmp_path / "eval.txt", made[2]))
    base = arms.spec("tiny", None)
    ((_, refused),) = assess.assess(base, [spec(made[0])], CPU, settings, lambda line: None)
    assert list(refused["failed"]) == ["fidelity"]
    assert "tasks" in refused
    with pytest.raises(InputError, match="quality cannot be judged: out: calibration and evaluation text share"):
        assess.check(base, [spec(made[0])], CPU, settings)
    assess.check(base, [spec(made[0])], ALLOWED, settings)
    ((_, allowed),) = assess.assess(base, [spec(made[0])], ALLOWED, settings, lambda line: None)
    assert allowed["failed"] == {}
    (remark,) = allowed["leakage"]
    assert remark.startswith("judged all the same: calibration and evaluation text share")
    run = arm_run.ArmRun(spec(made[0]), CPU, WorkloadSpec(), Settings(), tmp_path, lambda line: None)
    run.take_quality(allowed)
    assert f"out: {remark}" in run.warnings()
    assert run.quality["leakage"] == allowed["leakage"]


def test_every_item_in_a_long_text_is_found_while_the_text_is_here(tmp_path: Path, no_weights: None) -> None:
    """More runs than a stored fingerprint has room for, and items of one run each."""
    chosen = random.Random(0)
    words = [f"w{chosen.randrange(30_000)}" for _ in range(150_000)]
    questions = [" ".join(words[start : start + 13]) for start in range(5_000, 150_000, 15_000)]
    items = write(
        tmp_path / "items.jsonl", "\n".join(json.dumps({"question": q, "choices": ["a", "b"], "answer": 0}) for q in questions)
    )
    text = write(tmp_path / "own.txt", " ".join(words))
    own = recipe(text, samples=300, tokens=256)
    settings = replace(QUALITY, choices_file=items, choice_items=10)
    assert "passages in 10 of 10" in leakage.found(ArmSpec("own", "tiny", own), settings)["tasks"]
    source = pipeline.calibration_source(own)
    assert source is not None
    leakage.write(own, source, tmp_path)
    asked = Words.of([Piece(row, row, question) for row, question in enumerate(questions)])
    assert 0 < len(shares(asked, Fingerprint.read(tmp_path / leakage.FILE))) < 10


def test_what_is_not_drawn_of_a_long_text_does_not_count(tmp_path: Path) -> None:
    filler = "\n".join(f"filler{number} " * 8 for number in range(400))
    settings = replace(QUALITY, choices_file=write(tmp_path / "items.jsonl", json.dumps({
        "question": PASSAGE, "choices": ["a", "b"], "answer": 0})))  # fmt: skip
    arm = ArmSpec("own", "tiny", recipe(write(tmp_path / "own.txt", f"{filler}{PASSAGE}{filler}"), samples=32))
    found = []
    for seed in range(8):
        own = replace(arm, recipe=chosen("calibrated", calibration={**arm.recipe.as_dict()["calibration"], "seed": seed}))
        drawn = pipeline.calibration_source(own.recipe)
        assert drawn is not None
        assert len(drawn.documents[0].text) == 32 * 16 * 16 + 31
        found.append("tasks" in leakage.found(own, settings))
        assert found[-1] == bool(re.search(r"(word\d+ ){13}", drawn.documents[0].text))
    assert set(found) == {True, False}


def bare(made: Path, folder: Path) -> Path:
    """A copy of an artifact without its fingerprint."""
    folder.mkdir()
    for path in made.iterdir():
        if path.name != leakage.FILE:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_an_artifact_without_its_fingerprint_is_refused(made: tuple[Path, Artifact, str], tmp_path: Path) -> None:
    folder = bare(made[0], tmp_path / "bare")
    with pytest.raises(
        InputError, match=f"^bare: {folder / leakage.FILE} is gone, so it may have seen what it is judged on$"
    ) as caught:
        leakage.require_unseen([spec(folder)], QUALITY, False)
    assert "--allow-leakage" in str(caught.value.hint)
    leakage.require_unseen([spec(folder)], QUALITY, True)
    (remark,) = leakage.remarks(leakage.found(spec(folder), QUALITY))
    assert remark.startswith("judged all the same: ")
    (folder / leakage.FILE).write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        leakage.require_unseen([spec(folder)], QUALITY, False)


def test_infopts_own_calibration_text_needs_no_fingerprint(made: tuple[Path, Artifact, str], tmp_path: Path) -> None:
    folder = bare(made[0], tmp_path / "bare")
    path = folder / "infopt.json"
    saved = json.loads(path.read_text(encoding="utf-8")) | {"calibration_hash": content_hash(read_text("bundled", "calibration"))}
    path.write_text(json.dumps(saved), encoding="utf-8")
    assert leakage.found(spec(folder), QUALITY) == {}
    found = leakage.found(spec(folder), replace(QUALITY, text=str(BUNDLED / "calibration.txt")))
    assert list(found) == ["fidelity"]


def test_an_export_is_refused_as_its_artifact_is(made: tuple[Path, Artifact, str], tmp_path: Path) -> None:
    """`infopt export` writes NAME.gguf.json and NAME.gguf.calibration_runs.npy."""
    settings = replace(QUALITY, text=write(tmp_path / "eval.txt", made[2]))
    exported = ArmSpec("e", str(tmp_path / "e.GGUF"), chosen())
    record, fingerprint = tmp_path / "e.GGUF.json", tmp_path / f"e.GGUF.{leakage.FILE}"
    assert leakage.found(exported, settings) == {}, "nobody knows where it is from"
    for foreign in ("[]", "{}", '{"calibration_hash": null}'):
        record.write_text(foreign, encoding="utf-8")
        assert leakage.found(exported, settings) == {}
    record.write_text(json.dumps({"calibration_hash": made[1].calibration_hash}), encoding="utf-8")
    assert f"{fingerprint} is gone" in leakage.found(exported, settings)["fidelity"]
    fingerprint.write_bytes((made[0] / leakage.FILE).read_bytes())
    leaks = leakage.found(exported, settings)
    assert list(leaks) == ["fidelity"]
    assert "share 188 runs" in leaks["fidelity"]
    record.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"e\.GGUF\.json: cannot be read as JSON"):
        leakage.found(exported, settings)
    again = bare(made[0], tmp_path / "again")
    saved = json.loads((again / "infopt.json").read_text(encoding="utf-8"))
    saved |= {"calibration_hash": None, "reference": exported.model}
    (again / "infopt.json").write_text(json.dumps(saved), encoding="utf-8")
    record.unlink()
    assert leakage.found(spec(again), settings) == leaks, "and so is what is made of it"
