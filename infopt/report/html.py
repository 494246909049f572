"""A comparison as one self-contained HTML page: nothing is fetched, nothing runs; it follows light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from infopt import figures
from infopt.comparison import Comparison
from infopt.judgement import Verdict
from infopt.report import forest, summary
from infopt.report.markdown import METHOD
from infopt.report.style import CSS
from infopt.report.tables import Column, Row, arm_columns, verdict_rows, word

VERDICT_COLUMNS = ("figure", "baseline", "candidate", "effect", "95 % interval", "threshold", "verdict", "smallest visible")


def comparison_html(comparison: Comparison) -> str:
    """The whole page."""
    title = (
        f"{summary.headline(comparison)}: {', '.join(arm.label for arm in comparison.candidates)} against {comparison.baseline}"
    )
    body = "\n".join(
        (
            _header(comparison),
            _section("Arms", _arms(comparison)),
            _remarks(comparison),
            _plots(comparison),
            _judgements(comparison),
            _details(comparison),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(comparison: Comparison) -> str:
    lines = "\n".join(
        f"<li>{_badge(line.verdict) if line.verdict else ''}<span>{escape(line.text)}</span></li>"
        for line in summary.verdict_lines(comparison)
    )
    facts = [
        summary.workload(comparison.workload),
        summary.machine(comparison.environment),
        f"{comparison.pairs} pairs, {comparison.mode}",
        *summary.references([each.arm for each in comparison.arms]),
    ]
    overall = summary.overall(comparison)
    tone = overall.value.lower() if overall else "informs"
    heading = escape(summary.headline(comparison).capitalize())
    return (
        f'<header>\n<p class="kicker">infopt compare: {escape(summary.contest(comparison))}</p>\n'
        f'<h1 class="{tone}">{heading}</h1>\n'
        f'<ul class="verdicts">\n{lines}\n</ul>\n<p class="facts">{"<br>".join(map(escape, facts))}</p>\n</header>'
    )


def _badge(verdict: Verdict | None, is_gated: bool = True) -> str:
    tone = verdict.value.lower() if verdict and is_gated else "informs"
    return f'<span class="badge {tone}">{escape(word(verdict, is_gated))}</span>'


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _table(head: Sequence[str], groups: Iterable[Iterable[Iterable[str]]]) -> str:
    """Groups of rows of cells; a cell is HTML already, its `<th …>` or `<td …>` included."""
    bodies = ("\n".join(f"<tr>{''.join(row)}</tr>" for row in rows) for rows in groups)
    body = "\n".join(f"<tbody>\n{rows}\n</tbody>" for rows in bodies)
    return f'<div class="scroll"><table>\n<thead><tr>{"".join(head)}</tr></thead>\n{body}\n</table></div>'


# --- Sections --------------------------------------------------------------------------------------------------------


def _arms(comparison: Comparison) -> str:
    columns = arm_columns(comparison)
    tables = [[c for c in columns if not c.verdicts], [c for c in columns if c.verdicts]]
    return "\n".join(_arm_table(comparison, found) for found in tables if found)


def _arm_table(comparison: Comparison, columns: Sequence[Column]) -> str:
    rows = (
        [f"<th>{escape(arm.label)}</th>", *(_arm_cell(column, index) for column in columns)]
        for index, arm in enumerate(comparison.arms)
    )
    return _table(["<th>arm</th>", *map(_arm_head, columns)], [rows])


def _arm_head(column: Column) -> str:
    name, _, unit = column.title.partition(" (")
    side = "" if column.verdicts else ' class="number"'
    small = f" <small>({escape(unit)}</small>" if unit else ""
    return f'<th{side} title="{escape(column.key)}">{escape(name)}{small}</th>'


def _arm_cell(column: Column, index: int) -> str:
    if not column.verdicts:
        return f'<td class="number">{escape(column.cells[index])}</td>'
    verdict = column.verdicts[index]
    return f"<td>{_badge(verdict)}</td>" if verdict else f'<td class="quiet">{escape(column.cells[index])}</td>'


def _remarks(comparison: Comparison) -> str:
    remarks = [f"<li><strong>Warning</strong> {escape(warning)}</li>" for warning in comparison.warnings]
    remarks += [f"<li>{escape(note)}</li>" for note in summary.notes(comparison)]
    return f'<ul class="remarks">\n{chr(10).join(remarks)}\n</ul>' if remarks else ""


def _plots(comparison: Comparison) -> str:
    drawn = [
        f"<figure>\n<figcaption><code>{escape(figure)}</code> {escape(_caption(figure))}</figcaption>\n{svg}\n</figure>"
        for figure, svg in forest.plots(comparison)
    ]
    if not drawn:
        return ""
    legend = (
        '<p class="legend">Point and bar: effect and its interval. Small dots: one pair of blocks each. '
        "Dashed line: threshold; shaded: beyond it.</p>"
    )
    return _section("Effects", f'{legend}\n<div class="plots">\n{chr(10).join(drawn)}\n</div>')


def _caption(key: str) -> str:
    figure, _ = figures.find(key)
    return f"{figure.better} is better"


def _judgements(comparison: Comparison) -> str:
    judged = {f"{label} against {comparison.baseline}": found for label, found in comparison.judgements.items()}
    if comparison.self_test:
        judged[f"A/A self-test: {comparison.baseline} against itself"] = comparison.self_test
    words = {"figure", "threshold", "verdict"}
    head = [f"<th{'' if name in words else ' class=number'}>{name}</th>" for name in VERDICT_COLUMNS]
    groups = ([[_group(title)], *(_judged_row(row) for row in verdict_rows(found))] for title, found in judged.items())
    return _section("Verdicts", _table(head, ([list(row) for row in group] for group in groups))) if judged else ""


def _group(title: str) -> str:
    return f'<th class="group" scope="rowgroup" colspan="{len(VERDICT_COLUMNS)}">{escape(title)}</th>'


def _judged_row(row: Row) -> list[str]:
    numbers = [f'<td class="number">{escape(text)}</td>' for text in (row.baseline, row.candidate, row.effect, row.interval)]
    note = f' title="{escape(row.note)}"' if row.note else ""
    badge = f"<td{note}>{_badge(row.verdict, row.is_gated)}</td>"
    return [
        f"<th><code>{escape(row.figure)}</code></th>", *numbers, f"<td>{escape(row.threshold)}</td>", badge,
        f'<td class="number">{escape(row.mde)}</td>',
    ]  # fmt: skip


def _details(comparison: Comparison) -> str:
    keys = [key for arm in comparison.arms for key in arm.figures]
    names = dict.fromkeys(key if key in figures.FIGURES else key.rpartition(".")[0] for key in keys)
    meanings = [
        (f"{name}.v{figures.FIGURES[name].version}", figures.FIGURES[name].about) for name in names if name in figures.FIGURES
    ]
    listing = [(path, summary.plain(path, value)) for path, value in summary.flatten(comparison.environment)]
    chosen = summary.flatten({**comparison.workload, **comparison.settings})
    settings = [(path, summary.plain(path, value)) for path, value in chosen]
    folded = [_folded("What the figures mean", meanings), _folded("Machine", listing), _folded("Workload and settings", settings)]
    return _section(
        "How it was measured",
        f"<p>{escape(METHOD[comparison.mode])}</p>\n<pre>$ {escape(summary.reproduce(comparison))}</pre>\n"
        + "\n".join(folded)
        + f'\n<p class="facts">infopt {escape(comparison.infopt_version)}, {escape(comparison.created_utc)}, '
        f"<code>{escape(comparison.id)}</code></p>",
    )


def _folded(title: str, pairs: Iterable[tuple[str, str]]) -> str:
    rows = "\n".join(f"<dt><code>{escape(name)}</code></dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return f"<details><summary>{escape(title)}</summary>\n<dl>\n{rows}\n</dl></details>"
