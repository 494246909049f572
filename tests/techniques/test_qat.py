"""QAT: the gradient it uses, the loss it follows, and that training beats rounding."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_techniques import CALIBRATION

from infopt.distil import self_teaching
from infopt.distil.losses import divergence
from infopt.distil.self_teaching import Course, teach_itself
from infopt.errors import InputError, RecipeError
from infopt.layers import packing
from infopt.layers.grid import Grid
from infopt.layers.student_linear import StudentLinear, teaching
from infopt.model import load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.protocols import Context, Machine, Prediction

Make = Callable[..., Any]
Build = Callable[..., Any]


def layer(rows: int = 8, inner: int = 64) -> torch.nn.Linear:
    made = torch.nn.Linear(inner, rows)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(rows)))
    return made.requires_grad_(False)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_student_rounds_forward_and_passes_the_gradient_straight_through(symmetric: bool) -> None:
    plain, rule = layer(), Grid(3, 32, symmetric=symmetric)
    student = StudentLinear(plain, plain.weight.clone(), rule)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    _, dense = packing.pack(plain.weight, rule)
    out = student(x)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, dense, plain.bias), rtol=0, atol=1e-5)
    out.square().sum().backward()
    torch.testing.assert_close(student.weight.grad, 2 * out.detach().T @ x)
    with teaching([student]):
        assert torch.equal(student(x), plain(x))
    assert not student.is_teacher


def test_the_teacher_leaves_when_something_breaks() -> None:
    student = StudentLinear(layer(), layer().weight.clone(), Grid(3, 32))
    with pytest.raises(RuntimeError), teaching([student]):
        raise RuntimeError
    assert not student.is_teacher


@pytest.mark.parametrize("is_fast", [True, False])
def test_gradients_are_not_lost_in_float16(is_fast: bool, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[torch.Tensor] = []

    def seen(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[float, torch.Tensor]:
        found = divergence(logits, wanted)
        gradients.append(found[1])
        return found

    monkeypatch.setattr(self_teaching, "has_fast_bfloat16", lambda device: is_fast)
    monkeypatch.setattr(self_teaching, "divergence", seen)
    bundle = load.load(reference.parse("tiny"), LoadPlan(dtype="float16"))
    context = Context(calibration_ids=CALIBRATION[:1])
    make("qat", epochs=1).apply(bundle, context)
    assert gradients[0].dtype == torch.bfloat16
    assert bundle.model.dtype == torch.float16


def divergence_from(bundle: Bundle, ids: torch.Tensor, original: Bundle) -> float:
    with torch.inference_mode():
        found, wanted = (b.model(input_ids=ids).logits.flatten(0, 1) for b in (bundle, original))
    return divergence(found, wanted)[0]


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 2, "symmetric": False}, {"bits": 3, "group_size": None, "batch": 2}])
def test_says_more_of_what_the_model_said_than_rounding(
    options: dict[str, Any], make: Make, build: Build, tiny_bundle: Bundle
) -> None:
    ids = torch.tensor(CALIBRATION)
    training = {"epochs": 12, "learning_rate": 0.002}
    rounding = {key: value for key, value in options.items() if key != "batch"}
    plain = divergence_from(build(make("rtn", **rounding)), ids, tiny_bundle)
    assert divergence_from(build(make("qat", **options, **training)), ids, tiny_bundle) < 0.6 * plain


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_loads_back(kind: str, dtype: str, make: Make, build: Build, logits: Any, tmp_path: Path) -> None:
    technique = make("qat", bits=3, group_size=32, epochs=1)
    bundle = build(technique, kind, dtype)
    assert set(bundle.packed) == set(shapes.shapes(reference.parse(kind)).linear)
    assert not any(isinstance(module, StudentLinear) for module in bundle.model.modules())
    assert not any(parameter.requires_grad for parameter in bundle.model.parameters())
    save.save(bundle, tmp_path / "out")
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    torch.testing.assert_close(logits(again), logits(bundle), rtol=0, atol=1e-5)


def test_trains_the_weights_alone_and_leaves_what_is_ignored(make: Make, build: Build, tiny_bundle: Bundle) -> None:
    after = dict(build(make("qat", ignore=["lm_head", "down_proj"], epochs=1)).model.named_parameters())
    for name, before in tiny_bundle.model.named_parameters():
        trained = "_proj.weight" in name and "down_proj" not in name
        assert torch.equal(after[name], before) is not trained, name


def test_an_untied_head_may_be_trained_too(make: Make, build: Build) -> None:
    technique = make("qat", ignore=[], epochs=1)
    technique.check(shapes.shapes(reference.parse("tiny-qwen2")), "steps[0].qat")
    assert "lm_head" in build(technique, "tiny-qwen2").packed


def test_the_seed_decides_the_order(make: Make, tiny_bundle: Bundle) -> None:
    def weight(seed: int) -> torch.Tensor:
        bundle = load.load(reference.parse("tiny"))
        made = make("qat", bits=3, learning_rate=0.002).apply(bundle, Context(seed=seed, calibration_ids=CALIBRATION))
        found: torch.Tensor = made.model.model.layers[0].mlp.up_proj.weight
        return found

    first = weight(0)
    assert torch.equal(first, weight(0))
    assert not torch.equal(first, weight(1))


def test_progress_counts_the_steps(make: Make, tiny_bundle: Bundle) -> None:
    lines: list[str] = []
    make("qat", batch=3).apply(tiny_bundle, Context(calibration_ids=CALIBRATION, progress=lines.append))
    assert [line.split(",")[0] for line in lines] == [f"qat step {i}/6" for i in range(1, 7)]
    assert all(re.fullmatch(r"qat step ./6, loss [\d.e-]+, .+ to go", line) for line in lines)


def test_refuses_what_cannot_be(make: Make, tiny_bundle: Bundle) -> None:
    with pytest.raises(RecipeError, match="found 48, which does not divide the 64 inputs"):
        make("qat", group_size=48).check(shapes.shapes(reference.parse("tiny")), "steps[0].qat")
    with pytest.raises(RecipeError, match="cannot be packed"):
        make("qat", ignore=[]).check(shapes.shapes(reference.parse("tiny")), "steps[0].qat")
    once = make("qat", epochs=1).apply(tiny_bundle, Context(calibration_ids=CALIBRATION))
    with pytest.raises(InputError, match="quantized already"):
        make("qat").apply(replace(once), Context(calibration_ids=CALIBRATION))


def test_needs_text_and_a_loss_that_is_a_number(make: Make, tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="needs text"):
        make("qat").apply(tiny_bundle, Context())
    model = load.load(reference.parse("tiny")).model
    weight = model.lm_head.weight
    weight.data[5] = math.nan
    with pytest.raises(InputError, match="loss of step 1 is not a number") as caught:
        teach_itself(
            model, [weight.requires_grad_()], lambda: teaching([]), Course(1, 1, 1e-3), Context(calibration_ids=CALIBRATION), ""
        )
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("lower learning_rate and start over")


def test_predicts_time_by_epochs_and_the_memory_of_training(make: Make) -> None:
    size = shapes.shapes(reference.parse("tiny"))
    before = Prediction(weights_bytes=4 * size.parameters, peak_bytes=4 * size.parameters, seconds=None)
    machine = Machine("cpu", read_bytes_per_s=2e10, flops={"float32": 1e11})

    def predicted(epochs: int) -> Prediction:
        technique = make("qat", epochs=epochs)
        technique.calibration_tokens = 1 << 20
        found: Prediction = technique.predict(size, before, machine)
        return found

    one, four = predicted(1), predicted(4)
    assert one.seconds is not None
    assert four.seconds == pytest.approx(4 * one.seconds, rel=0.01)
    assert one.peak_bytes > before.weights_bytes + 20 * size.linear_parameters
