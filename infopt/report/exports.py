"""Results for other tools. Each format turns a run or a comparison into one or more files, as text by file name.

    benchmark-action  github-action-benchmark's custom JSON, one file for smaller-is-better and one for bigger-is-better
    bmf               Bencher Metric Format, intervals as lower_value and upper_value
    openmetrics       OpenMetrics text 1.0, one gauge family per figure
    csv               one row per figure, and one per judgement
    junit, html, markdown, json

A figure that is null is left out, never written as 0.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from infopt import figures
from infopt.comparison import Comparison
from infopt.errors import InputError, unknown
from infopt.figures import Figure
from infopt.result import Run, Value, dump

Result = Run | Comparison
Files = dict[str, str]

#: Base units in the words OpenMetrics wants as the end of a metric's name.
_METRIC_UNIT = {"s": "seconds", "bytes": "bytes", "share": "ratio", "ratio": "ratio", "W": "watts"}
_METRIC_NAME = {"J/tok": "joules_per_token", "tok/s": "tokens_per_second", "req/s": "requests_per_second"}
_OWN_UNIT = re.compile(r"_(s|bytes|j_per_token|tok_per_s|req_per_s|share|ratio|w)$")
_JUDGED = (
    "figure", "id", "unit", "gate", "comparison", "baseline", "candidate", "effect", "low", "high", "alpha", "p", "pairs",
    "pairs_needed", "mde", "tau", "verdict", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """`render` raises InputError for a result of a kind it does not know."""

    name: str
    about: str
    render: Callable[[Result], Files]


def export(result: Result, name: str) -> Files:
    """The result in the format of that name. Raises InputError for an unknown format or an unfit result."""
    if name not in FORMATS:
        raise InputError(unknown("format", name, FORMATS), hint="infopt results export --help")
    return FORMATS[name].render(result)


# --- Figures, one by one ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    label: str
    key: str
    figure: Figure
    statistic: str | None
    value: Value
    number: float


def _arms(result: Result) -> Iterator[tuple[str, Mapping[str, Value]]]:
    if isinstance(result, Run):
        yield result.arm.label, result.figures
    else:
        yield from ((arm.label, arm.figures) for arm in result.arms)


def _points(result: Result) -> Iterator[_Point]:
    """Every figure that has a value and is in the catalogue."""
    for label, found in _arms(result):
        for key, value in found.items():
            try:
                figure, statistic = figures.find(key)
            except InputError:
                continue
            if value.value is not None:
                yield _Point(label, key, figure, statistic, value, value.value)


def benchmark_action(result: Result) -> Files:
    """Two lists of {name, unit, value, range, extra}; the action wants one direction per file."""
    return {
        f"benchmark-{word}-is-better.json": _json([_entry(point) for point in _points(result) if point.figure.better == better])
        for word, better in (("smaller", "lower"), ("bigger", "higher"))
    }


def _entry(point: _Point) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": f"{point.label}: {point.key}", "unit": point.figure.unit, "value": point.number}
    low, high = point.value.low, point.value.high
    if low is not None and high is not None:
        entry["range"] = f"± {max(high - point.number, point.number - low):.4g}"
    return {**entry, "extra": point.value.id}


def bmf(result: Result) -> Files:
    """{arm: {figure: {value, lower_value, upper_value}}}."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for point in _points(result):
        bounds = {"value": point.number, "lower_value": point.value.low, "upper_value": point.value.high}
        found.setdefault(point.label, {})[point.key] = {key: number for key, number in bounds.items() if number is not None}
    return {"bencher.json": _json(found)}


def openmetrics(result: Result) -> Files:
    """Gauges `infopt_<figure>_<unit>{arm="…",statistic="…"}`; the samples of one family stand together."""
    families: dict[str, list[_Point]] = {}
    for point in _points(result):
        families.setdefault(point.figure.name, []).append(point)
    lines: list[str] = []
    for points in families.values():
        name, unit = _metric(points[0].figure)
        lines += [f"# TYPE {name} gauge", *([f"# UNIT {name} {unit}"] if unit else []), f"# HELP {name} {points[0].figure.about}"]
        lines += [f"{name}{{{_labels(point)}}} {point.number!r}" for point in points]
    return {"metrics.txt": "\n".join([*lines, "# EOF"]) + "\n"}


def _metric(figure: Figure) -> tuple[str, str | None]:
    """The metric's name, which ends in its unit, and that unit where OpenMetrics can name it."""
    stem = re.sub(r"[^a-z0-9_]", "_", _OWN_UNIT.sub("", figure.name).lower())
    unit = _METRIC_UNIT.get(figure.unit)
    if unit:
        return f"infopt_{stem}_{unit}", unit
    return "_".join(("infopt", stem, *([_METRIC_NAME[figure.unit]] if figure.unit in _METRIC_NAME else []))), None


def _labels(point: _Point) -> str:
    labels = {"arm": point.label, "id": point.value.id} | ({"statistic": point.statistic} if point.statistic else {})
    return ",".join(f'{key}="{_quoted(text)}"' for key, text in labels.items())


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# --- Tables ----------------------------------------------------------------------------------------------------------


def as_csv(result: Result) -> Files:
    """`figures.csv`, nulls included with their reason; for a comparison also `judgements.csv`."""
    rows = [
        [label, key, value.value, value.unit, value.low, value.high, value.samples, value.id, value.reason]
        for label, found in _arms(result)
        for key, value in found.items()
    ]
    head = ["arm", "figure", "value", "unit", "low", "high", "samples", "id", "reason"]
    made = {"figures.csv": _csv(head, rows)}
    if isinstance(result, Comparison):
        judged = [
            [result.baseline, label, *(getattr(each, name) for name in _JUDGED)]
            for label, found in result.judgements.items()
            for each in found
        ]
        made["judgements.csv"] = _csv(["baseline_arm", "arm", *_JUDGED], judged)
    return made


def _csv(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([head, *rows])
    return stream.getvalue()


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# --- Documents -------------------------------------------------------------------------------------------------------


def _document(result: Result) -> Files:
    return {"run.json" if isinstance(result, Run) else "compare.json": dump(result)}


def _markdown(result: Result) -> Files:
    from infopt.report.markdown import comparison_report, run_report

    return {"report.md": run_report(result) if isinstance(result, Run) else comparison_report(result)}


def _html(result: Result) -> Files:
    from infopt.report.html import comparison_html

    return {"report.html": comparison_html(_compared(result, "html"))}


def _junit(result: Result) -> Files:
    from infopt.report.junit import junit_xml

    return {"junit.xml": junit_xml(_compared(result, "junit"))}


def _compared(result: Result, name: str) -> Comparison:
    if isinstance(result, Comparison):
        return result
    raise InputError(f"{name} shows verdicts, and a single run has none", hint="export a comparison: infopt compare A B")


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format("markdown", "report.md: verdict, tables, method", _markdown),
        Format("html", "one self-contained page with interval plots (comparisons)", _html),
        Format("json", "the stored document itself", _document),
        Format("csv", "figures.csv, and judgements.csv of a comparison", as_csv),
        Format("junit", "JUnit XML, one case per gate (comparisons)", _junit),
        Format("benchmark-action", "github-action-benchmark: two JSON files, one per direction", benchmark_action),
        Format("bmf", "Bencher Metric Format", bmf),
        Format("openmetrics", "OpenMetrics text, one gauge per figure", openmetrics),
    )
}
