"""`infopt doctor`."""

from __future__ import annotations

import json

import typer

from infopt.cli.shell import AsJson

MARKS = {"ok": "ok      ", "missing": "missing ", "untested": "untested"}


def doctor(as_json: AsJson = False) -> None:
    """What works on this machine, and the command that makes the rest work."""
    from infopt import doctor as use_case

    found = use_case.examine()
    if as_json:
        typer.echo(json.dumps({"schema_version": 1, "findings": [vars(each) for each in found]}, indent=2))
        return
    width = max(len(each.name) for each in found)
    for each in found:
        typer.echo(f"{MARKS[each.level]}  {each.name:<{width}}  {each.text}" + (f"   → {each.fix}" if each.fix else ""))
