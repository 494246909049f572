"""Workload and quality flags, which `bench` and `compare` share, as settings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.errors import InputError
from infopt.settings import QualitySettings, WorkloadSpec

if TYPE_CHECKING:
    import typer

    from infopt.result import Record


def counts(text: str, flag: str) -> tuple[int, ...]:
    """`1,4,8` → (1, 4, 8). Raises InputError."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise InputError(f"{flag} {text!r}: allowed: whole numbers of 1 or more, separated by commas", hint=f"{flag} 1,4,8")
    return found


def refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Raises InputError for the first of these parameters that was typed: a flag is never ignored in silence."""
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{flags[name]} {why}", hint="leave one of them out")


def refuse_idle(context: typer.Context, *, has_quality: bool, has_price: bool, has_prompts_file: bool) -> None:
    """Refuses flags that would have no effect beside, or without, another one. Raises InputError."""
    if not has_quality:
        refuse(context, ("text", "checks", "tasks"), "has no effect beside --no-quality")
    if not has_price:
        refuse(context, ("utilisation",), "has no effect without --price-per-hour")
    if has_prompts_file:
        refuse(context, ("prompt", "requests"), "has no effect beside --workload, whose file holds the prompts")
    else:
        refuse(context, ("stop_at_eos",), "has no effect without --workload: a fixed shape runs to its full length")


def workloads(
    prompt: str, new: int, batch: str, requests: int, prompts_file: Path | None, stop_at_eos: bool = False
) -> tuple[WorkloadSpec, ...]:
    """Every prompt length with every batch size; or the prompts file, checked now."""
    batches = counts(batch, "--batch")
    base = WorkloadSpec(new_tokens=new, requests=requests, ignore_eos=not stop_at_eos)
    if prompts_file is None:
        return tuple(replace(base, prompt_tokens=p, batch=b) for p in counts(prompt, "--prompt") for b in batches)
    from infopt.data.prompts import read_prompts

    read_prompts(prompts_file)
    return tuple(replace(base, prompts_file=str(prompts_file), batch=b) for b in batches)


def objectives(texts: Sequence[str]) -> dict[str, float]:
    """`ttft_s=0.5` → {"ttft_s": 0.5}. Raises InputError."""
    found = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            found[name.strip()] = math.nan
        if not 0 < found[name.strip()] < math.inf:
            raise InputError(f"--slo {text!r}: allowed: FIGURE=SECONDS, above 0", hint="--slo ttft_s=0.5")
    from infopt.measure.latency import goodput

    goodput((), found)  # refuses names that are no objective
    return found


def check_price(price_per_hour: float | None, utilisation: float) -> None:
    """Refuses, before anything runs, what no cost can be computed from. Raises InputError."""
    from infopt.measure.cost import usd_per_mtok

    usd_per_mtok(1.0 if price_per_hour is None else price_per_hour, 1.0, utilisation)


def quality_settings(text: Path | None, checks: Path | None, tasks: Path | None) -> QualitySettings:
    """The user's files in place of the bundled ones, read once now so that a mistake shows before anything runs."""
    from infopt.data.choices import read_choices
    from infopt.data.prompts import read_prompts
    from infopt.data.texts import read_text

    if text:
        read_text(str(text), "evaluation")
    found = QualitySettings(
        text=str(text) if text else None,
        prompts_file=str(checks) if checks else None,
        choices_file=str(tasks) if tasks else None,
    )
    if checks:
        found = replace(found, behaviour_prompts=len(read_prompts(checks)))
    if tasks:
        found = replace(found, choice_items=len(read_choices(tasks)))
    return found


def one_document(key: str, records: Sequence[Record]) -> str:
    """One JSON document: a single record as itself, several under `key`."""
    documents: list[Any] = [record.model_dump(mode="json") for record in records]
    document = documents[0] if len(documents) == 1 else {"schema_version": 1, key: documents}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
