"""`infopt generate REF "prompt" [--beside REF2]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from infopt.cli.shell import AsJson, Device, DType, Quiet, Recipe, Revision, Seed, Set, Threads, Trust, Verbose, reporting

if TYPE_CHECKING:
    from infopt.data.expect import Expect
    from infopt.generate import Generated


def generate(
    model: Annotated[str, typer.Argument(help="A model reference or an artifact; MODEL:RECIPE works too.")],
    prompt: Annotated[str, typer.Argument(help="What to say to it.")],
    beside: Annotated[str | None, typer.Option(help="A second model, to see both answers.")] = None,
    recipe: Recipe = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it stands, without the chat template.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    expect: Annotated[str | None, typer.Option(help='Rules for choose: check, as JSON: {"contains": "Paris"}')] = None,
    overrides: Set = None,
    device: Device = "auto",
    dtype: DType = None,
    threads: Threads = None,
    seed: Seed = 0,
    revision: Revision = None,
    trust: Trust = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Try a model, or two side by side."""
    import json
    from dataclasses import asdict

    from infopt import arms
    from infopt.settings import LoadOptions

    given = [*(overrides or []), *([] if temperature is None else [f"sampling.temperature={temperature}"])]
    texts = [model if recipe is None else f"{model}:{recipe}", *([beside] if beside else [])]
    specs = arms.parse(texts, given, dtype)
    rules = _rules(expect, is_used=any(spec.recipe.sampling.choose == "check" for spec in specs))
    from infopt import generate as use_case

    options = LoadOptions(device, threads, seed, revision, trust)
    with reporting(quiet, verbose) as progress:
        answers = [
            use_case.generate(spec, prompt, options, tokens=tokens, is_raw=raw, expect=rules, progress=progress) for spec in specs
        ]
    if as_json:
        found = {"schema_version": 1, "answers": [asdict(answer) for answer in answers]}
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for answer in answers:
        if len(answers) > 1:
            typer.echo(f"--- {answer.label} ({answer.description})")
        _show(answer)
    if len(answers) == 2:
        typer.echo(f"--- {use_case.difference(*answers)}")


def _rules(text: str | None, *, is_used: bool) -> Expect | None:
    """What `--expect` says. Raises InputError."""
    if text is None:
        return None
    from infopt.data.expect import parse_expect
    from infopt.data.jsonl import parse_line
    from infopt.errors import InputError

    if not is_used:
        raise InputError("--expect has no effect without sampling.choose=check", hint="--set sampling.choose=check")
    found = parse_line(text)
    if not isinstance(found, dict):
        raise InputError(f"--expect: {found[1]}", hint="""--expect '{"contains": "Paris"}'""")
    return parse_expect(found, "--expect")


def _show(answer: Generated) -> None:
    """The answer and why it was chosen; all candidates where nothing chose."""
    number = len(answer.candidates)
    if answer.chosen is not None:
        typer.echo(answer.text)
        typer.echo(f"--- candidate {answer.chosen + 1} of {number}: {answer.why}")
        return
    for place, candidate in enumerate(answer.candidates, start=1):
        if number > 1:
            typer.echo(f"--- candidate {place} of {number}")
        typer.echo(candidate.text)
