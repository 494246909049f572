"""Whether an arm is judged on what it was calibrated on: by runs of words in common (`infopt.data.overlap`).

An artifact keeps a fingerprint of its calibration text, so that it can be checked wherever it goes, without the text. What a
model was trained on before infopt saw it, nobody here can know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from infopt import artifact, pipeline
from infopt.arms import ArmSpec
from infopt.data import choices, prompts, texts
from infopt.data.calibration import Source
from infopt.data.chats import contents
from infopt.data.overlap import RUN, Fingerprint, Piece, Words, quote, shares
from infopt.errors import InputError
from infopt.recipe import Recipe
from infopt.settings import QualitySettings

FILE = "calibration_runs.npy"
"""The fingerprint, in an artifact's folder."""


class _Set(NamedTuple):
    tier: str
    name: str
    rows: Sequence[str]


def found(spec: ArmSpec, settings: QualitySettings) -> dict[str, str]:
    """By tier of quality, what the arm's calibration text shares with it, in words; empty where nothing."""
    known = _fingerprint(spec)
    return {} if known is None else _shared(known, settings)


def refuse(leaks: Mapping[str, str], label: str, is_allowed: bool) -> None:
    """Raises InputError for leaks that were not allowed."""
    if leaks and not is_allowed:
        raise InputError(
            f"{label}: {'; '.join(leaks.values())}",
            hint="calibrate on other text, judge on other data, or say --allow-leakage, and the report says so",
        )


def require_unseen(specs: Sequence[ArmSpec], settings: QualitySettings | None, is_allowed: bool) -> None:
    """Refuses arms that would be judged on what they were calibrated on. Raises InputError."""
    if settings is not None and not is_allowed:
        for spec in specs:
            refuse(found(spec, settings), spec.label, is_allowed)


def of_recipe(chosen: Recipe, is_allowed: bool) -> tuple[str, ...]:
    """What a recipe's calibration text shares with the sets that infopt judges by unless it is given others. Raises
    InputError where it shares anything, unless that is allowed."""
    source = pipeline.calibration_source(chosen)
    leaks = {} if source is None else _shared(source.fingerprint(), QualitySettings())
    refuse(leaks, chosen.name, is_allowed)
    return tuple(leaks.values())


def write(source: Source | None, folder: Path) -> None:
    """The fingerprint of calibration text, into an artifact's folder."""
    if source is not None:
        (folder / FILE).write_bytes(source.fingerprint().to_bytes())


def remarks(spec: ArmSpec, leaks: Mapping[str, str]) -> tuple[str, ...]:
    """What a report says of an arm that was judged all the same: on what it has seen, or on what it may have seen."""
    lines = [f"judged on what it has seen: {leak}" for leak in leaks.values()]
    folder = Path(spec.model)
    if spec.is_artifact and artifact.read_artifact(folder).calibration_hash and not (folder / FILE).is_file():
        lines.append(f"there is no {FILE} in {spec.model}, so it may have been calibrated on what it is judged on")
    return tuple(lines)


def _fingerprint(spec: ArmSpec) -> Fingerprint | None:
    if spec.is_artifact:
        path = Path(spec.model) / FILE
        return Fingerprint.read(path) if path.is_file() else None
    source = pipeline.calibration_source(spec.recipe)
    return None if source is None else source.fingerprint()


def _shared(known: Fingerprint, settings: QualitySettings) -> dict[str, str]:
    leaks: dict[str, str] = {}
    for each in _sets(settings):
        words = Words.of((Piece(row, row, text) for row, text in enumerate(each.rows)), len(each.rows))
        rows = shares(words, known)
        if not rows:
            continue
        worst = max(rows, key=lambda share: share.found / share.judged)
        runs = sum(share.found for share in rows if share.length == RUN)
        example = quote(each.rows[worst.row], worst.first, worst.length)
        where = f"{runs} runs of {RUN} words" if each.tier == "fidelity" else f"passages in {len(rows)} of {len(each.rows)}"
        leaks[each.tier] = f"calibration and {each.name} share {where}, e.g. {example!r}"
    return leaks


def _sets(settings: QualitySettings) -> Iterator[_Set]:
    """What an arm is judged on: each text, item or prompt a row."""
    if settings.fidelity_tokens:
        yield _Set("fidelity", "evaluation text", [texts.read_text(settings.text or "bundled", "evaluation")])
    if settings.behaviour_prompts:
        path = Path(settings.prompts_file) if settings.prompts_file else prompts.BUNDLED_PROMPTS
        rows = prompts.read_prompts(path)[: settings.behaviour_prompts]
        yield _Set("behaviour", "prompts", [row.text or "\n".join(contents(row.messages)) for row in rows])
    if settings.choice_items:
        items = choices.read_choices(Path(settings.choices_file)) if settings.choices_file else choices.bundled_choices()
        chosen = items[: settings.choice_items]
        yield _Set("tasks", "multiple-choice items", [f"{item.question} {item.choices[item.answer]}" for item in chosen])
