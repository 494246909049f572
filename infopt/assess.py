"""Quality of candidates against a reference, all three tiers, in one process that holds two models at most.

fidelity    both models on the same windows of text
behaviour   both engines on the user's prompts, with their `expect:` rules
tasks       log-likelihood multiple choice
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from infopt import pipeline, techniques
from infopt.arms import ArmSpec
from infopt.data import choices, prompts, texts
from infopt.protocols import Progress
from infopt.quality import behaviour, fidelity, tasks
from infopt.result import Value
from infopt.settings import LoadOptions, QualitySettings

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

WINDOW_TOKENS = 512


def assess(
    reference: ArmSpec, candidates: Sequence[ArmSpec], options: LoadOptions, settings: QualitySettings, progress: Progress
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label, {"figures", "fidelity", "behaviour", "tasks", "reference"}) for each candidate in turn."""
    device = pipeline.device_name(options.device)
    pipeline.set_threads(options.threads)
    base = _Assessed(pipeline.open_arm(reference, device, options, progress), reference, settings, progress)
    for spec in candidates:
        bundle = pipeline.open_arm(spec, device, options, progress)
        candidate = _Assessed(bundle, spec, settings, lambda line, label=spec.label: progress(f"{label}: {line}"))  # type: ignore[misc]
        yield spec.label, candidate.against(base)
        del bundle, candidate
        gc.collect()


class _Assessed:
    """One open model; what is asked of the reference again is kept."""

    def __init__(self, bundle: Bundle, spec: ArmSpec, settings: QualitySettings, progress: Progress) -> None:
        self.bundle, self.spec, self.settings, self.progress = bundle, spec, settings, progress
        self._answers: list[behaviour.Answer] | None = None
        self._scores: list[tasks.ItemScore] | None = None

    def against(self, reference: _Assessed) -> dict[str, Any]:
        found: dict[str, Value] = {}
        details: dict[str, Any] = {"reference": reference.bundle.description}
        for tier in (self._fidelity, self._behaviour, self._tasks):
            figures, detail = tier(reference)
            found |= figures
            details |= detail
        return {"figures": {key: each.model_dump() for key, each in found.items()}, **details}

    def _fidelity(self, reference: _Assessed) -> tuple[dict[str, Value], dict[str, Any]]:
        if not self.settings.fidelity_tokens:
            return {}, {}
        import torch

        text = texts.read_text(self.settings.text or "bundled", "evaluation")
        self._require_unseen(text)
        length = min(WINDOW_TOKENS, self.settings.fidelity_tokens)
        ids = reference.bundle.tokenizer(text, verbose=False)["input_ids"]
        windows = texts.windows(ids, length, self.settings.fidelity_tokens // length)
        self.progress(f"fidelity: {len(windows)} windows of {length} tokens")
        with torch.inference_mode():
            result = fidelity.compare_models(
                fidelity.logits_of(reference.bundle.model), fidelity.logits_of(self.bundle.model), windows, self.progress
            )
        detail = {
            "text": self.settings.text or "bundled",
            "text_hash": texts.content_hash(text),
            "windows": len(windows),
            "window_tokens": length,
            "ppl": result.ppl,
            "ppl_reference": result.ppl_reference,
        }
        return result.figures(), {"fidelity": detail}

    def _require_unseen(self, text: str) -> None:
        """Raises InputError when a step was calibrated on what the arm is judged on."""
        chosen = self.spec.recipe
        if any(techniques.find(step.name)(step.options).needs.calibration for step in chosen.steps):
            texts.require_disjoint(texts.read_text(chosen.calibration.text, "calibration"), text)

    def _behaviour(self, reference: _Assessed) -> tuple[dict[str, Value], dict[str, Any]]:
        if not self.settings.behaviour_prompts:
            return {}, {}
        rows = self._rows()
        result = behaviour.compare_answers(
            rows, reference.answers(), self.answers(), behaviour.top_two_margin(fidelity.logits_of(reference.bundle.model))
        )
        detail: dict[str, Any] = {"prompts": len(rows), "checked": result.checked, "same": result.same}
        detail |= {status: result.count(status) for status in get_args(behaviour.Status)}
        detail |= {"repetition_reference": result.repetition_reference, "repetition": result.repetition}
        detail |= {"refusals_reference": result.refusals_reference, "refusals": result.refusals}
        detail["outcomes"] = [asdict(outcome) for outcome in result.outcomes]
        return result.figures(), {"behaviour": detail}

    def _tasks(self, reference: _Assessed) -> tuple[dict[str, Value], dict[str, Any]]:
        if not self.settings.choice_items:
            return {}, {}
        result = tasks.compare_scores(reference.scores(), self.scores())
        detail = {
            "items": result.total,
            "correct": result.correct,
            "correct_reference": result.correct_reference,
            "broken": list(result.broken),
            "fixed": list(result.fixed),
            "mcnemar_p": result.mcnemar_p,
            "mde": result.mde,
        }
        return result.figures(), {"tasks": detail}

    def answers(self) -> list[behaviour.Answer]:
        if self._answers is None:
            engine = pipeline.engine(self.bundle, self.spec.recipe)
            self._answers = behaviour.run_prompts(engine, self._rows(), self.bundle.tokenizer, progress=self.progress)
        return self._answers

    def scores(self) -> list[tasks.ItemScore]:
        if self._scores is None:
            file = self.settings.choices_file
            items = choices.read_choices(Path(file)) if file else choices.bundled_choices()
            model = tasks.masked_logits_of(self.bundle.model)
            self._scores = tasks.score_choices(
                model, self.bundle.tokenizer, items[: self.settings.choice_items], progress=self.progress
            )
        return self._scores

    def _rows(self) -> tuple[prompts.Prompt, ...]:
        path = Path(self.settings.prompts_file) if self.settings.prompts_file else prompts.BUNDLED_PROMPTS
        return prompts.read_prompts(path)[: self.settings.behaviour_prompts]
