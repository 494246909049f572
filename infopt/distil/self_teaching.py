"""A changed model that learns to say what it said before: its teacher is itself, with what was changed switched off."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from infopt.distil.examples import Example, batches
from infopt.distil.losses import divergence
from infopt.distil.students import Weights, has_fast_bfloat16
from infopt.distil.training import Schedule, train
from infopt.errors import InputError

if TYPE_CHECKING:
    from infopt.protocols import Context


@dataclass(frozen=True)
class Course:
    """`epochs` times over the calibration text, `batch` windows a step."""

    epochs: int
    batch: int
    learning_rate: float


def teach_itself(
    model: Any,
    parameters: list[torch.Tensor],
    teaching: Callable[[], AbstractContextManager[Any]],
    course: Course,
    context: Context,
    name: str,
) -> None:
    """Trains `parameters` in place so that the model answers as it does inside `teaching()`.

    The order of the windows depends on the seed alone. Raises InputError without text, and for a loss that is no number.
    """
    windows, device = context.calibration_ids, parameters[0].device
    if not windows:
        raise InputError("a trained step needs text", hint="calibration: {text: bundled, samples: 128, tokens: 256}")

    def learn(indices: list[int], share: float) -> float:
        inputs = torch.tensor([windows[index] for index in indices], device=device)
        with teaching(), torch.no_grad():
            wanted = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        loss, gradient = divergence(logits.detach(), wanted)
        logits.backward(gradient)
        return loss

    order = list(batches([Example.of_text(window) for window in windows], course.batch, course.epochs, context.seed))
    # float16 gradients of logits, a vocabulary's share of a small number each, would be zero: bfloat16, even where it is slow.
    is_narrow = has_fast_bfloat16(device) or model.dtype == torch.float16
    # No cache: it would keep answering with the parameters as they were before the first step.
    narrow = torch.autocast(device.type, torch.bfloat16, enabled=is_narrow, cache_enabled=False)
    with torch.enable_grad(), narrow:
        schedule = Schedule(course.learning_rate, longest=math.inf)
        train(Weights(parameters, parameters), order, learn, None, schedule, context, name)
