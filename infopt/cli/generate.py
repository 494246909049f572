"""`infopt generate REF "prompt" [--beside REF2]`."""

from __future__ import annotations

from typing import Annotated

import typer

from infopt.cli.shell import AsJson, Device, DType, Quiet, Recipe, Revision, Seed, Threads, Trust, Verbose, reporting


def generate(
    model: Annotated[str, typer.Argument(help="A model reference or an artifact; MODEL:RECIPE works too.")],
    prompt: Annotated[str, typer.Argument(help="What to say to it.")],
    beside: Annotated[str | None, typer.Option(help="A second model, to see both answers.")] = None,
    recipe: Recipe = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it stands, without the chat template.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
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

    from infopt import arms
    from infopt.settings import LoadOptions

    overrides = [] if temperature is None else [f"sampling.temperature={temperature}"]
    texts = [model if recipe is None else f"{model}:{recipe}", *([beside] if beside else [])]
    specs = arms.parse(texts, overrides, dtype)
    from infopt import generate as use_case

    options = LoadOptions(device, threads, seed, revision, trust)
    with reporting(quiet, verbose) as progress:
        answers = [use_case.generate(spec, prompt, options, tokens=tokens, is_raw=raw, progress=progress) for spec in specs]
    if as_json:
        typer.echo(
            json.dumps({"schema_version": 1, "answers": [vars(answer) for answer in answers]}, indent=2, ensure_ascii=False)
        )
        return
    for answer in answers:
        if len(answers) > 1:
            typer.echo(f"--- {answer.label} ({answer.description})")
        typer.echo(answer.text)
    if len(answers) == 2:
        typer.echo(f"--- {use_case.difference(*answers)}")
