"""What a GitHub workflow step reads back: the step summary and its outputs.

Both files are named by the environment; where a variable is not set, nothing is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from infopt.comparison import Comparison
from infopt.report import summary
from infopt.report.markdown import step_summary
from infopt.report.tables import worst
from infopt.result import Run

_NOT_A_NAME = re.compile(r"[^A-Za-z0-9_-]+")


def write(result: Run | Comparison, folder: Path | None = None, environment: Mapping[str, str] = os.environ) -> None:
    """Appends to `$GITHUB_STEP_SUMMARY`, and a comparison's verdicts to `$GITHUB_OUTPUT`. Raises OSError."""
    if path := environment.get("GITHUB_STEP_SUMMARY"):
        target = Path(path)
        held = target.stat().st_size if target.exists() else 0
        _append(target, step_summary(result, held))
    if (path := environment.get("GITHUB_OUTPUT")) and isinstance(result, Comparison):
        _append(Path(path), "".join(f"{key}={value}\n" for key, value in outputs(result, folder).items()))


def outputs(comparison: Comparison, folder: Path | None = None) -> dict[str, str]:
    """One-line values: `verdict`, `exit_code`, `failed`, `results`, `verdicts` as JSON, and `<arm>-<figure>` per gate."""
    verdict = summary.overall(comparison)
    by_arm: dict[str, dict[str, str]] = {}
    for arm in comparison.candidates:
        for judged in summary.gated(comparison, arm.label):
            known = [each.verdict for each in summary.gated(comparison, arm.label) if each.figure == judged.figure]
            by_arm.setdefault(arm.label, {})[judged.figure] = str(worst(known))
    failed = [label for label, found in by_arm.items() if "FAIL" in found.values()]
    found = {
        "verdict": verdict.value if verdict else "NONE",
        "exit_code": str(comparison.exit_code),
        "failed": ",".join(failed),
        "verdicts": json.dumps(by_arm, ensure_ascii=True),
    }
    if folder is not None:
        found["results"] = str(folder)
    for label, verdicts in by_arm.items():
        found |= {_NOT_A_NAME.sub("_", f"{label}-{figure}"): value for figure, value in verdicts.items()}
    return {key: " ".join(value.split()) for key, value in found.items()}


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)
