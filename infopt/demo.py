"""`infopt demo`: a real model, five recipes, one table. Its arms show what each kind of change costs, one of them ruin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from infopt import techniques
from infopt.arms import ArmSpec, parse
from infopt.compare import Protocol, compare
from infopt.comparison import Comparison
from infopt.needs import missing_need
from infopt.protocols import Progress
from infopt.settings import LoadOptions, QualitySettings, Settings, WorkloadSpec

ARMS: tuple[str, ...] = ("demo:baseline", "demo:int8", "demo:nf4", "demo:int4_lookup", "demo:int8_naive")
WORKLOAD = WorkloadSpec(prompt_tokens=64, new_tokens=16, requests=2)
QUALITY = QualitySettings(fidelity_tokens=2048, choice_items=24, behaviour_prompts=4)
PROTOCOL = Protocol(pairs=6, self_test=True)


def arms(device: str) -> tuple[list[ArmSpec], list[str]]:
    """The arms that this machine can run on `device`, and a line for each that it cannot."""
    able, lines = list[ArmSpec](), list[str]()
    for spec in parse(ARMS):
        lacks = (missing_need(techniques.find(step.name)(step.options).needs, device) for step in spec.recipe.steps)
        lacking = next(filter(None, lacks), None)
        if lacking:
            lines.append(f"{spec.label} is left out: {lacking.message}")
        else:
            able.append(spec)
    return able, lines


def demo(
    specs: Sequence[ArmSpec], options: LoadOptions, *, results: Path, progress: Progress = lambda line: None
) -> tuple[Comparison, Path]:
    """Fetches the demo model if need be, then optimizes, measures and compares `specs`."""
    from infopt.model.demo import fetch

    fetch(progress=progress)
    settings = Settings(quality=QUALITY, warmup_cap=6)
    return compare(specs, WORKLOAD, options, settings, PROTOCOL, results=results, progress=progress)
