"""Whether an arm is judged on what it was calibrated on: by runs of words in common (`infopt.data.overlap`).

An artifact keeps a fingerprint of its calibration text, so that it can be checked wherever it goes, without the text; so does
what was exported from it. One that lost its fingerprint is refused, as nobody can know what it has seen, unless its text was
infopt's own. What a model was trained on before infopt saw it, nobody here can know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from infopt import artifact, pipeline
from infopt.arms import ArmSpec
from infopt.data import choices, prompts, texts
from infopt.data.calibration import Source
from infopt.data.chats import contents
from infopt.data.overlap import RUN, Fingerprint, Piece, Words, pieces, quote, shares
from infopt.errors import InputError
from infopt.recipe import Recipe
from infopt.settings import QualitySettings

FILE = "calibration_runs.npy"
"""The fingerprint, in an artifact's folder; beside a GGUF file, after its name and a dot."""


class _Set(NamedTuple):
    tier: str
    name: str
    rows: Sequence[tuple[str, ...]]
    """What is compared of each."""


def found(spec: ArmSpec, settings: QualitySettings) -> dict[str, str]:
    """By tier of quality, what the arm's calibration text shares with it, in words; empty where nothing."""
    fingerprints, leaks = list(_fingerprints(spec)), dict[str, str]()
    sets = list(_sets(settings)) if fingerprints else []
    for known in fingerprints:
        if isinstance(known, Fingerprint):
            leaks |= _shared(known, sets)
        else:
            leaks |= dict.fromkeys((each.tier for each in sets), f"{known} is gone, so it may have seen what it is judged on")
    return leaks


def refuse(leaks: Mapping[str, str], label: str, is_allowed: bool) -> None:
    """Raises InputError for leaks that were not allowed."""
    if leaks and not is_allowed:
        raise InputError(
            f"{label}: {'; '.join(dict.fromkeys(leaks.values()))}",
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
    leaks: dict[str, str] = {}
    for known in _of_steps(chosen):
        if isinstance(known, Fingerprint):
            leaks |= _shared(known, list(_sets(QualitySettings())))
    refuse(leaks, chosen.name, is_allowed)
    return tuple(leaks.values())


def write(chosen: Recipe, source: Source | None, folder: Path) -> None:
    """The fingerprint of what an artifact's steps have read, and the models that taught it, into its folder."""
    known = [] if source is None else [Fingerprint.of(source.words())]
    known += [each for each in _of_models(chosen) if isinstance(each, Fingerprint)]
    if known:
        (folder / FILE).write_bytes(Fingerprint.joined(known).to_bytes())


def remarks(leaks: Mapping[str, str]) -> tuple[str, ...]:
    """What a report says of an arm that was judged all the same."""
    return tuple(f"judged all the same: {leak}" for leak in dict.fromkeys(leaks.values()))


def _fingerprints(spec: ArmSpec) -> Iterator[Fingerprint | Path]:
    """Of what the arm's weights were calibrated on, and will be; the path of one that is gone."""
    model = spec.model
    if spec.is_artifact:
        saved = artifact.read_artifact(Path(model))
        yield from _stored(saved.calibration_hash, Path(model).expanduser() / FILE)
        model = saved.reference
    if model.lower().endswith(".gguf"):
        yield from _stored(_exported_hash(Path(f"{model}.json").expanduser()), Path(f"{model}.{FILE}").expanduser())
    if not spec.is_artifact:
        yield from _of_steps(spec.recipe)


def _of_steps(chosen: Recipe) -> Iterator[Fingerprint | Path]:
    """Of what a recipe's steps read, and of what the models that they learn from have."""
    source = pipeline.calibration_source(chosen)
    if source is not None:
        yield Fingerprint.whole(source.words())
    yield from _of_models(chosen)


def _of_models(chosen: Recipe) -> Iterator[Fingerprint | Path]:
    for name in dict.fromkeys(name for step in pipeline.unchecked(chosen) for name in step.models):
        if artifact.is_artifact(Path(name)):
            yield from _fingerprints(ArmSpec(name, name, chosen, is_artifact=True))


def _stored(calibration_hash: str | None, path: Path) -> Iterator[Fingerprint | Path]:
    if path.is_file():
        yield Fingerprint.read(path)
    elif calibration_hash == texts.content_hash(own := texts.read_text("bundled", "calibration")):
        yield Fingerprint.whole(Words.of([Piece(0, 0, own)]))
    elif calibration_hash is not None:
        yield path


def _exported_hash(record: Path) -> str | None:
    """Of the text that a GGUF file's source was calibrated on; None for a file that infopt did not make. Raises InputError."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{record}: cannot be read as JSON: {error}", hint="export the model again: infopt export") from None
    return found.get("calibration_hash") if isinstance(found, dict) else None


def _shared(known: Fingerprint, sets: Sequence[_Set]) -> dict[str, str]:
    leaks: dict[str, str] = {}
    for each in sets:
        own = [Piece(row, 0, text) for row, said in enumerate(each.rows) for text in said]
        own = [piece._replace(stretch=number) for number, piece in enumerate(own)]
        rows = shares(Words.of(own), known)
        if not rows:
            continue
        worst = max(rows, key=lambda share: share.found / share.judged)
        runs = sum(share.found for share in rows if share.length == RUN)
        example = quote(own[worst.piece].text, worst.first, worst.length)
        where = f"{runs} runs of {RUN} words" if each.tier == "fidelity" else f"passages in {len(rows)} of {len(each.rows)}"
        leaks[each.tier] = f"calibration and {each.name} share {where}, e.g. {example!r}"
    return leaks


def _sets(settings: QualitySettings) -> Iterator[_Set]:
    """What an arm is judged on: each text, item or prompt a row."""
    if settings.fidelity_tokens:
        yield _Set("fidelity", "evaluation text", [(texts.read_text(settings.text or "bundled", "evaluation"),)])
    if settings.behaviour_prompts:
        path = Path(settings.prompts_file) if settings.prompts_file else prompts.BUNDLED_PROMPTS
        rows = prompts.read_prompts(path)[: settings.behaviour_prompts]
        asked = [row.text or "\n".join(contents(row.messages)) for row in rows]
        yield _Set("behaviour", "prompts", [pieces(text, text) for text in asked])
    if settings.choice_items:
        items = choices.read_choices(Path(settings.choices_file)) if settings.choices_file else choices.bundled_choices()
        chosen = items[: settings.choice_items]
        yield _Set("tasks", "multiple-choice items", [pieces(item.text, item.question) for item in chosen])
