"""Quality of candidates against a reference, all three tiers, in one process that holds two models at most.

fidelity    both models on the same windows of text
behaviour   both engines on the user's prompts, with their `expect:` rules
tasks       log-likelihood multiple choice

`check` refuses before anything is timed, and without reading a weight, what could not be judged. A tier that fails all
the same gives null figures with the reason: what was measured besides still stands.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from infopt import host, leakage, pipeline
from infopt.arms import ArmSpec, way
from infopt.data import choices, prompts, texts
from infopt.data.candidates import require_rules
from infopt.errors import InfoptError, InputError
from infopt.measure import memory
from infopt.model import load, shapes
from infopt.model.reference import fingerprint
from infopt.protocols import Progress
from infopt.quality import behaviour, fidelity, tasks, vocabularies
from infopt.quality.values import figure_value
from infopt.result import Value
from infopt.settings import LoadOptions, QualitySettings, portable

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

WINDOW_TOKENS = 512
_NO_QUALITY = "--no-quality leaves quality out"


def check(reference: ArmSpec, candidates: Sequence[ArmSpec], options: LoadOptions, settings: QualitySettings) -> None:
    """Raises InputError where text, prompts or items do not fit the models, or the models each other."""
    arms = [reference, *candidates]
    found = [pipeline.resolve(spec.model, options) for spec in arms]
    known = [shapes.shapes(each) for each in found]
    tokenizers = [load.open_tokenizer(each) for each in found]
    try:
        leakage.require_unseen(candidates, settings, options.allow_leakage)
        if settings.fidelity_tokens:
            text = _text(settings)
            for own, tokenizer in zip(known[1:], tokenizers[1:], strict=True):
                if vocabularies.between(tokenizers[0], tokenizer) is None:
                    fidelity.common_vocabulary(known[0].vocabulary, own.vocabulary)
            _windows(tokenizers[0](text, verbose=False)["input_ids"], settings, *(each.context for each in known))
        for spec, own, tokenizer in zip(arms, known, tokenizers, strict=True):
            if settings.behaviour_prompts:
                require_rules(_rows(settings), spec.recipe.sampling.choose)
            if settings.behaviour_prompts and own.context:
                behaviour.require_room(_rows(settings), tokenizer, own.context)
            if settings.choice_items:
                tasks.require_room(_items(settings), tokenizer, own.context or None)
    except InputError as error:
        raise InputError(f"quality cannot be judged: {error}", hint=error.hint or _NO_QUALITY) from None


def assess(
    reference: ArmSpec, candidates: Sequence[ArmSpec], options: LoadOptions, settings: QualitySettings, progress: Progress
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label, {"figures", "failed", "fidelity", "behaviour", "tasks", "reference", …}) for each candidate in turn.

    `failed`: by tier, why its figures are null.
    """
    device = host.device_name(options.device)
    host.set_threads(options.threads)
    base = _Assessed(pipeline.open_arm(reference, device, options, progress), reference, settings, progress)
    identity = {
        "reference": base.bundle.description,
        "reference_hash": fingerprint(pipeline.resolve(reference.model, options)),
        "reference_way": way(reference.recipe.as_dict()),
    }
    for spec in candidates:
        yield spec.label, identity | _against(base, spec, device, options)
        memory.release(device)


def _against(base: _Assessed, spec: ArmSpec, device: str, options: LoadOptions) -> dict[str, Any]:
    """Every tier of one candidate, whose model is gone when this returns."""

    def progress(line: str) -> None:
        base.progress(f"{spec.label}: {line}")

    wanted = _wanted(base.settings)
    try:
        candidate = _Assessed(pipeline.open_arm(spec, device, options, progress), spec, base.settings, progress)
        seen = leakage.found(spec, base.settings)
        remarks = leakage.remarks(seen)
    except Exception as error:
        failed = dict.fromkeys(wanted, _reason(error))
        return {"figures": {key: _null(key, failed[tier]) for tier in wanted for key in wanted[tier]}, "failed": failed}
    figures: dict[str, Any] = {}
    details: dict[str, Any] = {}
    failed = {}
    for tier, keys in wanted.items():
        try:
            leakage.refuse({each: seen[each] for each in seen if each == tier}, spec.label, options.allow_leakage)
            found, details[tier] = getattr(candidate, f"judge_{tier}")(base)
            figures |= {key: each.model_dump() for key, each in found.items()}
        except Exception as error:
            failed[tier] = _reason(error)
            figures |= {key: _null(key, failed[tier]) for key in keys}
    if remarks:
        details["leakage"] = remarks
    return {"figures": figures, "failed": failed, **details}


def _wanted(settings: QualitySettings) -> dict[str, tuple[str, ...]]:
    """The tiers that were asked for, each with its figures."""
    sizes = {"fidelity": settings.fidelity_tokens, "behaviour": settings.behaviour_prompts, "tasks": settings.choice_items}
    figures = {"fidelity": fidelity.FIGURES, "behaviour": behaviour.FIGURES, "tasks": tasks.FIGURES}
    return {tier: figures[tier] for tier, size in sizes.items() if size}


def _null(key: str, reason: str) -> dict[str, Any]:
    return figure_value(key, None, 0, reason=reason)[1].model_dump()


