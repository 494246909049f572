"""`infopt inspect MODEL`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from infopt.cli.shell import AsJson, Device, Revision, Threads, Trust


def inspect(
    model: Annotated[str, typer.Argument(help="A model reference; no weight is read.")],
    context: Annotated[int, typer.Option(min=1, help="Context length for the KV cache and the limits.")] = 1024,
    device: Device = "auto",
    threads: Threads = None,
    revision: Revision = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Shapes, parameters, bytes per dtype, KV bytes per token, and this machine's limits for the model."""
    from infopt import inspect as use_case
    from infopt.settings import LoadOptions

    found = use_case.inspect(
        model, LoadOptions(device=device, threads=threads, revision=revision, trust_remote_code=trust), context
    )
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(use_case.lines(found)))
