"""Results on a terminal: tables that stack when it is narrow, so that nothing is cut off.

Colour follows rich's own rules: none with NO_COLOR, none when the output is not a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infopt import figures, units
from infopt.comparison import Comparison
from infopt.judgement import Verdict
from infopt.report import summary
from infopt.report.tables import Column, Row, arm_columns, figure_text, range_text, verdict_rows
from infopt.result import Run, Value

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

STYLE = {
    Verdict.PASS: "green",
    Verdict.IMPROVED: "bold green",
    Verdict.FAIL: "bold red",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.NOT_COMPARABLE: "magenta",
}
#: Columns of the verdict table that go first when it does not fit.
_DISPENSABLE = ("smallest visible", "baseline", "candidate", "threshold")


def print_run(run: Run, console: Console, folder: Path | None = None) -> None:
    """One run: the distribution of what was sampled, then every single figure."""
    arm = run.arm
    _print(console, f"{run.name}: {arm.model} on {arm.engine}, {arm.dtype}, {arm.device}", "bold")
    _print(console, f"{summary.workload(run.workload)}; {summary.machine(run.environment)}")
    if not run.is_complete:
        _print(console, f"incomplete: {run.incomplete_reason or 'no reason recorded'}", "bold red")
    sampled, single = _split(run.figures)
    if sampled:
        _show(console, _sampled_table(sampled))
    if single:
        _show(console, _single_table(single))
    console.print()
    _print_warnings(console, run.warnings, summary.references([arm]))
    _print_folder(console, folder)


def print_comparison(comparison: Comparison, console: Console, folder: Path | None = None) -> None:
    """All arms side by side, then every judgement, then what to do about weak ones."""
    what = f"{summary.contest(comparison)}, {comparison.pairs} pairs, {comparison.mode}"
    _print(console, f"{what}; {summary.workload(comparison.workload)}; {summary.machine(comparison.environment)}")
    for table in _arm_tables(comparison, console):
        _show(console, table)
    judged = {f"{label} against {comparison.baseline}": found for label, found in comparison.judgements.items()}
    judged[f"A/A self-test: {comparison.baseline} against itself"] = comparison.self_test
    _print_verdicts(console, {title: verdict_rows(found) for title, found in judged.items() if found})
    console.print()
    for note in summary.notes(comparison):
        _print(console, f"note: {note}", "dim")
    _print_warnings(console, comparison.warnings, summary.references([each.arm for each in comparison.arms]))
    for line in summary.verdict_lines(comparison):
        _print(console, summary.text(line), STYLE[line.verdict] if line.verdict else "bold")
    _print_folder(console, folder)


def _print_warnings(console: Console, warnings: Iterable[str], references: Iterable[str]) -> None:
    for warning in warnings:
        _print(console, f"warning: {warning}", "yellow")
    for line in references:
        _print(console, line)


def _print_folder(console: Console, folder: Path | None) -> None:
    if folder is not None:
        _print(console, f"report: {folder}")


def _print(console: Console, line: str, style: str | None = None) -> None:
    """Text from results is never markup."""
    console.print(line, style=style, markup=False, highlight=False)


def _show(console: Console, table: Table) -> None:
    console.print()
    console.print(table)


def _table(title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading = None if title is None else Text(title, style="bold")
    return Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))


# --- Arms ------------------------------------------------------------------------------------------------------------


def _arm_tables(comparison: Comparison, console: Console) -> list[Table]:
    """As few tables as the width allows: whole groups of columns where they fit, single columns where they do not."""
    labels = [arm.label for arm in comparison.arms]
    packed: list[list[Column]] = []
    for group in _groups(arm_columns(comparison)):
        fits = _fits(console, lambda columns: _arm_table(labels, columns))
        if packed and fits([*packed[-1], *group]):
            packed[-1] += group
        elif fits(group):
            packed.append(group)
        else:
            packed += _pack(group, fits)
    return [_arm_table(labels, columns) for columns in packed]


def _groups(columns: Sequence[Column]) -> list[list[Column]]:
    names = dict.fromkeys(column.group for column in columns)
    return [[column for column in columns if column.group == name] for name in names]


def _pack(columns: Sequence[Column], fits: Callable[[Sequence[Column]], bool]) -> list[list[Column]]:
    packed: list[list[Column]] = [[]]
    for column in columns:
        if packed[-1] and not fits([*packed[-1], column]):
            packed.append([])
        packed[-1].append(column)
    return packed


def _fits(console: Console, build: Callable[[Sequence[Column]], Table]) -> Callable[[Sequence[Column]], bool]:
    return lambda columns: _width(console, build(columns)) <= console.width


def _width(console: Console, table: Table) -> int:
    """The width the table would like, not limited by the console's."""
    from rich.measure import Measurement

    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _arm_table(labels: Sequence[str], columns: Sequence[Column]) -> Table:
    from rich.text import Text

    table = _table()
    table.add_column("arm", no_wrap=True)
    for column in columns:
        table.add_column(Text(column.title.replace(" (", "\n(")), justify="left" if column.verdicts else "right", no_wrap=True)
    for index, label in enumerate(labels):
        table.add_row(Text(label), *(_arm_cell(column, index) for column in columns))
    return table


