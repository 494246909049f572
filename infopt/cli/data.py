"""`infopt data check | rules`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infopt.cli.shell import AsJson, Revision, Trust

if TYPE_CHECKING:
    from infopt.data.audit import Limits

app = typer.Typer(help="Check data before it decides what survives.", no_args_is_help=True)


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Plain text, or JSONL of texts, chats, choices or checks.")],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", "-a", help="A set that FILES must share no passage with; `bundled`: infopt's own (repeat)."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Count tokens as this model's tokenizer does.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest row with --model; the model's context otherwise.")
    ] = None,
    max_chars: Annotated[int, typer.Option(min=1, help="Longest row in characters.")] = 50_000,
    ignore: Annotated[list[str] | None, typer.Option("--ignore", help="A rule to leave out (repeat).")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Notes fail as errors do.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Findings of each rule that are printed: the worst.")] = 20,
    revision: Revision = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Report broken, repeated, contradictory and leaking rows, one line a finding: `file:line: rule: what`.

    Exit code 1 with an error, 0 without (with --strict: without notes either). `infopt data rules` lists the rules.
    """
    from infopt.data import audit
    from infopt.errors import Exit, InputError

    if max_tokens is not None and model is None:
        raise InputError("--max-tokens counts tokens as a model does, and none is given", hint="--model demo, or --max-chars")
    limits = audit.Limits(max_chars) if model is None else _limits(model, max_chars, max_tokens, revision, trust)
    found = audit.check(files, against or (), limits, ignore or ())
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        from infopt.cli.shell import console
        from infopt.report.findings import print_audit

        print_audit(found, console(), limit)
    if found.failed(strict):
        raise typer.Exit(int(Exit.FAILED))


@app.command()
def rules(as_json: AsJson = False) -> None:
    """List the rules: id, whether a finding is an error or a note, what it finds."""
    import json

    from infopt.findings import RULES

    if as_json:
        rows = [{"rule": name, "level": rule.level, "about": rule.about} for name, rule in RULES.items()]
        typer.echo(json.dumps({"schema_version": 1, "rules": rows}, indent=2))
        return
    from infopt.cli.shell import console
    from infopt.report.findings import print_rules

    print_rules(console())


def _limits(model: str, max_chars: int, max_tokens: int | None, revision: str | None, trust: bool) -> Limits:
    """Tokens counted by the model's tokenizer; no weight is read."""
    from infopt.data.audit import Limits
    from infopt.data.row_tokens import count
    from infopt.model import load, reference, shapes

    ref = reference.parse(model, revision=revision, trust_remote_code=trust)
    tokenizer = load.open_tokenizer(ref)
    return Limits(max_chars, max_tokens or shapes.shapes(ref).context or None, lambda row: count(row, tokenizer))
