"""`infopt optimize MODEL -r RECIPE -o DIR`."""

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
    Recipe,
    Revision,
    Seed,
    Set,
    Threads,
    Trust,
    Verbose,
    reporting,
)  # fmt: skip

if TYPE_CHECKING:
    from infopt.arms import ArmSpec
    from infopt.artifact import LoadBack, StepRecord


def optimize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="demo, tiny, a hub id, a folder or a .gguf file; +ADAPTER merges a LoRA.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The artifact's folder; must not exist yet.")] = None,
    recipe: Recipe = None,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run with this --out stopped.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Predict memory, disk and seconds per step; touch nothing.")] = False,
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
    """Apply a recipe's weight steps, save the model, load it back and check it."""
    from infopt import arms
    from infopt.errors import InputError
    from infopt.settings import LoadOptions

    if recipe is None:
        raise InputError("optimize needs a recipe", hint="infopt recipes list, then -r NAME")
    spec = arms.spec(model, recipe, overrides or (), dtype)
    target = out or Path(arms.file_name(f"{model}-{spec.recipe.name}"))
    options = LoadOptions(device, threads, seed, revision, trust, allow_leakage)
    _note_repeated(spec, quiet)
    if dry_run:
        from infopt.cli.workload import refuse
        from infopt.forecast import forecast

        refuse(context, ("resume",), "has no effect beside --dry-run, which predicts a whole run")
        with reporting(quiet, verbose) as progress:
            progress("measuring this machine")
            found = forecast(model, spec.recipe, target, options)
        _print_forecast(found, as_json)
        return
    from infopt import optimize as use_case

    with reporting(quiet, verbose) as progress:
        made = use_case.optimize(model, spec.recipe, target, options, progress, resume=resume)
    if as_json:
        typer.echo(made.model_dump_json(indent=2))
        return
    from infopt import units

    for step in made.steps:
        where = ", repeated at load" if step.is_at_load else ""
        typer.echo(f"{step.name}: {units.duration(step.seconds)}, peak {units.size(step.peak_bytes)}{where}{_quality(step)}")
    typer.echo(f"stored weights: {units.size(made.bytes_before)} → {units.size(made.bytes_after)}")
    for check in made.load_back:
        typer.echo(_checked(check))
    for note in made.notes:
        typer.echo(f"warning: {note}")
    for leak in made.leaks:
        typer.echo(f"warning: {leak}; infopt judges by it unless it is given other data")
    typer.echo(f"artifact: {target}")


def _quality(step: StepRecord) -> str:
    """What the model is worth after a step of several."""
    from infopt import units

    found = step.quality
    if found is None:
        return ""
    span = "" if found.kld_low is None else f" [{units.significant(found.kld_low)}, {units.significant(found.kld_high)}]"
    return (
        f"; then {units.size(step.weights_bytes)}, KLD {units.significant(found.kld_mean)}{span}, perplexity "
        f"×{found.ppl_ratio:.3f}, top-1 {found.top1_agreement:.1%}"
    )


def _note_repeated(spec: ArmSpec, quiet: bool) -> None:
    """Says what calibration text says more than once."""
    from infopt import pipeline
    from infopt.data import audit

    source = None if quiet else pipeline.calibration_source(spec.recipe)
    remark = audit.remark(source) if source else None
    if remark:
        typer.echo(f"note: {remark}", err=True)


def _checked(check: LoadBack) -> str:
    """What one reader made of the saved folder."""
    from infopt import units

    if check.refusal or check.top1_agreement is None:
        return f"warning: {check.reader} does not read it: {check.refusal}"
    same = "" if check.top1_agreement == 1 else f", top-1 at {check.top1_agreement:.1%}"
    found = f"loaded back by {check.reader}: logits within {units.significant(check.max_abs_logit_difference)}{same}"
    rounded = check.rounded_cache_logit_difference
    kept = "" if rounded is None else f"; within {units.significant(rounded)} with keys and values rounded as the file says"
    return f"{found} on {check.tokens} tokens{kept}"


def _print_forecast(found: object, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from infopt import units
    from infopt.forecast import Forecast

    assert isinstance(found, Forecast)
    if as_json:
        typer.echo(
            json.dumps({"schema_version": 1, **asdict(found), "peak_bytes": found.peak_bytes, "seconds": found.seconds}, indent=2)
        )
        return
    typer.echo(f"{found.reference}, recipe {found.recipe}: a forecast from shapes and this machine's measured peaks")
    for name, step in found.steps:
        typer.echo(
            f"  {name:<14} {units.duration(step.seconds):>10}   peak memory {units.size(step.peak_bytes):>9}   "
            f"weights {units.size(step.weights_bytes):>9}"
        )
    room = "fits" if found.peak_bytes < found.free_memory_bytes else "DOES NOT FIT"
    typer.echo(f"peak memory {units.size(found.peak_bytes)} of {units.size(found.free_memory_bytes)} free: {room}")
    room = "fits" if found.disk_bytes < found.free_disk_bytes else "DOES NOT FIT"
    typer.echo(f"disk {units.size(found.disk_bytes)} of {units.size(found.free_disk_bytes)} free: {room}")
    typer.echo(f"time about {units.duration(found.seconds)}")
