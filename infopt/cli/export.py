"""`infopt export MODEL --to gguf|onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infopt.cli.shell import AsJson, Quiet, Revision, Threads, Trust, Verbose, reporting

if TYPE_CHECKING:
    from infopt.export.record import Export, LoadBackCheck


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="demo, a hub id, a folder, or an artifact of infopt optimize.")],
    to: Annotated[str, typer.Option("--to", help="gguf (llama.cpp) or onnx (onnxruntime-genai).")],
    kind: Annotated[
        str | None, typer.Option("--type", "-t", help="gguf: f32 f16 bf16 q8_0 q6_k q5_k q4_1 q4_0; onnx: fp32 int8 int4.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The .gguf file, or the ONNX folder; must not exist.")] = None,
    threads: Threads = None,
    revision: Revision = None,
    trust: Trust = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in another engine's format, load it back there and compare."""
    from infopt import export as use_case
    from infopt.settings import LoadOptions

    options = LoadOptions(device="cpu", threads=threads, revision=revision, trust_remote_code=trust)
    with reporting(quiet, verbose) as progress:
        made = use_case.export(model, to, kind, out, options, progress)
    if as_json:
        typer.echo(made.model_dump_json(indent=2))
        return
    for line in lines(made):
        typer.echo(line)


def lines(made: Export) -> list[str]:
    """The report for people."""
    from infopt import units

    found = [f"{name}: {len(tensors)} tensor{'s' * (len(tensors) != 1)}" for name, tensors in made.stored.items()]
    found += [_checked(check, is_source=made.to == "onnx" and check.tolerance is None) for check in made.checks]
    cost = made.against_source
    found.append(f"against {made.source}: top-1 agreement {cost.top1_agreement:.3f}, perplexity × {cost.perplexity_ratio:.4f}")
    found += [f"note: {note}" for note in made.notes]
    return [*found, f"{made.to} {made.type}: {made.path}, {units.size(made.bytes)}"]


def _checked(check: LoadBackCheck, *, is_source: bool) -> str:
    """What one reader made of the export; `is_source`: it was held against the source, not against what was written."""
    from infopt import units

    if check.refusal:
        return f"warning: {check.reader} does not read it: {check.refusal}"
    allowed = "told, not judged"
    if check.tolerance is not None:
        allowed = f"allowed {units.significant(check.tolerance)}"
    elif check.top1_floor is not None:
        allowed = f"top-1 at least {units.significant(check.top1_floor)}"
    texts = f"{check.texts} texts" if check.texts == check.texts_tried else f"{check.texts} of {check.texts_tried} texts"
    return (
        f"loaded back in {check.reader}: logits within {units.significant(check.max_abs_logit_difference)} of "
        f"{'the source' if is_source else 'what was written'} on {check.tokens} tokens ({allowed}), {texts} encoded alike"
    )
