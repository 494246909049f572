"""What `infopt data check` found, on a terminal: one line a finding, as linters print them, then a summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infopt import units
from infopt.findings import RULES, Audit, FileSummary, Finding

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLE = {"error": "red", "note": "yellow"}
_LABELS_SHOWN = 6


def shown(findings: Sequence[Finding], limit: int) -> tuple[tuple[Finding, ...], dict[str, int]]:
    """At most `limit` findings of each rule, the worst, in their order; and by rule how many are left out."""
    kept: set[int] = set()
    left: dict[str, int] = {}
    for rule in RULES:
        own = [index for index, finding in enumerate(findings) if finding.rule == rule]
        worst = sorted(own, key=lambda index: -findings[index].score)[:limit]
        kept.update(worst)
        if len(own) > len(worst):
            left[rule] = len(own) - len(worst)
    return tuple(finding for index, finding in enumerate(findings) if index in kept), left


def print_audit(audit: Audit, console: Console, limit: int) -> None:
    """`limit`: findings of each rule that get a line of their own."""
    findings, left = shown(audit.findings, limit)
    for finding in findings:
        console.print(str(finding), style=_STYLE[finding.level], markup=False, highlight=False, soft_wrap=True)
    for rule, count in left.items():
        console.print(f"… and {count} more of {rule} (--limit)", markup=False, highlight=False)
    if findings:
        console.print()
    console.print(_files_table(audit.files))
    counts = audit.by_rule()
    if counts:
        console.print()
        console.print(_rules_table(counts))
    errors = sum(file.errors for file in audit.files)
    notes = sum(file.notes for file in audit.files)
    verdict = f"{_count(errors, 'error')}, {_count(notes, 'note')} in {_count(len(audit.files), 'file')}"
    console.print()
    console.print(verdict, style="bold red" if errors else "bold", highlight=False)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        is_text = number == 0 or column in ("format", "labels", "what it means")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    return table


def _files_table(files: Sequence[FileSummary]) -> Table:
    from rich.text import Text

    has_tokens = any(file.tokens_total is not None for file in files)
    has_labels = any(file.labels for file in files)
    optional = [*(["tokens", "longest (tokens)"] if has_tokens else []), *(["labels"] if has_labels else [])]
    table = _table("file", "format", "rows", "median (chars)", "longest (chars)", *optional, "errors", "notes")
    for file in files:
        name = f"{file.file} (against)" if file.is_against else file.file
        cells = [name, file.format, str(file.rows), _number(file.chars_median), _number(file.chars_max)]
        cells += [_number(file.tokens_total), _number(file.tokens_max)] if has_tokens else []
        cells += [_labels(file)] if has_labels else []
        table.add_row(*map(Text, [*cells, str(file.errors), str(file.notes)]))
    return table


def _number(value: int | None) -> str:
    return units.ABSENT if value is None else str(value)


def _labels(file: FileSummary) -> str:
    """The most frequent labels, each with its share of the rows that have one."""
    total = sum(file.labels.values())
    parts = [f"{label} {units.percent(count / total)}" for label, count in list(file.labels.items())[:_LABELS_SHOWN]]
    more = len(file.labels) - _LABELS_SHOWN
    return ", ".join(parts) + (f", {more} more" if more > 0 else "") if parts else units.ABSENT


def _rules_table(counts: dict[str, int]) -> Table:
    table = _table("rule", "level", "findings", "what it means")
    for rule, count in counts.items():
        table.add_row(rule, RULES[rule].level, str(count), RULES[rule].about)
    return table


def print_rules(console: Console) -> None:
    """Every rule: its id, its level, what it finds."""
    table = _table("rule", "level", "what it means")
    for name, rule in RULES.items():
        table.add_row(name, rule.level, rule.about)
    console.print(table)
