"""`infopt bench MODEL [-r RECIPE]`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from infopt.cli.shell import (
    AllowLeakage,
    AsJson,
    Device,
    DType,
    Quiet,
    Recipe,
    Results,
    Revision,
    Seed,
    Set,
    Threads,
    Trust,
    Verbose,
    console,
    reporting,
    tell_github,
)  # fmt: skip


def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model reference, or an artifact of `infopt optimize`.")],
    recipe: Recipe = None,
    overrides: Set = None,
    prompt: Annotated[str, typer.Option(help="Prompt tokens; a list makes a sweep: 128,512")] = "128",
    new: Annotated[int, typer.Option(min=1, help="New tokens per request.")] = 32,
    batch: Annotated[str, typer.Option(help="Requests per static batch; a list makes a sweep: 1,4,8")] = "1",
    requests: Annotated[int, typer.Option(min=1, help="Batches per block.")] = 3,
    workload: Annotated[
        Path | None, typer.Option("--workload", "-w", help="A JSONL of prompts instead of a fixed shape.")
    ] = None,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="Answers of a prompts file may end early, at the end token (batch 1).")
    ] = False,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks, each with its own prompts.")] = 5,
    slo: Annotated[list[str] | None, typer.Option("--slo", help="Objective for goodput: ttft_s=0.5 (repeat).")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Your price in dollars, for cost per million tokens.")] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the hour that is used.")] = 1.0,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Judge quality against the reference.")] = True,
    tasks: Annotated[Path | None, typer.Option(help="Your multiple-choice JSONL instead of the bundled items.")] = None,
    checks: Annotated[Path | None, typer.Option(help="Your JSONL of prompts with expect: rules.")] = None,
    text: Annotated[Path | None, typer.Option(help="Your text for perplexity and KLD.")] = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="Measure the noise floor (A/A) for stored comparisons.")] = False,
    results: Results = Path("results"),
    device: Device = "auto",
    dtype: DType = None,
    threads: Threads = None,
    seed: Seed = 0,
    revision: Revision = None,
    trust: Trust = False,
    allow_leakage: AllowLeakage = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Measure one model under one recipe: time, memory, energy, cost, quality, distance from the hardware's limit."""
    from infopt import arms

    spec = arms.spec(model, recipe, overrides or (), dtype)  # first: what is refused is refused at once
    from infopt.bench import bench as measure
    from infopt.bench import check_workloads
    from infopt.cli.workload import check_price, objectives, quality_settings, refuse_idle, workloads
    from infopt.settings import LoadOptions, Settings

    refuse_idle(context, has_quality=quality, has_price=price_per_hour is not None, has_prompts_file=workload is not None)
    shapes = workloads(prompt, new, batch, requests, workload, stop_at_eos)
    check_price(price_per_hour, utilisation)
    settings = Settings(
        price_per_hour=price_per_hour,
        utilisation=utilisation,
        objectives=objectives(slo or ()),
        quality=quality_settings(text, checks, tasks) if quality else None,
    )
    options = LoadOptions(device, threads, seed, revision, trust, allow_leakage)
    from infopt.report.console import print_run

    runs = []
    with reporting(quiet, verbose) as progress:
        if len(shapes) > 1:
            check_workloads(spec, shapes, options, progress)
        for number, shape in enumerate(shapes):
            # Quality does not depend on the shape: once is enough.
            chosen = settings if number == 0 else replace(settings, quality=None)
            runs.append(
                measure(spec, shape, options, chosen, blocks=blocks, results=results, self_test=self_test, progress=progress)
            )
    for run, folder in runs:
        tell_github(run, folder)
    if as_json:
        from infopt.cli.workload import one_document

        typer.echo(one_document("runs", [run for run, _ in runs]))
        return
    for run, folder in runs:
        print_run(run, console(), folder)
