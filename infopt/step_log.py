"""What each step of a recipe did: seconds, memory, stored bytes, and how far the model is from where it started.

Order matters when steps follow one another, so each is judged by itself, on a little text that no step was calibrated on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infopt.artifact import StepQuality, StepRecord
from infopt.data import texts
from infopt.measure import memory
from infopt.model import save
from infopt.model.quiet import quiet
from infopt.pipeline import Observer
from infopt.protocols import Progress
from infopt.quality import fidelity, vocabularies
from infopt.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from infopt.model.bundle import Bundle

#: The text that steps are judged on; the reference's logits for it are held in memory while the steps run.
WINDOWS, TOKENS = 4, 256


@dataclass
class _Step:
    seconds: float = 0.0
    peak_bytes: int | None = None
    weights_bytes: int | None = None
    quality: StepQuality | None = None


class StepLog(Observer):
    """Watches `pipeline.build`. `judge`: also measure quality after each step; a recipe of one step needs none."""

    def __init__(self, chosen: Recipe, device: str, judge: bool, progress: Progress) -> None:
        self.recipe, self.device, self.progress = chosen, device, progress
        self.wants_reference = judge
        self._steps: dict[int, _Step] = {}
        self._windows: list[tuple[int, ...]] = []
        self._reference: list[torch.Tensor] = []
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def loaded(self, bundle: Bundle) -> None:
        """Keeps the logits of the model as it was."""
        self._windows, self._tokenizer = _windows(bundle), bundle.tokenizer
        self._reference = [_logits(bundle, window) for window in self._windows]

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        memory.reset_peak(self.device)
        children = memory.child_peak_bytes()
        start = time.perf_counter()
        yield
        seconds, peak = time.perf_counter() - start, memory.peak_bytes(self.device)
        # A step that works out of process holds its memory there.
        if memory.child_peak_bytes() > children and not self.device.startswith("cuda"):
            peak = max(peak or 0, memory.child_peak_bytes())
        self._steps[index] = _Step(seconds, peak)

    def done(self, index: int, bundle: Bundle) -> None:
        """Judges the model after a step, unless running it now would spoil it: some quantizers repack at the first run."""
        step = self._steps[index]
        step.weights_bytes = save.stored_bytes(bundle)
        if index + 1 < len(self.recipe.steps) and getattr(bundle.model, "hf_quantizer", None) is None:
            self.judge(index, bundle)

    def judge(self, index: int, bundle: Bundle) -> None:
        """Compares `bundle` with the model as it was."""
        if self._tokenizer is None:
            return
        self.progress(f"judging {self.recipe.steps[index].name}")
        stored = iter(self._reference)
        with quiet():
            found = fidelity.compare_models(
                lambda ids: next(stored)[None],
                lambda ids: _run(bundle, ids)[None],
                self._windows,
                part=vocabularies.between(self._tokenizer, bundle.tokenizer),
            )
        kld, ratio, top1 = found.kld_mean, found.ppl_ratio, found.top1_agreement
        if kld is None or ratio is None or top1 is None:
            return
        self._steps[index].quality = StepQuality(
            tokens=found.positions,
            kld_mean=kld.estimate, kld_low=kld.low, kld_high=kld.high,
            ppl_ratio=ratio.estimate, ppl_ratio_low=ratio.low, ppl_ratio_high=ratio.high,
            top1_agreement=top1.estimate,
        )  # fmt: skip

    def records(self, first_at_load: int) -> tuple[StepRecord, ...]:
        """One record per step of the recipe, in order."""
        found = []
        for index, step in enumerate(self.recipe.steps):
            seen = self._steps.get(index, _Step())
            options = step.options.model_dump(mode="json")
            found.append(
                StepRecord(
                    name=step.name,
                    options=options,
                    seconds=seen.seconds,
                    peak_bytes=seen.peak_bytes,
                    weights_bytes=seen.weights_bytes,
                    quality=seen.quality,
                    is_at_load=index >= first_at_load,
                )
            )
        return tuple(found)


def _windows(bundle: Bundle) -> list[tuple[int, ...]]:
    ids = bundle.tokenizer(texts.read_text("bundled", "evaluation"), verbose=False)["input_ids"]
    return list(texts.windows(ids, TOKENS, WINDOWS))


def _logits(bundle: Bundle, window: tuple[int, ...]) -> torch.Tensor:
    import torch

    with torch.inference_mode(), quiet():
        return _run(bundle, torch.tensor([window]))


def _run(bundle: Bundle, ids: torch.Tensor) -> torch.Tensor:
    """[1, tokens] → [tokens, vocabulary] float32 on the host."""
    logits: torch.Tensor = bundle.model(input_ids=ids.to(bundle.device), use_cache=False).logits[0]
    return logits.float().cpu()