def _reason(error: Exception) -> str:
    """One line; what nobody foresaw goes to the log whole."""
    if isinstance(error, InfoptError):
        return str(error)
    traceback.print_exc()
    return f"{type(error).__name__}: {error}".split("\n")[0]


class _Assessed:
    """One open model; what is asked of the reference again is kept. A tier gives figures, and the facts beside them."""

    def __init__(self, bundle: Bundle, spec: ArmSpec, settings: QualitySettings, progress: Progress) -> None:
        self.bundle, self.spec, self.settings, self.progress = bundle, spec, settings, progress
        self._answers: list[behaviour.Answer] | None = None
        self._scores: list[tasks.ItemScore] | None = None

    @property
    def context(self) -> int:
        """0: the config does not say."""
        config: Any = self.bundle.model.config
        return getattr(config.get_text_config(), "max_position_embeddings", None) or 0

    def judge_fidelity(self, reference: _Assessed) -> tuple[dict[str, Value], dict[str, Any]]:
        text = _text(self.settings)
        ids = reference.bundle.tokenizer(text, verbose=False)["input_ids"]
        windows = _windows(ids, self.settings, reference.context, self.context)
        length = len(windows[0])
        self.progress(f"fidelity: {len(windows)} windows of {length} tokens")
        part = vocabularies.between(reference.bundle.tokenizer, self.bundle.tokenizer)
        result = fidelity.compare_models(
            fidelity.logits_of(reference.bundle.model), fidelity.logits_of(self.bundle.model), windows, self.progress, part=part
        )
        return result.figures(), {
            "text": portable(self.settings.text or "bundled"),
            "text_hash": texts.content_hash(text),
            "windows": len(windows),
            "window_tokens": length,
            "ppl": result.ppl,
            "ppl_reference": result.ppl_reference,
            **({} if part is None else {"tokens_in_pieces": part.lacking(windows)}),
        }

    def judge_behaviour(self, reference: _Assessed) -> tuple[dict[str, Value], dict[str, Any]]:
        rows, answers, tokenizer = _rows(self.settings), self.answers(), reference.bundle.tokenizer
        if not vocabularies.is_same(tokenizer, self.bundle.tokenizer):
            answers = behaviour.retokenised(answers, reference.answers(), tokenizer)
        result = behaviour.compare_answers(
            rows, reference.answers(), answers, behaviour.top_two_margin(fidelity.logits_of(reference.bundle.model))
        )
        detail: dict[str, Any] = {"prompts": len(rows), "prompts_hash": _hash(rows)}
        detail |= {"checked": result.checked, "same": result.same}
        detail |= {status: result.count(status) for status in get_args(behaviour.Status)}
        detail |= {"repetition_reference": result.repetition_reference, "repetition": result.repetition}
        detail |= {"refusals_reference": result.refusals_reference, "refusals": result.refusals}
        detail["outcomes"] = [asdict(outcome) for outcome in result.outcomes]
        return result.figures(), detail

    def judge_tasks(self, reference: _Assessed) -> tuple[dict[str, Value], dict[str, Any]]:
        result = tasks.compare_scores(reference.scores(), self.scores(), majority=tasks.majority(_items(self.settings)))
        return result.figures(), {
            "items": result.total,
            "items_hash": _hash(_items(self.settings)),
            "correct": result.correct,
            "correct_reference": result.correct_reference,
            "broken": list(result.broken),
            "fixed": list(result.fixed),
            "mcnemar_p": result.mcnemar_p,
            "mde": result.mde,
            "majority": result.majority,
        }

    def answers(self) -> list[behaviour.Answer]:
        if self._answers is None:
            engine = pipeline.engine(self.bundle, self.spec.recipe)
            rows = _rows(self.settings)
            self._answers = behaviour.run_prompts(
                engine, rows, self.bundle.tokenizer, progress=self.progress, sampling=self.spec.recipe.sampling
            )
        return self._answers

    def scores(self) -> list[tasks.ItemScore]:
        if self._scores is None:
            model = tasks.masked_logits_of(self.bundle.model)
            items = _items(self.settings)
            self._scores = tasks.score_choices(model, self.bundle.tokenizer, items, self.progress, self.context or None)
        return self._scores


def _text(settings: QualitySettings) -> str:
    return texts.read_text(settings.text or "bundled", "evaluation")


def _windows(ids: Sequence[int], settings: QualitySettings, *contexts: int) -> tuple[tuple[int, ...], ...]:
    """Windows as long as the text and the shortest context allow, 512 tokens at most. Raises InputError below 2."""
    length = min(WINDOW_TOKENS, settings.fidelity_tokens, len(ids), *(context for context in contexts if context))
    return texts.windows(ids, length, settings.fidelity_tokens // max(length, 1))


def _rows(settings: QualitySettings) -> tuple[prompts.Prompt, ...]:
    path = Path(settings.prompts_file) if settings.prompts_file else prompts.BUNDLED_PROMPTS
    return prompts.read_prompts(path)[: settings.behaviour_prompts]


def _items(settings: QualitySettings) -> tuple[choices.Item, ...]:
    items = choices.read_choices(Path(settings.choices_file)) if settings.choices_file else choices.bundled_choices()
    return items[: settings.choice_items]


def _hash(rows: Sequence[Any]) -> str:
    """sha256 of prompts or items, the file they lie in left out."""
    return texts.content_hash(json.dumps([asdict(row) | {"where": None} for row in rows], sort_keys=True, default=repr))
