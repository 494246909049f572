"""`infopt demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infopt.cli.shell import AsJson, Device, Quiet, Results, Seed, Threads, Verbose, reporting


def demo(
    strict_gates: Annotated[bool, typer.Option("--strict-gates", help="Exit 3 when a gate fails, as compare does.")] = False,
    results: Results = Path("results"),
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Optimize, measure and compare a real small model under five recipes: a first result in minutes."""
    from infopt import demo as use_case
    from infopt.cli.compare import finish
    from infopt.errors import Exit
    from infopt.settings import LoadOptions

    specs, left_out = use_case.arms(device)
    for line in left_out:
        typer.echo(line, err=True)
    with reporting(quiet, verbose) as progress:
        document, folder = use_case.demo(
            specs, LoadOptions(device=device, threads=threads, seed=seed), results=results, progress=progress
        )
    # A failed gate is what the demo is there to show; a broken arm is not.
    lesson = document.exit_code == Exit.GATE_FAILED and not strict_gates
    finish(document, folder, None, as_json, exit_code=0 if lesson else None)
    if not as_json:
        typer.echo(f"\nNext: open {folder}/report.html, or measure your own model: infopt compare MODEL MODEL:int8")
