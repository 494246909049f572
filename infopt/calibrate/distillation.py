"""Training a changed model to say what it said before: KL divergence to its own logits on the calibration text.

Hinton et al., Distilling the knowledge in a neural network, arXiv 1503.02531, at temperature 1, without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from infopt.errors import InputError

if TYPE_CHECKING:
    from infopt.protocols import Context

#: Positions whose log-probabilities over the vocabulary are held at a time.
POSITIONS = 64
#: Share of the steps in which the learning rate rises; Adam's first averages are of few gradients.
WARM_UP = 0.05


@dataclass(frozen=True)
class Schedule:
    """`epochs` times over the calibration text, `batch` windows a step; the learning rate falls linearly to zero."""

    epochs: int
    batch: int
    learning_rate: float

    def steps(self, windows: int) -> int:
        return self.epochs * -(-windows // self.batch)

    def rate(self, step: int, steps: int) -> float:
        """Of step `step`, counted from zero."""
        return self.learning_rate * min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * (1 - step / steps)


def distill(
    model: Any,
    parameters: list[torch.Tensor],
    teaching: Callable[[], AbstractContextManager[Any]],
    schedule: Schedule,
    context: Context,
    name: str,
) -> None:
    """Trains `parameters` in place so that the model answers as it does inside `teaching()`.

    The order of the windows depends on the seed alone. Raises InputError without text, and for a loss that is no number.
    """
    if not context.calibration_ids:
        raise InputError("a trained step needs text", hint="calibration: {text: bundled, samples: 128, tokens: 256}")
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    steps = schedule.steps(len(context.calibration_ids))
    # float16 gradients of logits, a vocabulary's share of a small number each, would be zero: bfloat16, even where it is slow.
    is_narrow = _has_fast_bfloat16(device) or model.dtype == torch.float16
    # No cache: it would keep answering with the parameters as they were before the first step.
    narrow = torch.autocast(device.type, torch.bfloat16, enabled=is_narrow, cache_enabled=False)
    with torch.enable_grad(), narrow:
        for step, ids in enumerate(_batches(context, schedule)):
            inputs = torch.tensor(ids, device=device)
            with teaching(), torch.no_grad():
                wanted = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
            logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
            loss, gradient = divergence(logits.detach(), wanted)
            if not loss == loss:  # NaN
                raise InputError(f"the loss of step {step + 1} is not a number", hint="lower learning_rate")
            logits.backward(gradient)
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
            context.progress(f"{name} step {step + 1}/{steps}, loss {loss:.3g}")


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean KL(softmax(wanted) ‖ softmax(logits)) in nats over positions, both [positions, vocabulary], and its gradient.

    ∂KL/∂logits = softmax(logits) − softmax(wanted); written out, so that float32 copies of a few positions are held at a
    time and not of all.
    """
    gradient, total = torch.empty_like(logits), 0.0
    for start in range(0, len(logits), POSITIONS):
        part = slice(start, start + POSITIONS)
        found, target = logits[part].float().log_softmax(-1), wanted[part].float().log_softmax(-1)
        probability = target.exp()
        total += float((probability * (target - found)).sum())
        gradient[part] = (found.exp_() - probability) / len(logits)
    return total / len(logits), gradient


def _batches(context: Context, schedule: Schedule) -> Iterator[list[tuple[int, ...]]]:
    windows = context.calibration_ids
    shuffle = torch.Generator().manual_seed(context.seed)
    for _ in range(schedule.epochs):
        order = torch.randperm(len(windows), generator=shuffle).tolist()
        for start in range(0, len(windows), schedule.batch):
            yield [windows[i] for i in order[start : start + schedule.batch]]


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones, and not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
