"""`infopt compare A B …`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infopt.cli.shell import (
    AllowLeakage,
    AsJson,
    Device,
    DType,
    Quiet,
    Results,
    Revision,
    Seed,
    Threads,
    Trust,
    Verbose,
    console,
    reporting,
    tell_github,
)  # fmt: skip

if TYPE_CHECKING:
    from infopt.comparison import Comparison

#: Parameters of a run that is measured now.
LIVE_FLAGS = (
    "gate", "pairs", "max_pairs", "self_test", "prompt", "new", "batch", "requests", "workload", "stop_at_eos", "slo",
    "price_per_hour", "utilisation", "quality", "tasks", "checks", "text", "results", "device", "dtype", "threads", "seed",
    "revision", "trust", "allow_leakage",
)  # fmt: skip


def compare(
    context: typer.Context,
    arms: Annotated[list[str], typer.Argument(help="MODEL[:RECIPE] …, the first is the baseline; or results folders.")],
    gates: Annotated[Path | None, typer.Option(help="Gates for every arm, instead of those in the recipes.")] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Gate mode: fresh process per block, 20 pairs, up to 30 while undecided.")
    ] = False,
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs of blocks (quick 10, gate 20).")] = None,
    max_pairs: Annotated[int | None, typer.Option(min=1, help="Add pairs in fives up to this many while a gate is open.")] = None,
    self_test: Annotated[bool, typer.Option("--self-test", help="Run the baseline against itself too (A/A).")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 4 when a gate stays inconclusive.")] = False,
    across_versions: Annotated[bool, typer.Option(help="Stored runs: allow another torch or transformers.")] = False,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    new: Annotated[int, typer.Option(min=1, help="New tokens per request.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Requests per static batch.")] = 1,
    requests: Annotated[int, typer.Option(min=1, help="Batches per block.")] = 2,
    workload: Annotated[
        Path | None, typer.Option("--workload", "-w", help="A JSONL of prompts instead of a fixed shape.")
    ] = None,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="Answers of a prompts file may end early, at the end token (batch 1).")
    ] = False,
    slo: Annotated[list[str] | None, typer.Option("--slo", help="Objective for goodput: ttft_s=0.5 (repeat).")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Your price in dollars, for cost per million tokens.")] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the hour that is used.")] = 1.0,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Judge quality against the first arm.")] = True,
    tasks: Annotated[Path | None, typer.Option(help="Your multiple-choice JSONL instead of the bundled items.")] = None,
    checks: Annotated[Path | None, typer.Option(help="Your JSONL of prompts with expect: rules.")] = None,
    text: Annotated[Path | None, typer.Option(help="Your text for perplexity and KLD.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write the verdicts as JUnit XML.")] = None,
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
    """Measure arms side by side and judge every difference; or judge stored results."""
    from infopt.arms import is_stored, parse
    from infopt.cli.workload import refuse
    from infopt.gates import load_gates

    chosen = None if gates is None else load_gates(gates)
    folder = None
    specs = None if is_stored(arms) else parse(arms, dtype=dtype)  # first: what is refused is refused at once
    from infopt import compare as use_case

    if specs is None:
        refuse(context, LIVE_FLAGS, "has no effect on stored results, which were measured before")
        document = use_case.compare_stored(
            [Path(arm) for arm in arms], gates=chosen, is_strict=strict, across_versions=across_versions
        )
    else:
        from infopt.cli.workload import check_price, objectives, quality_settings, refuse_idle, workloads
        from infopt.settings import LoadOptions, Settings

        refuse(context, ("across_versions",), "has no effect on arms that run now, all with one version")
        refuse_idle(context, has_quality=quality, has_price=price_per_hour is not None, has_prompts_file=workload is not None)

        default = use_case.GATE_PAIRS if gate else use_case.QUICK_PAIRS
        protocol = use_case.Protocol(
            pairs=pairs or default,
            max_pairs=max_pairs or (use_case.GATE_CAP if gate and pairs is None else None),
            is_gate_mode=gate,
            self_test=self_test,
            gates=chosen,
            is_strict=strict,
        )
        check_price(price_per_hour, utilisation)
        settings = Settings(
            price_per_hour=price_per_hour,
            utilisation=utilisation,
            objectives=objectives(slo or ()),
            quality=quality_settings(text, checks, tasks) if quality else None,
        )
        (shape,) = workloads(str(prompt), new, str(batch), requests, workload, stop_at_eos)
        if junit is not None:
            junit.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be is told before anything is measured
        with reporting(quiet, verbose) as progress:
            document, folder = use_case.compare(
                specs,
                shape,
                LoadOptions(device, threads, seed, revision, trust, allow_leakage),
                settings,
                protocol,
                results=results,
                progress=progress,
            )
    finish(document, folder, junit, as_json)


def finish(document: Comparison, folder: Path | None, junit: Path | None, as_json: bool, exit_code: int | None = None) -> None:
    """Prints a comparison, writes what CI reads, and ends with its exit code."""
    if as_json:
        from infopt.result import dump

        typer.echo(dump(document), nl=False)
    else:
        from infopt.report.console import print_comparison

        print_comparison(document, console(), folder)
    tell_github(document, folder)
    if junit is not None:
        from infopt.report.junit import junit_xml

        junit.parent.mkdir(parents=True, exist_ok=True)
        junit.write_text(junit_xml(document), encoding="utf-8")
    code = document.exit_code if exit_code is None else exit_code
    if code:
        raise typer.Exit(code)
