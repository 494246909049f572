"""`infopt results list | show | export | rm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infopt.errors import InputError

app = typer.Typer(help="List, show, export and remove stored results.", no_args_is_help=True)

Result = Annotated[Path, typer.Argument(help="A results folder, or its run.json or compare.json.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command("list")
def list_results(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the results.")] = Path("results"), as_json: AsJson = False
) -> None:
    """List what a results folder holds, half-written ones included."""
    from infopt import results

    found = results.entries(folder)
    if as_json:
        _print_json({"schema_version": 1, "results": [entry.as_dict() for entry in found]})
        return
    if not found:
        typer.echo(f"{folder}: no results yet")
    for entry in found:
        status = "" if entry.status == "complete" else f"{entry.status}: "
        typer.echo(f"{entry.folder}  {status}{entry.about}")


@app.command()
def show(path: Result, as_json: AsJson = False) -> None:
    """Show one result as tables; an incomplete one with its reason."""
    from infopt import results
    from infopt.result import Run, dump

    found = results.load(path)
    if as_json:
        typer.echo(dump(found), nl=False)
        return
    from infopt.cli.shell import console
    from infopt.report.console import print_comparison, print_run

    if isinstance(found, Run):
        print_run(found, console())
    else:
        print_comparison(found, console())


@app.command()
def export(
    path: Result,
    to: Annotated[str, typer.Option("--to", help="markdown, html, json, csv, junit, benchmark-action, bmf or openmetrics.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File or folder to write; stdout without it.")] = None,
) -> None:
    """Render a stored result for people or for other tools."""
    from infopt import results

    made = results.export(path, to, output)
    if isinstance(made, str):
        typer.echo(made, nl=False)
        return
    for file in made:
        typer.echo(file)


@app.command()
def rm(
    paths: Annotated[list[Path], typer.Argument(help="Results folders to remove.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove results folders, samples included. Folders that are no results are left alone."""
    import sys

    from infopt import results

    if not yes:
        if not sys.stdin.isatty():
            raise InputError("nobody is there to confirm the removal", hint="add --yes")
        typer.confirm(f"Remove {', '.join(map(str, paths))}?", abort=True, err=True)
    for path in paths:
        results.remove(path)


def _print_json(document: dict[str, object]) -> None:
    import json

    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
