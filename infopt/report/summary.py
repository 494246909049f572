"""The sentences of a report: what was decided, against what reference, on which machine, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infopt import units
from infopt.comparison import ArmResult, Comparison
from infopt.judgement import Judgement, Verdict
from infopt.report.tables import SEVERITY, word, worst
from infopt.result import Arm, Run

_BYTES = "_bytes"


@dataclass(frozen=True)
class Line:
    """One line of the summary; `verdict` is None for a remark."""

    verdict: Verdict | None
    text: str


def text(line: Line) -> str:
    """The line with its verdict in front."""
    return line.text if line.verdict is None else f"{word(line.verdict)}: {line.text}"


def gated(comparison: Comparison, label: str) -> tuple[Judgement, ...]:
    return tuple(each for each in comparison.judgements.get(label, ()) if each.gate is not None)


def overall(comparison: Comparison) -> Verdict | None:
    """The worst gated verdict of all candidates; NOT_COMPARABLE counts without a gate. None when nothing was decided."""
    decided = [each.verdict for arm in comparison.candidates for each in gated(comparison, arm.label)]
    every = [each.verdict for judgements in comparison.judgements.values() for each in judgements]
    return Verdict.NOT_COMPARABLE if Verdict.NOT_COMPARABLE in every else worst(decided)


def headline(comparison: Comparison) -> str:
    """One word or two for the whole comparison."""
    verdict = overall(comparison)
    if not comparison.is_complete:
        return "INCOMPLETE"
    if any(arm.error for arm in comparison.arms) and verdict is not Verdict.FAIL:
        return "ERROR"
    return "NO GATES" if verdict is None else word(verdict)


def contest(comparison: Comparison) -> str:
    """`int8 against baseline`, or how many candidates there are."""
    labels = [arm.label for arm in comparison.candidates]
    return f"{labels[0] if len(labels) == 1 else f'{len(labels)} candidates'} against {comparison.baseline}"


def verdict_lines(comparison: Comparison) -> tuple[Line, ...]:
    """What was decided, worst first: `FAIL: int8_naive (kld.mean, ppl_ratio)`."""
    lines: list[Line] = []
    if not comparison.is_complete:
        lines.append(Line(None, f"This comparison is incomplete: {comparison.incomplete_reason or 'no reason recorded'}."))
    by_verdict: dict[Verdict, list[str]] = {verdict: [] for verdict in SEVERITY}
    for arm in comparison.candidates:
        judgements = () if arm.error else comparison.judgements.get(arm.label, ())
        if any(each.verdict is Verdict.NOT_COMPARABLE for each in judgements):
            by_verdict[Verdict.NOT_COMPARABLE].append(f"{arm.label} ({_reason(judgements)})")
            continue
        decided = [each for each in judgements if each.gate is not None]
        verdict = worst(each.verdict for each in decided)
        if verdict is not None:
            by_verdict[verdict].append(_arm_text(arm, decided, verdict))
    lines += [Line(verdict, ", ".join(texts)) for verdict, texts in by_verdict.items() if texts]
    has_gates = any(gated(comparison, arm.label) for arm in comparison.candidates)
    if comparison.is_complete and not has_gates and not any(by_verdict.values()):
        lines.append(Line(None, "No gates were declared: the figures inform, nothing decides."))
    lines += [Line(None, f"{arm.label} has no result: {arm.error}") for arm in comparison.arms if arm.error]
    return tuple(lines)


def _arm_text(arm: ArmResult, judgements: Sequence[Judgement], verdict: Verdict) -> str:
    if verdict in (Verdict.PASS, Verdict.IMPROVED):
        return arm.label
    return f"{arm.label} ({', '.join(dict.fromkeys(each.figure for each in judgements if each.verdict is verdict))})"


def _reason(judgements: Sequence[Judgement]) -> str:
    notes = [each.note for each in judgements if each.verdict is Verdict.NOT_COMPARABLE and each.note]
    return notes[0] if notes else "machine or method differ"


def notes(comparison: Comparison) -> tuple[str, ...]:
    """What the judgements on gates say about themselves, once each, with the arms it holds for.

    Figures that only inform have their smallest visible change in the table beside them.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for arm in comparison.candidates:
        for each in () if arm.error else comparison.judgements.get(arm.label, ()):
            if each.note and each.gate and each.verdict is not Verdict.NOT_COMPARABLE:
                found.setdefault((each.figure, each.note), []).append(arm.label)
    return tuple(f"{figure} ({', '.join(dict.fromkeys(labels))}): {note}" for (figure, note), labels in found.items())


def references(arms: Sequence[Arm]) -> tuple[str, ...]:
    """What was really loaded, one line when all arms share it; and how the engines ran it, where they tell."""
    described = dict.fromkeys(arm.reference for arm in arms)
    loaded = [f"reference: {arms[0].reference}"] if len(described) == 1 else [f"{arm.label}: {arm.reference}" for arm in arms]
    return (*loaded, *(f"{arm.label}: {note}" for arm in arms for note in arm.notes))


def machine(environment: Mapping[str, Any]) -> str:
    """`AMD EPYC 9R14, 2 cores, 2 threads, 25.2 GB`, with the accelerator in front where one was used."""
    device, processor = environment.get("device"), environment.get("cpu")
    words = [str(name) for name in (device if device != "cpu" or not processor else None, processor) if name]
    words += [f"{environment[key]} {key}" for key in ("cores", "threads") if environment.get(key)]
    if environment.get("memory_bytes"):
        words.append(units.size(environment["memory_bytes"]))
    return ", ".join(words) or "a machine that was not described"


def workload(described: Mapping[str, Any]) -> str:
    """`128 prompt tokens + 64 new tokens, batch 1`, or the workload's own name."""
    prompt, new, batch = described.get("prompt_tokens"), described.get("new_tokens"), described.get("batch")
    if prompt is None or new is None:
        name = str(described.get("name") or described.get("kind") or "unnamed workload")
        return f"{name}, batch {batch}" if batch else name
    return f"{prompt} prompt tokens + {new} new tokens, batch {batch if batch is not None else 1}"


def flatten(nested: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists as (dotted path, value)."""
    if isinstance(nested, Mapping):
        for key, value in nested.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(nested, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in nested):
        for index, value in enumerate(nested):
            yield from flatten(value, f"{path}.{index}")
    else:
        yield path, nested


def plain(path: str, value: Any) -> str:
    """A leaf of `flatten` for people."""
    if value is None:
        return units.ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or units.ABSENT
    if isinstance(value, (int, float)) and path.endswith(_BYTES):
        return units.size(value)
    if isinstance(value, float):
        return units.significant(value, 4)
    return str(value)


def reproduce(result: Run | Comparison) -> str:
    """The command that makes this result again, as recorded, or else from its arms."""
    command = result.settings.get("command")
    if command:
        return command if isinstance(command, str) else shlex.join(map(str, command))
    if isinstance(result, Run):
        return shlex.join(["infopt", "bench", result.arm.model, *_recipe(result.arm), "--engine", result.arm.engine])
    arms = [":".join([each.arm.model, str(each.arm.recipe.get("name", ""))]).rstrip(":") for each in result.arms]
    return shlex.join(["infopt", "compare", *arms])


def _recipe(arm: Arm) -> list[str]:
    name = arm.recipe.get("name")
    return ["--recipe", str(name)] if name else []
