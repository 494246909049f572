"""`infopt demo`: a real model, five recipes, one table. Its arms show what each kind of change costs, one of them ruin."""

from __future__ import annotations

from pathlib import Path

from infopt.arms import parse
from infopt.compare import Protocol, compare
from infopt.comparison import Comparison
from infopt.protocols import Progress
from infopt.settings import LoadOptions, QualitySettings, Settings, WorkloadSpec

ARMS = ("demo:baseline", "demo:int8", "demo:nf4", "demo:int4_lookup", "demo:int8_naive")
WORKLOAD = WorkloadSpec(prompt_tokens=64, new_tokens=16, requests=2)
QUALITY = QualitySettings(fidelity_tokens=2048, choice_items=24, behaviour_prompts=4)
PROTOCOL = Protocol(pairs=6, self_test=True)


def demo(options: LoadOptions, *, results: Path, progress: Progress = lambda line: None) -> tuple[Comparison, Path]:
    """Fetches the demo model if need be, then optimizes, measures and compares."""
    from infopt.model.demo import fetch

    fetch(progress=progress)
    settings = Settings(quality=QUALITY, warmup_cap=6)
    return compare(parse(ARMS), WORKLOAD, options, settings, PROTOCOL, results=results, progress=progress)
