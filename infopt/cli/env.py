"""`infopt env install|list|rm`: parse, call, print."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from infopt.cli.shell import AsJson, Quiet, Verbose, agreed, reporting
from infopt.errors import InputError
from infopt.units import ABSENT, size

app = typer.Typer(no_args_is_help=True, help="Install, list and remove the environments that back-ends run in.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name that `infopt env list` shows.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command()
def install(name: Name, yes: Yes = False, quiet: Quiet = False, verbose: Verbose = False, as_json: AsJson = False) -> None:
    """Make a back-end's environment from its lock file."""
    from infopt.backends import environments
    from infopt.backends import install as use_case

    chosen = environments.find(name)
    question = f"Install {name} ({chosen.package} {chosen.version}, about {size(chosen.bytes)}) into {chosen.folder}?"
    if not chosen.is_installed() and not yes and not agreed(question):
        raise InputError(f"{name}: not installed", hint="--yes installs without asking")
    with reporting(quiet, verbose) as progress:
        made = use_case.install(chosen, progress)
    if as_json:
        return typer.echo(json.dumps({"schema_version": 1, **asdict(made)}, indent=2, default=str))
    typer.echo(f"{name}: {chosen.package} {made.version}, {size(made.bytes or 0)} in {made.path}")


@app.command("list")
def list_environments(as_json: AsJson = False) -> None:
    """List the environments there are."""
    from infopt.backends import install as use_case

    found = use_case.listed()
    if as_json:
        document = {"schema_version": 1, "environments": [asdict(each) for each in found]}
        return typer.echo(json.dumps(document, indent=2, default=str))
    for each in found:
        state = "installed" if each.is_installed else ABSENT
        taken = ABSENT if each.bytes is None else size(each.bytes)
        typer.echo(f"{each.name:14}  {each.version:10}  {state:9}  {taken:>8}  {each.about}")


@app.command("rm")
def remove(name: Name, yes: Yes = False, as_json: AsJson = False) -> None:
    """Remove an environment."""
    from infopt.backends import environments
    from infopt.backends import install as use_case

    chosen = environments.find(name)
    use_case.require_something(chosen)
    if not yes and not agreed(f"Remove the environment {name}?"):
        raise InputError(f"{name}: kept", hint="--yes removes without asking")
    freed = use_case.remove(chosen)
    if as_json:
        return typer.echo(json.dumps({"schema_version": 1, "removed": name, "bytes": freed}, indent=2))
    typer.echo(f"removed {name} ({size(freed)})")
