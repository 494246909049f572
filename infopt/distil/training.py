"""The loop: AdamW over batches, checkpoints that an interrupted run goes on from, an early end by validation.

What is drawn, and in which order, follows from the seed alone, so that a run that was interrupted ends with the weights of one
that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from infopt import units
from infopt.calibrate.unfinished import read_tensors, write_tensors
from infopt.distil.students import Weights
from infopt.errors import DivergedError
from infopt.protocols import Context
from infopt.result import write_atomic

#: Share of the steps in which the learning rate rises; Adam's first averages are of few gradients.
WARM_UP = 0.05
#: Times that a run is validated, at even distances.
VALIDATIONS = 10


@dataclass(frozen=True)
class Schedule:
    """The learning rate rises over the first steps, then falls linearly to zero.

    `patience`: validations without a better one after which it ends; `checkpoint_s`: seconds between checkpoints; `longest`:
    gradients that are longer are shortened to it.
    """

    learning_rate: float
    accumulate: int = 1
    patience: int = VALIDATIONS
    checkpoint_s: float = 300.0
    longest: float = 1.0

    def rate(self, step: int, steps: int) -> float:
        """Of step `step`, counted from zero."""
        return self.learning_rate * min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * (1 - step / steps)


@dataclass
class History:
    """What happened: (step, loss) of each step, (step, validation loss) of each validation, counted from 1. Lower is better."""

    steps: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    ended_early: bool = False

    @property
    def best(self) -> float:
        return min((loss for _, loss in self.validations), default=math.inf)

    @property
    def since_best(self) -> int:
        """Validations after the best one."""
        return sum(step > self.best_step for step, _ in self.validations)


Learn = Callable[[list[int], float], float]
"""(indices of a batch's examples, share of its gradient in the step) → its loss; leaves the gradient in the parameters."""


def train(
    weights: Weights,
    batches: Sequence[list[int]],
    learn: Learn,
    validate: Callable[[], float] | None,
    schedule: Schedule,
    context: Context,
    name: str,
    weigh: Callable[[list[int]], float] = len,
) -> History:
    """Trains `weights` in place: `accumulate` batches a step. Afterwards they are as they were at the best validation.

    `weigh`: how much there is to learn in a batch, by which those of a step share it. Raises DivergedError for a loss or a
    gradient that is no number, before it reaches the weights, and leaves the last checkpoint where it is; DiskFullError.
    """
    trained = weights.masters
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    groups = [batches[i : i + schedule.accumulate] for i in range(0, len(batches), schedule.accumulate)]
    kept = Checkpoint(context.unfinished / "training", trained, optimizer) if context.unfinished else None
    history, best = kept.restore() if kept else (History(), None)
    if history.steps:
        weights.spread()
        context.progress(f"{name}: going on after step {history.steps} of {len(groups)}")
    every = -(-len(groups) // VALIDATIONS)
    began, saved, done = time.perf_counter(), time.perf_counter(), history.steps
    for number in range(done, len(groups)):
        loss = _learned(groups[number], learn, weigh)
        weights.collect()
        length = torch.nn.utils.clip_grad_norm_(trained, schedule.longest)
        if not (math.isfinite(loss) and bool(length.isfinite())):
            raise _no_number("loss" if not math.isfinite(loss) else "gradient", number + 1, kept)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(number, len(groups))
        optimizer.step()
        optimizer.zero_grad()
        weights.spread()
        history.steps = number + 1
        history.losses.append((number + 1, loss))
        left = (time.perf_counter() - began) / (number + 1 - done) * (len(groups) - number - 1)
        context.progress(f"{name} step {number + 1}/{len(groups)}, loss {loss:.3g}, {units.duration(left)} to go")
        if validate and ((number + 1) % every == 0 or number + 1 == len(groups)):
            found = validate()
            if not math.isfinite(found):
                raise _no_number("validation", number + 1, kept)
            history.validations.append((number + 1, found))
            context.progress(f"{name} step {number + 1}/{len(groups)}, validation {found:.4g}")
            if found == history.best:
                history.best_step, best = number + 1, [each.detach().clone() for each in trained]
            history.ended_early = number + 1 < len(groups) and history.since_best >= schedule.patience
        if history.ended_early:
            break
        if kept and time.perf_counter() - saved >= schedule.checkpoint_s and number + 1 < len(groups):
            kept.write(history, best)
            saved = time.perf_counter()
    if best is not None and history.best_step < history.steps:
        with torch.no_grad():
            for each, value in zip(trained, best, strict=True):
                each.copy_(value)
    return history


def _learned(group: Sequence[list[int]], learn: Learn, weigh: Callable[[list[int]], float]) -> float:
    """The loss of a step, as if its batches were one."""
    sizes = [weigh(batch) for batch in group]
    return sum(learn(batch, size / sum(sizes)) * size / sum(sizes) for batch, size in zip(group, sizes, strict=True))


def _no_number(what: str, step: int, kept: Checkpoint | None) -> DivergedError:
    saved = json.loads(kept.record.read_text())["steps"] if kept and kept.record.is_file() else None
    rest = f"; the checkpoint of step {saved} is kept in {kept.folder}" if kept and saved else ""
    hint = "lower learning_rate and start over: a checkpoint goes on with the recipe that made it alone"
    return DivergedError(f"the {what} of step {step} is not a number{rest}", hint=hint)


class Checkpoint:
    """Parameters, Adam's moments and the best parameters so far, in a folder: complete, or not there."""

    def __init__(self, folder: Path, trained: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.folder, self.trained, self.optimizer = folder, trained, optimizer
        self.record = folder / "training.json"

    def write(self, history: History, best: list[torch.Tensor] | None) -> None:
        """Raises DiskFullError; the checkpoint before stays then."""
        tensors: dict[str, torch.Tensor] = {}
        for index, each in enumerate(self.trained):
            tensors[f"now/{index}"] = each
            for part in ("exp_avg", "exp_avg_sq"):
                tensors[f"{part}/{index}"] = self.optimizer.state[each][part]
            if best is not None and history.best_step < history.steps:
                tensors[f"best/{index}"] = best[index]
        self.folder.mkdir(parents=True, exist_ok=True)
        # The record names the file, so that both change at once.
        path = self.folder / f"step-{history.steps}.safetensors"
        write_tensors(path, tensors)
        write_atomic(self.record, json.dumps({**asdict(history), "has_best": best is not None}))
        for old in self.folder.glob("step-*.safetensors"):
            if old != path:
                old.unlink()

    def restore(self) -> tuple[History, list[torch.Tensor] | None]:
        """How far an interrupted run came, with its state put back; nothing where there was none."""
        if not self.record.is_file():
            return History(), None
        found = json.loads(self.record.read_text())
        has_best = found.pop("has_best")
        found["losses"] = [(int(step), loss) for step, loss in found["losses"]]
        found["validations"] = [(int(step), loss) for step, loss in found["validations"]]
        history = History(**found)
        tensors = read_tensors(self.folder / f"step-{history.steps}.safetensors")
        with torch.no_grad():
            for index, each in enumerate(self.trained):
                each.copy_(tensors[f"now/{index}"])
                state = {part: tensors[f"{part}/{index}"].to(each.device).clone() for part in ("exp_avg", "exp_avg_sq")}
                count = torch.tensor(float(history.steps), device=each.device)
                self.optimizer.state[each] = {"step": count, **state}
        if not has_best:
            return history, None
        kind = "now" if history.best_step == history.steps else "best"
        return history, [tensors[f"{kind}/{i}"].to(each.device).clone() for i, each in enumerate(self.trained)]
