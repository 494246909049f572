"""The loop on a model of one matrix: where it ends, what it keeps, and that an interruption changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infopt.distil import training
from infopt.distil.students import Weights
from infopt.distil.training import Checkpoint, History, Schedule, train
from infopt.errors import DiskFullError, InputError
from infopt.protocols import Context

SCHEDULE = Schedule(learning_rate=0.1)
BATCHES = [[index % 7, index % 5] for index in range(40)]


class Fit:
    """A matrix that is to become another; batches see single rows of it."""

    def __init__(self, broken_at: int | None = None, stop_at: int | None = None) -> None:
        made = torch.Generator().manual_seed(0)
        self.wanted = torch.randn(7, 3, generator=made)
        self.matrix = torch.zeros(7, 3, requires_grad=True)
        self.calls, self.broken_at, self.stop_at = 0, broken_at, stop_at
        self.validations: list[float] | None = None

    @property
    def weights(self) -> Weights:
        return Weights([self.matrix], [self.matrix])

    def learn(self, indices: list[int], share: float) -> float:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        loss = (self.matrix - self.wanted)[indices].square().mean()
        (loss * share).backward()  # type: ignore[no-untyped-call]
        return float("nan") if self.calls == self.broken_at else float(loss.detach())

    def validate(self) -> float:
        if self.validations:
            return self.validations.pop(0)
        return float((self.matrix.detach() - self.wanted).square().mean())


def run(fit: Fit, schedule: Schedule = SCHEDULE, context: Context | None = None) -> History:
    return train(fit.weights, BATCHES, fit.learn, fit.validate, schedule, context or Context(), "fit")


def test_it_learns_and_tells() -> None:
    fit, lines = Fit(), list[str]()
    history = run(fit, context=Context(progress=lines.append))
    assert history.steps == 40
    assert [step for step, _ in history.validations] == list(range(4, 41, 4))
    assert history.best == history.validations[-1][1] < 0.5 * history.validations[0][1]
    assert history.best_step == 40
    assert "to go" in lines[0]
    assert fit.matrix.grad is None


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [SCHEDULE.rate(step, 200) for step in range(200)]
    assert rates[0] < rates[5] < rates[9]
    assert max(rates) == pytest.approx(0.1, rel=0.06)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.002


def test_accumulated_batches_are_one_step() -> None:
    """Two batches of one row each give the gradient of both rows."""
    apart, together = Fit(), Fit()
    ones = [[row] for pair in BATCHES for row in pair]
    train(apart.weights, ones, apart.learn, None, replace(SCHEDULE, accumulate=2), Context(), "fit")
    train(together.weights, BATCHES, together.learn, None, SCHEDULE, Context(), "fit")
    torch.testing.assert_close(apart.matrix, together.matrix)


def test_batches_of_a_step_share_it_by_what_they_hold() -> None:
    """A batch of three rows and one of one are a step of four rows."""
    apart, together = Fit(), Fit()
    sizes = [[0, 1, 2], [3], [4, 5, 6], [2]]
    train(apart.weights, sizes, apart.learn, None, replace(SCHEDULE, accumulate=2), Context(), "fit")
    train(together.weights, [[0, 1, 2, 3], [4, 5, 6, 2]], together.learn, None, SCHEDULE, Context(), "fit")
    torch.testing.assert_close(apart.matrix, together.matrix)


@pytest.mark.parametrize("count", [1, 9, 10, 19, 29, 200])
def test_there_are_ten_validations_at_most(count: int) -> None:
    fit = Fit()
    history = train(fit.weights, [[0]] * count, fit.learn, fit.validate, SCHEDULE, Context(), "fit")
    assert len(history.validations) == min(count, len(history.validations)) <= 10
    assert history.validations[-1][0] == count


def test_the_best_validation_is_what_stays() -> None:
    fit, seen = Fit(), list[torch.Tensor]()
    scripted = [5.0, 4.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]

    def validate() -> float:
        seen.append(fit.matrix.detach().clone())
        return scripted[len(seen) - 1]

    history = train(fit.weights, BATCHES, fit.learn, validate, SCHEDULE, Context(), "fit")
    assert history.best_step == 12
    assert torch.equal(fit.matrix, seen[2])
    assert not history.ended_early


def test_it_ends_early_without_a_better_one() -> None:
    fit = Fit()
    fit.validations = [5.0, 1.0, 2.0, 2.0, 2.0, 9.0]
    history = run(fit, replace(SCHEDULE, patience=3))
    assert (history.steps, history.best_step, history.ended_early) == (20, 8, True)
    assert fit.calls == 20


@pytest.mark.parametrize("stop_at", [2, 7, 21, 40])
@pytest.mark.parametrize("validations", [None, [1.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
def test_an_interruption_changes_nothing(stop_at: int, validations: list[float] | None, tmp_path: Path) -> None:
    every = replace(SCHEDULE, checkpoint_s=0.0)
    whole = Fit()
    whole.validations = validations and [*validations]
    wanted = run(whole, every)
    broken, context = Fit(stop_at=stop_at), Context(unfinished=tmp_path)
    broken.validations = validations and [*validations]
    with pytest.raises(KeyboardInterrupt):
        run(broken, every, context)
    again = Fit()
    again.validations = broken.validations
    found = run(again, every, context)
    assert again.calls == 40 - (stop_at - 1)
    assert found.losses == wanted.losses
    assert found.validations == wanted.validations
    assert torch.equal(again.matrix, whole.matrix)


def test_checkpoints_come_as_often_as_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    written: list[int] = []
    write: Callable[..., None] = Checkpoint.write
    monkeypatch.setattr(training.time, "perf_counter", clock)
    monkeypatch.setattr(
        Checkpoint, "write", lambda self, history, best: (written.append(history.steps), write(self, history, best))
    )
    run(Fit(), replace(SCHEDULE, checkpoint_s=30.0), Context(unfinished=tmp_path))
    assert 2 <= len(written) <= 6
    assert len(list((tmp_path / "training").glob("step-*"))) == 1
    assert 40 not in written, "the end needs none"


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the loss of step 9 is not a number$"):
        run(Fit(broken_at=9))
    with pytest.raises(InputError, match=r"step 9 is not a number; the checkpoint of step 8 is kept in .*training"):
        run(Fit(broken_at=9), replace(SCHEDULE, checkpoint_s=0.0), Context(unfinished=tmp_path))
    assert json.loads((tmp_path / "training" / "training.json").read_text())["steps"] == 8


def test_a_gradient_that_is_no_number_never_reaches_the_weights(tmp_path: Path) -> None:
    fit = Fit()

    def learn(indices: list[int], share: float) -> float:
        loss = fit.learn(indices, share)
        if fit.calls == 9:
            assert fit.matrix.grad is not None
            fit.matrix.grad[0, 0] = float("inf")
        return loss

    every = replace(SCHEDULE, checkpoint_s=0.0)
    with pytest.raises(InputError, match=r"the gradient of step 9 is not a number; the checkpoint of step 8"):
        train(fit.weights, BATCHES, learn, fit.validate, every, Context(unfinished=tmp_path), "fit")
    tensors = load_file(tmp_path / "training" / "step-8.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert fit.matrix.isfinite().all()


def test_a_validation_that_is_no_number_ends_it() -> None:
    fit = Fit()
    fit.validations = [float("nan")]
    with pytest.raises(InputError, match=r"the validation of step 4 is not a number"):
        run(fit)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every, context = replace(SCHEDULE, checkpoint_s=0.0), Context(unfinished=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(Fit(stop_at=6), every, context)

    def full(*given: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(DiskFullError):
            run(Fit(), every, context)
    assert json.loads((tmp_path / "training" / "training.json").read_text())["steps"] == 5
    fit, whole = Fit(), Fit()
    run(fit, every, context)
    run(whole, every)
    assert torch.equal(fit.matrix, whole.matrix)


def test_masters_keep_what_the_working_copy_cannot_hold() -> None:
    master, working = torch.ones(3), torch.ones(3, dtype=torch.bfloat16)
    weights = Weights([master], [working])
    working.grad = torch.full((3,), 0.5, dtype=torch.bfloat16)
    weights.collect()
    assert working.grad is None
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    master += 1e-4
    weights.spread()
    assert torch.equal(working.float(), torch.ones(3))
    master += 0.01
    weights.spread()
    assert working[0] > 1
