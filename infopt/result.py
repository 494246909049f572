"""What a run leaves behind: raw samples with units in their names, and `run.json`, the one authoritative document.

    results/<utc>-<name>-<hash>/
        run.json        everything but the samples (this file's `Run`)
        samples.jsonl   one `Sample` per line, written as they come
        report.md       derived; `infopt results export` renders it again

Statistics are derived from samples. What could not be measured is null with a reason, never 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from infopt.errors import InputError

SCHEMA_VERSION = 1
R = TypeVar("R", bound="Record")


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Sample(Record):
    """One `Engine.generate` call: a request, or a static batch of equal requests.

    Seconds count from the call's submission. `out_tokens` is per row.
    """

    arm: str
    block: int
    index: int
    warmup: bool = False
    batch: int
    prompt_tokens: int
    out_tokens: int
    emission_s: tuple[float, ...]
    emission_tokens: tuple[int, ...]
    prefill_s: float | None = None
    tokenize_s: float | None = None
    detokenize_s: float | None = None
    drafted: int | None = None
    accepted: int | None = None
    accepted_at: tuple[tuple[int, int], ...] | None = None
    """By position in a draft: drafts that reached so far, and those of them that were kept so far."""
    reused_tokens: int | None = None
    """Of each row's prompt, tokens that a prefix cache held."""
    scheduled_s: float | None = None
    submitted_s: float = 0.0
    """Submission, in seconds after the block began."""
    error: str | None = None


class Block(Record):
    """Requests of one arm in one state: the unit of replication."""

    arm: str
    index: int
    round: int
    position: int
    """Place within its round, 0 first: rounds alternate direction (ABBA)."""
    wall_s: float
    other_cpu_cores: float | None = None
    """CPU that other processes took meanwhile, in cores."""
    is_redone: bool = False
    flags: tuple[str, ...] = ()
    energy_j: float | None = None
    idle_power_w: float | None = None


class Value(Record):
    """One figure. `reason` says why `value` is null. `low`/`high`: its 95 % interval where one is defined."""

    value: float | None
    unit: str
    id: str
    samples: int | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


class Arm(Record):
    """One (model, recipe, engine) under measurement. `reference` describes what was really loaded."""

    label: str
    model: str
    reference: str
    reference_hash: str
    recipe: dict[str, Any]
    engine: str
    dtype: str
    device: str
    notes: tuple[str, ...] = ()
    """How the engine ran it, and why so."""


class Run(Record):
    schema_version: Literal[1] = 1
    id: str
    name: str
    created_utc: str
    is_complete: bool
    incomplete_reason: str | None = None
    infopt_version: str
    arm: Arm
    workload: dict[str, Any]
    workload_hash: str
    environment: dict[str, Any]
    """The machine and the libraries; `environment.fingerprint` is what stored comparisons match."""
    settings: dict[str, Any] = {}
    """Flags that change the figures: threads, seed, price, pairs."""
    figures: dict[str, Value] = {}
    blocks: tuple[Block, ...] = ()
    limits: dict[str, Any] = {}
    quality: dict[str, Any] = {}
    noise: dict[str, float] = {}
    """A/A standard deviation of the log-ratio per figure, where it was measured."""
    warnings: tuple[str, ...] = ()


def write_atomic(path: Path, text: str) -> None:
    """Writes `text` so that `path` holds either the old or the whole new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def dump(record: BaseModel) -> str:
    """Pretty JSON of a record, never NaN."""
    return json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_run(folder: Path) -> Run:
    """The run stored in `folder`. Raises InputError when it is missing, broken or of another schema."""
    return read_record(folder / "run.json", Run)


def read_record(path: Path, kind: type[R]) -> R:
    """The document at `path`. Raises InputError when it is missing, broken or of another schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent}: no {path.name}, so this is not a finished result", hint="infopt results list") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: broken JSON ({error})", hint="the run was cut off; run it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version {version!r}; this infopt reads {SCHEMA_VERSION}", hint="use the infopt that wrote it"
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}", hint="the file was edited or cut off; run it again") from None


def read_samples(folder: Path) -> Iterator[Sample]:
    """The samples of a run, in the order they were taken. A last line cut off by a crash is skipped."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise InputError(f"{folder}: no samples.jsonl beside run.json", hint="copy the whole results folder")
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield Sample.model_validate_json(line)
        except ValidationError as error:
            if number == len(lines):
                return
            raise InputError(f"{path}:{number}: not a sample ({error.errors()[0]['msg']})", hint="run the bench again") from None