def _arm_cell(column: Column, index: int) -> Text:
    from rich.text import Text

    verdict = column.verdicts[index] if column.verdicts else None
    is_remark = bool(column.verdicts) and verdict is None
    return Text(column.cells[index], style=STYLE[verdict] if verdict else "dim" if is_remark else "")


# --- Verdicts --------------------------------------------------------------------------------------------------------


def _print_verdicts(console: Console, judged: Mapping[str, Sequence[Row]]) -> None:
    """One table per title, all with the same columns and widths."""
    rows = [row for found in judged.values() for row in found]
    columns = _verdict_columns()
    for name in _DISPENSABLE:
        if _width(console, _verdict_table(columns, rows, rows)) <= console.width:
            break
        columns = {title: cell for title, cell in columns.items() if title != name}
    for title, found in judged.items():
        _show(console, _verdict_table(columns, found, rows, title))


def _verdict_columns() -> dict[str, Callable[[Row], str]]:
    return {
        "figure": lambda row: row.figure,
        "baseline": lambda row: row.baseline,
        "candidate": lambda row: row.candidate,
        "effect": lambda row: row.effect,
        "95 % interval": lambda row: row.interval,
        "threshold": lambda row: row.threshold,
        "verdict": lambda row: row.word,
        "smallest visible": lambda row: row.mde,
    }


def _verdict_table(
    columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row], widest: Sequence[Row], title: str | None = None
) -> Table:
    """`widest`: the rows of all tables that should line up."""
    from rich.text import Text

    table = _table(title)
    for name, cell in columns.items():
        is_word = name in ("figure", "threshold", "verdict")
        table.add_column(
            name, justify="left" if is_word else "right", overflow="fold", min_width=max(len(cell(row)) for row in widest)
        )
    for row in rows:
        style = STYLE[row.verdict] if row.verdict and row.is_gated else "dim"
        table.add_row(*(Text(cell(row), style=style if name == "verdict" else "") for name, cell in columns.items()))
    return table


# --- One run ---------------------------------------------------------------------------------------------------------


def _split(found: dict[str, Value]) -> tuple[dict[str, dict[str, Value]], dict[str, Value]]:
    """Sampled figures as name → statistic → value, and the single ones by key; keys of another catalogue are single."""
    sampled: dict[str, dict[str, Value]] = {}
    single: dict[str, Value] = {}
    for key, value in found.items():
        name, _, statistic = key.rpartition(".")
        if name in figures.FIGURES and figures.FIGURES[name].sampled:
            sampled.setdefault(name, {})[statistic] = value
        else:
            single[key] = value
    return sampled, single


def _sampled_table(sampled: dict[str, dict[str, Value]]) -> Table:
    present = {statistic for values in sampled.values() for statistic in values}
    shown = [statistic for statistic in figures.STATISTICS if statistic in present]
    table = _table()
    table.add_column("figure")
    for statistic in shown:
        table.add_column(statistic, justify="right", no_wrap=True)
    table.add_column("samples", justify="right")
    for name, values in sampled.items():
        count = next((value.samples for value in values.values() if value.samples is not None), None)
        cells = [figure_text(name, values.get(statistic)) for statistic in shown]
        table.add_row(name, *cells, units.ABSENT if count is None else str(count))
    return table


def _single_table(single: dict[str, Value]) -> Table:
    from rich.text import Text

    table = _table()
    table.add_column("figure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("")
    for key, value in single.items():
        table.add_row(key, figure_text(key, value), range_text(key, value), Text(value.reason or "", style="dim"))
    return table
