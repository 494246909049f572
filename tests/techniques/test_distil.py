"""Distillation as a step: it heals, whichever signal is used; it goes on where it was interrupted; it refuses the rest."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from stub_techniques import CALIBRATION, chosen

from infopt import leakage, optimize, pipeline
from infopt.arms import ArmSpec
from infopt.distil import states
from infopt.distil.examples import Batch, Example
from infopt.distil.gathering import Wanted, gather
from infopt.distil.losses import divergence
from infopt.errors import DivergedError, InputError, RecipeError
from infopt.model import load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.protocols import Context
from infopt.settings import LoadOptions, QualitySettings

Make = Callable[..., Any]
IDS = torch.tensor(CALIBRATION)
FAST = {"epochs": 6, "learning_rate": 0.003, "batch": 2, "validation": 0.2}


def opened(name: str | None = None) -> Bundle:
    return load.load(reference.parse(name or "tiny"))


def context(open_model: Callable[[str | None], Bundle] = opened) -> Context:
    return Context(calibration_ids=CALIBRATION, open_model=open_model, open_tokenizer=lambda name: open_model(name).tokenizer)


def harmed(name: str = "tiny", strength: float = 2.0) -> Bundle:
    """The model with a block that lost its way."""
    bundle = opened(name)
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bundle.model.model.layers[0].parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=made), alpha=strength * float(parameter.std()))
    return bundle


def kld(bundle: Bundle, teacher: str = "tiny") -> float:
    with torch.inference_mode():
        found, wanted = (each.model(input_ids=IDS).logits.flatten(0, 1) for each in (bundle, opened(teacher)))
    return divergence(found, wanted)[0]


#: Options, and the share of the divergence that may be left.
SIGNALS: list[tuple[dict[str, Any], float]] = [
    ({}, 0.7),
    ({"likeliest": None}, 0.7),
    ({"divergence": "reverse"}, 0.7),
    ({"divergence": "jensen_shannon"}, 0.9),
    ({"temperature": 2.0}, 0.9),
    ({"hidden": 1.0}, 0.9),
    ({"logits": 0.0, "hidden": 1.0}, 1.0),
    ({"attention": 1.0}, 0.7),
    ({"train": "lora", "learning_rate": 0.02}, 0.7),
    ({"accumulate": 2, "learning_rate": 0.006}, 0.7),
]


@pytest.mark.parametrize(("signal_options", "left"), SIGNALS, ids=str)
def test_every_signal_heals(signal_options: dict[str, Any], left: float, make: Make) -> None:
    before = kld(harmed())
    bundle = make("distil", **{**FAST, "epochs": 12, **signal_options}).apply(harmed(), context())
    assert kld(bundle) < left * before
    found = json.loads(bundle.files["distil.json"])
    assert min(value for _, value in found["validations"]) == dict(found["validations"])[found["best_step"]]
    ElementTree.fromstring(bundle.files["distil.svg"])
    assert not any(parameter.requires_grad for parameter in bundle.model.parameters())
    assert bundle.model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])
def test_every_architecture_and_dtype_loads_back(kind: str, dtype: str, make: Make, logits: Any, tmp_path: Path) -> None:
    from infopt.model.plan import LoadPlan

    bundle = load.load(reference.parse(kind), LoadPlan(dtype=dtype))
    bundle = make("distil", epochs=1).apply(bundle, context(lambda name: opened(kind)))
    assert str(bundle.model.dtype) == f"torch.{dtype}"
    save.save(bundle, tmp_path / "saved")
    assert (logits(opened(str(tmp_path / "saved"))) - logits(bundle)).abs().max() < 1e-5


def test_tokens_alone_need_no_teacher(make: Make) -> None:
    def refuse(name: str | None) -> Bundle:
        raise AssertionError("no teacher is needed")

    bundle = make("distil", **FAST, logits=0.0, tokens=1.0).apply(
        opened(), Context(calibration_ids=CALIBRATION, open_model=refuse)
    )
    ids = IDS[:, 1:].flatten()
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(each.model(input_ids=IDS).logits[:, :-1].flatten(0, 1), ids).item()
            for each in (bundle, opened())
        ]
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_agreement_is_the_share_of_tokens_that_speculation_keeps(
    strength: float, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infopt.distil.students.has_fast_bfloat16", lambda device: False)
    technique = make("distil", learning_rate=1e-12, measure="agreement", validation=0.99)
    found = json.loads(technique.apply(harmed(strength=strength), context()).files["distil.json"])
    assert found["validation_examples"] == 7
    held = [window for window in CALIBRATION if window not in {CALIBRATION[i] for i in _trained(0)}]
    with torch.inference_mode():
        best = [
            each.model(input_ids=torch.tensor(held)).logits[:, :-1].argmax(-1) for each in (harmed(strength=strength), opened())
        ]
    assert found["validations"][-1][1] == pytest.approx(float((best[0] != best[1]).float().mean()), abs=2e-3)


def _trained(seed: int) -> list[int]:
    return gather(Wanted(validation=0.99), opened(), Context(seed=seed, calibration_ids=CALIBRATION)).train


def test_a_narrower_student_learns_hidden_states_through_a_matrix() -> None:
    """Its states are a projection of the teacher's: the matrix alone can make up for it."""
    made = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 9, 12, generator=made)
    down = torch.linalg.qr(torch.randn(12, 12, generator=made))[0][:, :8]

    class Out:
        def __init__(self, hidden: torch.Tensor) -> None:
            self.hidden_states = (hidden, hidden)

    batch = Batch.of([Example.of_text(range(9))] * 2, [0, 1], torch.device("cpu"))
    loss = states.HiddenStates([(0, 0)], 8, 12, seed=0)
    narrow = wide @ down @ down.T
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    found = []
    for _ in range(400):
        value = loss(Out(wide @ down), Out(narrow), batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(value.detach()))
    assert found[-1] < 1e-3 < found[0]


