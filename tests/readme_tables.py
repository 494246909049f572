"""Renders the generated tables of the README and of docs/ again: `python tests/readme_tables.py`. A test compares them."""

from __future__ import annotations

import re
from pathlib import Path

from infopt import recipe, techniques
from infopt.report.readme import TechniqueRow, read_examples, with_figures, with_results, with_techniques
from infopt.techniques.base import Technique

ROOT = Path(__file__).parent.parent


def render(readme: str) -> str:
    return with_techniques(with_results(readme, read_examples(ROOT)), [row(name) for name in techniques.names()])


def row(name: str) -> TechniqueRow:
    """A technique as its own docstring and attributes tell it."""
    technique = techniques.find(name)
    manual = technique.__doc__ or ""
    needs = [module.replace(".", "-").replace("_", "-") for module in technique.needs.modules]
    needs += ["C++ compiler"] * technique.needs.compiler + ["CUDA"] * technique.needs.cuda + ["CPU only"] * technique.needs.cpu
    needs += [f"environment `{technique.needs.environment.name}`"] if technique.needs.environment else []
    needs += ["calibration text"] * technique.needs.calibration
    papers = dict.fromkeys(re.findall(r"\d{4}\.\d{5}", manual))
    recipes = [path.name for path in recipe.shipped().values() if path.stem == name or path.stem.startswith(f"{name}_")]
    return TechniqueRow(
        name=name,
        idea=manual.strip().split("\n\n")[0].replace("\n", " ").removesuffix("."),
        acts="load, each time" if technique.at_load else "weights" if technique.apply is not Technique.apply else "load",
        needs=", ".join(needs),
        paper=", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in papers),
        source=f"infopt/techniques/{name}.py",
        recipe=f"recipes/{recipes[0]}",
    )


PAGES = {"README.md": render, "docs/METRICS.md": with_figures}

if __name__ == "__main__":
    for name, make in PAGES.items():
        path = ROOT / name
        path.write_text(make(path.read_text(encoding="utf-8")), encoding="utf-8")
