"""`report.md` of a run or a comparison: the verdict first, the tables, then how it was measured, folded away.

The same text serves a pull request's step summary, where GitHub allows 1 MiB per step: folded detail goes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from infopt import figures, units
from infopt.comparison import Comparison
from infopt.judgement import Judgement
from infopt.report import summary
from infopt.report.tables import Row, arm_columns, by_figure, figure_text, range_text, verdict_rows, word
from infopt.result import Run

STEP_SUMMARY_BYTES = 1024 * 1024
_CUT = "\n\n*Cut here: a step summary holds 1 MiB. The whole report is in the results folder.*\n"
METHOD = {
    "live": (
        "Arms ran interleaved, in rounds of alternating direction (ABBA), on the same prompts and seeds; one block of each arm "
        "makes a pair. An effect is candidate ÷ baseline: exp of the Hodges–Lehmann estimate of the paired log-ratios, its "
        "interval the exact inversion of the Wilcoxon signed-rank test. Declared gates share the error level (Holm); every "
        "other figure informs."
    ),
    "stored": (
        "Stored runs of the same machine and method were compared. Their blocks are not paired, so a timing is decided only when "
        "the effect clears its threshold by more than twice the stored A/A standard deviation."
    ),
}


@dataclass(frozen=True)
class Section:
    """A piece of the report; `is_detail` may be left out where space is short."""

    text: str
    is_detail: bool = False


def run_report(run: Run) -> str:
    return _join(_run_sections(run))


def comparison_report(comparison: Comparison) -> str:
    return _join(_comparison_sections(comparison))


def step_summary(result: Run | Comparison, held_bytes: int = 0) -> str:
    """The report within what is left of GitHub's limit, `held_bytes` being what the summary file already holds.

    Details go first, the last one first; then the end is cut at a line. Empty when nothing fits.
    """
    room = STEP_SUMMARY_BYTES - held_bytes
    sections = list(_run_sections(result) if isinstance(result, Run) else _comparison_sections(result))
    while len(_join(sections).encode()) > room:
        detail = next((i for i in reversed(range(len(sections))) if sections[i].is_detail), None)
        if detail is None:
            return _cut(_join(sections), room)
        del sections[detail]
    return _join(sections)


def _cut(text: str, room: int) -> str:
    left = room - len(_CUT.encode())
    if left <= 0:
        return ""
    kept = text.encode()[:left].decode(errors="ignore")
    return kept[: kept.rfind("\n") + 1].rstrip() + _CUT


def _join(sections: Iterable[Section]) -> str:
    return "\n\n".join(section.text for section in sections) + "\n"


# --- Sections --------------------------------------------------------------------------------------------------------


def _comparison_sections(comparison: Comparison) -> list[Section]:
    lines = [
        f"- {f'**{word(line.verdict)}**: ' if line.verdict else ''}{cell(line.text)}"
        for line in summary.verdict_lines(comparison)
    ]
    sections = [
        Section(f"# {summary.headline(comparison)}: {cell(summary.contest(comparison))}"),
        Section("\n".join(lines)),
        Section(_arms_table(comparison)),
        Section("\n".join(f"{cell(line)}  " for line in _caption(comparison)).rstrip()),
    ]
    remarks = [*(f"Warning: {text}" for text in comparison.warnings), *summary.notes(comparison)]
    if remarks:
        sections.append(Section("\n".join(f"- {cell(text)}" for text in remarks)))
    sections += [_verdicts(f"{label} against {comparison.baseline}", found) for label, found in comparison.judgements.items()]
    if comparison.self_test:
        sections.append(_verdicts(f"A/A self-test: {comparison.baseline} against itself", comparison.self_test))
    sections.append(Section(f"## How it was measured\n\n{METHOD[comparison.mode]}"))
    keys = [*(key for arm in comparison.arms for key in arm.figures), *_judged_keys(comparison)]
    return sections + _details(comparison, keys)


def _judged_keys(comparison: Comparison) -> list[str]:
    return [each.figure for found in (*comparison.judgements.values(), comparison.self_test) for each in found]


def _run_sections(run: Run) -> list[Section]:
    arm = run.arm
    status = "" if run.is_complete else f"**Incomplete**: {cell(run.incomplete_reason or 'no reason recorded')}"
    rows = [
        [f"`{key}`", figure_text(key, value), range_text(key, value), _count(value.samples), value.reason or ""]
        for key, value in by_figure(run.figures)
    ]
    sections = [
        Section(f"# {cell(run.name)}: {cell(arm.model)} on {cell(arm.engine)}, {cell(arm.dtype)}, {cell(arm.device)}"),
        Section(status),
        Section("  \n".join(cell(line) for line in (*_conditions(run), *summary.references([arm])))),
        Section(table(["figure", "value", "95 % interval", "samples", ""], rows, "lrrrl") if rows else "No figures."),
        Section("\n".join(f"- Warning: {cell(warning)}" for warning in run.warnings)),
    ]
    return [section for section in sections if section.text] + _details(run, list(run.figures))


def _details(result: Run | Comparison, keys: Sequence[str]) -> list[Section]:
    sections = [Section(f"## Make it again\n\n```console\n$ {summary.reproduce(result)}\n```")]
    sections.append(Section(_folded("Machine", _listing(result.environment)), is_detail=True))
    sections.append(Section(_folded("Workload and settings", _listing({**result.workload, **result.settings})), is_detail=True))
    if isinstance(result, Comparison):
        absent = _absent(result)
        if absent:
            sections.append(Section(_folded("Why a figure is absent", absent), is_detail=True))
    sections.append(Section(_folded("What the figures mean", _definitions(keys)), is_detail=True))
    sections.append(Section(f"infopt {result.infopt_version}, {result.created_utc}, `{result.id}`"))
    return sections


def _conditions(result: Run | Comparison) -> list[str]:
    return [f"{summary.workload(result.workload)}; {summary.machine(result.environment)}"]


def _caption(comparison: Comparison) -> list[str]:
    pairs = f"{comparison.pairs} pairs, {comparison.mode}"
    return [f"{_conditions(comparison)[0]}; {pairs}", *summary.references([each.arm for each in comparison.arms])]


def _arms_table(comparison: Comparison) -> str:
    columns = arm_columns(comparison)
    rows = [[arm.label, *(column.cells[i] for column in columns)] for i, arm in enumerate(comparison.arms)]
    align = "l" + "".join("l" if column.verdicts else "r" for column in columns)
    return table(["arm", *(column.title for column in columns)], rows, align)


def _verdicts(title: str, judgements: Sequence[Judgement]) -> Section:
    rows = [
        [
            f"`{row.figure}`",
            row.baseline,
            row.candidate,
            row.effect,
            row.interval,
            row.threshold,
            _verdict(row),
            row.mde,
            row.note or "",
        ]
        for row in verdict_rows(judgements)
    ]
    head = ["figure", "baseline", "candidate", "effect", "95 % interval", "threshold", "verdict", "smallest visible", "note"]
    return Section(_folded(title, table(head, rows, "lrrrrllrl")), is_detail=True)


def _verdict(row: Row) -> str:
    return f"**{row.word}**" if row.is_gated else row.word


def _absent(comparison: Comparison) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for arm in comparison.arms:
        for key, value in arm.figures.items():
            if value.value is None and value.reason:
                found.setdefault((key, value.reason), []).append(arm.label)
    return "\n".join(f"- `{key}` ({cell(', '.join(labels))}): {cell(reason)}" for (key, reason), labels in found.items())


def _definitions(keys: Iterable[str]) -> str:
    names = dict.fromkeys(key if key in figures.FIGURES else key.rpartition(".")[0] for key in keys)
    known = [figures.FIGURES[name] for name in names if name in figures.FIGURES]
    return table(
        ["id", "unit", "better", "definition"], [[f"`{each.id}`", each.unit, each.better, each.about] for each in known], "llll"
    )


def _listing(nested: Mapping[str, Any]) -> str:
    rows = [[f"`{path}`", summary.plain(path, value)] for path, value in summary.flatten(nested)]
    return table(["setting", "value"], rows, "ll") if rows else "Nothing recorded."


def _count(samples: int | None) -> str:
    return units.ABSENT if samples is None else str(samples)


# --- Markdown --------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """A pipe table; `align` has one letter, l or r, per column."""
    rule = ["---:" if side == "r" else ":---" for side in align]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in (head, rule, *rows))


def cell(text: str) -> str:
    """Text that stays in its cell and cannot become markup."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())


def _folded(title: str, body: str) -> str:
    return f"<details>\n<summary>{escape(title)}</summary>\n\n{body}\n\n</details>"
