"""The README's generated tables: results between one pair of markers, techniques between another.

    <!-- results:begin -->  …  <!-- results:end -->
    <!-- techniques:begin -->  …  <!-- techniques:end -->

Everything between the markers is replaced; everything else stays. A test renders again and fails on a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infopt import units
from infopt.comparison import ArmResult, Comparison, read_comparison
from infopt.errors import InputError
from infopt.figures import FIGURES
from infopt.judgement import Verdict
from infopt.report import summary
from infopt.report.markdown import cell, table
from infopt.report.tables import arm_columns, word, worst


@dataclass(frozen=True)
class TechniqueRow:
    """One technique as its docstring tells it. `acts`: load, weights or generation. `paper`: a Markdown link or empty."""

    name: str
    idea: str
    acts: str
    needs: str
    paper: str
    source: str
    recipe: str


def read_examples(root: Path) -> dict[str, Comparison]:
    """Every comparison in `root`/results/examples, by its folder's path from `root`. Raises InputError when there is none."""
    folder = root / "results" / "examples"
    found = {path.parent.relative_to(root).as_posix(): path.parent for path in sorted(folder.glob("*/compare.json"))}
    if not found:
        raise InputError(f"{folder}: holds no comparison", hint="copy the folder of a finished `infopt compare` there")
    return {link: read_comparison(path) for link, path in found.items()}


def with_results(readme: str, examples: Mapping[str, Comparison]) -> str:
    """`readme` with its results made again: one table per example, whose key is the folder to link to."""
    return _replace(readme, "results", "\n\n".join(_example(link, each) for link, each in examples.items()))


def with_techniques(readme: str, rows: Sequence[TechniqueRow]) -> str:
    """`readme` with its technique table made again."""
    head = ["technique", "idea", "acts at", "needs", "paper", "source", "recipe"]
    cells = [
        [
            f"`{row.name}`",
            row.idea,
            row.acts,
            row.needs or units.ABSENT,
            row.paper or units.ABSENT,
            _link(row.source),
            _link(row.recipe),
        ]
        for row in rows
    ]
    return _replace(readme, "techniques", table(head, cells, "lllllll"))


def with_figures(document: str) -> str:
    """`document` with its table of figures made again from the catalogue."""
    cells = [
        [f"`{figure.name}`", figure.unit, figure.better, "per request" if figure.sampled else "per run", cell(figure.about)]
        for figure in FIGURES.values()
    ]
    return _replace(document, "figures", table(["figure", "unit", "better", "one value", "definition"], cells, "lllll"))


def _link(path: str) -> str:
    return f"[{Path(path).name}]({path})" if path else units.ABSENT


def _replace(readme: str, name: str, body: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise InputError(f"the README needs one {begin} and, after it, one {end}")
    before, _, rest = readme.partition(begin)
    after = rest.partition(end)[2]
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"


def _example(link: str, comparison: Comparison) -> str:
    columns = [column for column in arm_columns(comparison) if not column.verdicts]
    head = ["recipe", *(column.title for column in columns), "verdict"]
    rows = [
        [f"`{arm.label}`", *(column.cells[i] for column in columns), _verdict(comparison, arm)]
        for i, arm in enumerate(comparison.arms)
    ]
    return f"{table(head, rows, 'l' + 'r' * len(columns) + 'l')}\n\n{_caption(link, comparison)}"


def _verdict(comparison: Comparison, arm: ArmResult) -> str:
    if arm.error:
        return arm.error
    if arm.label == comparison.baseline:
        return "baseline"
    judged = summary.gated(comparison, arm.label)
    verdict = worst(each.verdict for each in judged)
    if verdict in (None, Verdict.PASS, Verdict.IMPROVED):
        return f"**{word(verdict)}**" if verdict else units.ABSENT
    return f"**{word(verdict)}** ({', '.join(dict.fromkeys(each.figure for each in judged if each.verdict is verdict))})"


def _caption(link: str, comparison: Comparison) -> str:
    arm = comparison.arm(comparison.baseline).arm
    dtypes = ", ".join(dict.fromkeys(each.arm.dtype for each in comparison.arms))
    facts = [
        f"`{arm.model}` ({cell(arm.reference)})",
        cell(summary.machine(comparison.environment)),
        summary.workload(comparison.workload),
        dtypes,
        f"{comparison.pairs} interleaved pairs" if comparison.mode == "live" else "stored runs",
        f"{comparison.created_utc[:10]}, infopt {comparison.infopt_version}",
        f"[the whole result]({link})",
    ]
    return "; ".join(facts) + "."