def test_blocks_are_matched_by_how_far_they_are() -> None:
    assert states.pairs(6, 6) == [(i, i) for i in range(6)]
    assert states.pairs(3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert states.pairs(4, 30)[-1] == (3, 29)


def test_attention_of_the_same_model_has_no_distance(make: Make) -> None:
    bundle = opened()
    bundle.model.set_attn_implementation("eager")
    batch = Batch.of([Example.of_text(CALIBRATION[0])], [0], torch.device("cpu"))
    with torch.inference_mode():
        out = bundle.model(input_ids=batch.ids, output_attentions=True)
    assert states.attention(out, out, [(0, 0), (1, 1)], batch) == pytest.approx(0, abs=1e-6)
    assert states.attention(out, out, [(0, 1)], batch) > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": 0.0}, "nothing is learned"),
        ({"samples": 3}, "samples: 3 at answer_temperature 0"),
        ({"samples": 3, "answer_temperature": 1.0}, "with answers: rows"),
        ({"data": "no-such.jsonl"}, "no such file"),
        ({"answer_tokens": 4}, "answer_tokens: 4 with answers: rows"),
        ({"answer": "("}, "allowed: a pattern of Python's re"),
        ({"teacher": "./no-such-folder"}, "no-such-folder"),
        ({"answers": "teacher", "samples": 2, "answer_temperature": 1.0}, "samples: 2 without data"),
        ({"answer": "yes|no"}, "answer: yes|no without data"),
        ({"prompts": 0.1}, "prompts: 0.1 without data"),
        ({"rank": 4}, "rank: 4 with train: all"),
        ({"answers": "teacher", "answer_tokens": 4000}, "found 4000, after 64 tokens of text; the model's context allows 2048"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        pipeline.build_techniques(chosen({"distil": options}), shapes.shapes(reference.parse("tiny")))
    assert message in str(refused.value)


def test_rows_without_a_response_want_a_teacher(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"rows.jsonl:2 has no response; allowed: .*answers: teacher"):
        pipeline.build_techniques(chosen({"distil": {"data": str(path)}}), shapes.shapes(reference.parse("tiny")))


def test_teachers_with_other_tokens_are_refused(make: Make) -> None:
    student = opened()
    student.tokenizer.add_tokens([f"<{number}>" for number in range(5)])  # more than releases of one tokenizer differ by
    message = (
        r"distil.teacher: big knows other tokens than the student \(259 against 264; 0 have another number, 5 are not there\)"
    )
    with pytest.raises(InputError, match=message):
        make("distil", teacher="big").apply(student, context(lambda name: opened()))


def test_teachers_of_answers_with_other_tokens_are_refused_before_they_write(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS, encoding="utf-8")
    other = opened()
    other.tokenizer.add_tokens([f"<{number}>" for number in range(3)])
    other.tokenizer.add_tokens(["<other>"])
    technique = make("distil", data=str(path), answers="teacher", logits=0.0, tokens=1.0)
    with pytest.raises(InputError, match=r"distil.teacher: the reference knows other tokens"):
        technique.apply(other, context())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_is_as_it_was_afterwards(dtype: str, make: Make, logits: Any, tmp_path: Path) -> None:
    from infopt.model.plan import LoadPlan

    bundle = load.load(reference.parse("tiny"), LoadPlan(dtype=dtype))
    bundle = make("distil", attention=1.0).apply(bundle, context())
    assert bundle.model.config._attn_implementation == "sdpa"
    save.save(bundle, tmp_path / "saved")
    assert (logits(opened(str(tmp_path / "saved"))) - logits(bundle)).abs().max() < 1e-5


def test_quantized_students_are_refused(make: Make, build: Callable[..., Bundle]) -> None:
    with pytest.raises(InputError, match="quantized already"):
        make("distil").apply(build(make("rtn", group_size=32)), context())


def test_no_number_is_told(make: Make) -> None:
    with pytest.raises(InputError, match="is not a number"):
        make("distil", **{**FAST, "learning_rate": 1e12}).apply(harmed(), context())


def test_what_would_fail_again_is_not_to_be_resumed(tmp_path: Path) -> None:
    step = {"distil": {"learning_rate": 1e12, "checkpoint_minutes": 1e-9, "batch": 1}}
    with pytest.raises(DivergedError, match=r"the checkpoint of step \d+ is kept") as caught:
        optimize.optimize("tiny", chosen(step, calibration={"samples": 16, "tokens": 64}), tmp_path / "out", LoadOptions())
    assert caught.value.hint
    assert "start over" in caught.value.hint
    assert not getattr(caught.value, "__notes__", [])


def test_tokens_that_one_of_both_has_no_row_for_are_named(make: Make, tmp_path: Path) -> None:
    student = opened()
    rows = student.model.get_input_embeddings().weight.shape[0]
    student.tokenizer.add_tokens([f"<{number}>" for number in range(rows - len(student.tokenizer) + 1)])
    last = student.tokenizer.convert_ids_to_tokens(rows)
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS + json.dumps({"prompt": f"{last}?", "response": "yes"}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"the token {rows} \({last}\); allowed: 0 … {rows - 1}, which the student knows"):
        make("distil", data=str(path), logits=0.0, tokens=1.0).apply(student, context())


def test_what_validates_weighs_as_what_trains(make: Make, tmp_path: Path) -> None:
    """With prompts that hardly count, the validation is that of the answers."""
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS, encoding="utf-8")
    options = {"data": str(path), "logits": 0.0, "tokens": 1.0, "learning_rate": 1e-12, "validation": 0.5}
    found = [
        json.loads(make("distil", **options, prompts=weight).apply(opened(), context()).files["distil.json"])["validations"][-1][
            1
        ]
        for weight in (0.0, 1e-6)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


ROWS = "".join(f'{{"prompt": "Is {n} even?", "response": "{"no" if n % 2 else "yes"}"}}\n' for n in range(24))


def test_an_artifact_says_what_was_learned(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS, encoding="utf-8")
    steps = chosen(
        {"drop_layers": {"count": 1}}, {"distil": {"data": str(path), "tokens": 1.0}}, calibration={"samples": 2, "tokens": 64}
    )
    document = optimize.optimize("tiny", steps, tmp_path / "out", LoadOptions())
    assert [step.name for step in document.steps] == ["drop_layers", "distil"]
    assert document.calibration_hash is not None
    found = json.loads((tmp_path / "out" / "distil.json").read_text())
    assert (found["source"], found["rows"], found["examples"]) == (path.name, 24, 23)
    assert (tmp_path / "out" / "calibration_runs.npy").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Learned from `{path.name}`, 24 rows: 23 examples" in card
    assert "![distil](distil.svg)" in card
    assert "![depth](depth.svg)" in card


def test_other_rows_are_another_artifact(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    keys = set()
    for text in (ROWS, ROWS.replace("yes", "oui")):
        path.write_text(text, encoding="utf-8")
        keys.add(
            optimize.build_key(pipeline.resolve("tiny", LoadOptions()), chosen({"distil": {"data": str(path)}}), LoadOptions())
        )
    assert len(keys) == 2


def test_another_teacher_is_another_artifact(tmp_path: Path) -> None:
    keys = set()
    for step in ({"count": 0}, {"count": 1}):
        teacher = tmp_path / "teacher"
        shutil.rmtree(teacher, ignore_errors=True)
        optimize.optimize("tiny", chosen({"drop_layers": step}, calibration={"samples": 2, "tokens": 64}), teacher, LoadOptions())
        learns = chosen({"distil": {"teacher": str(teacher)}})
        keys.add(optimize.build_key(pipeline.resolve("tiny", LoadOptions()), learns, LoadOptions()))
    assert len(keys) == 2


def test_what_its_teacher_has_seen_counts_as_seen(tmp_path: Path) -> None:
    from infopt.data import choices

    item = choices.bundled_choices(1)[0]
    seen, neutral = tmp_path / "seen.jsonl", tmp_path / "neutral.jsonl"
    seen.write_text(ROWS + json.dumps({"prompt": item.question, "response": item.choices[item.answer]}) + "\n", encoding="utf-8")
    neutral.write_text(ROWS, encoding="utf-8")
    taught = chosen({"distil": {"data": str(seen), "logits": 0.0, "tokens": 1.0}})
    optimize.optimize("tiny", taught, tmp_path / "teacher", LoadOptions(allow_leakage=True))
    student = chosen({"distil": {"data": str(neutral), "teacher": str(tmp_path / "teacher")}})
    with pytest.raises(InputError, match="multiple-choice items share passages in 1 of"):
        optimize.optimize("tiny", student, tmp_path / "out", LoadOptions())
    document = optimize.optimize("tiny", student, tmp_path / "out", LoadOptions(allow_leakage=True))
    assert document.leaks
    (tmp_path / "teacher" / "calibration_runs.npy").unlink()
    spec = ArmSpec("student", str(tmp_path / "out"), student, is_artifact=True)
    assert leakage.found(spec, QualitySettings(choice_items=1))


def test_rows_that_the_model_is_judged_by_are_refused(tmp_path: Path) -> None:
    from infopt.data import choices

    item = choices.bundled_choices(1)[0]
    path = tmp_path / "rows.jsonl"
    row = {"prompt": item.question, "response": item.choices[item.answer]}
    path.write_text(ROWS + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="multiple-choice items share passages in 1 of"):
        optimize.optimize("tiny", chosen({"distil": {"data": str(path)}}), tmp_path / "out", LoadOptions())


RECIPE = """
version: 1
name: own
steps:
  - distil: {epochs: 40, learning_rate: 0.003, batch: 2, tokens: 1.0, checkpoint_minutes: 0.0001}
calibration: {text: bundled, samples: 32, tokens: 64, seed: 0}
"""


def test_killed_and_resumed_it_ends_the_same(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "infopt", "optimize", "tiny", "-r", str(recipe), "-o", str(tmp_path / out), "--resume"]

    record = tmp_path / ".out.unfinished" / "0-distil" / "training" / "training.json"
    child = subprocess.Popen(command("out")[:-1], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(600):
        if record.is_file() or child.poll() is not None:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "it was over before it could be killed"
    subprocess.run(command("out"), check=True, capture_output=True)
    subprocess.run(command("whole")[:-1], check=True, capture_output=True)
    made, whole = (json.loads((tmp_path / name / "distil.json").read_text()) for name in ("out", "whole"))
    assert made == whole
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not (tmp_path / ".out.unfinished").exists()
