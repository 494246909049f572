"""`infopt optimize --dry-run`: what it will cost, before any weight is read.

Bytes follow from the model's shapes. Seconds follow from rates measured on this machine: reading memory, matrix products,
opening a model that has next to no weights, writing to the disk in question. A forecast, not a promise: it knows nothing of what
libraries do besides.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopt import artifact, host, leakage, pipeline
from infopt.model import atomic, load, reference, save, shapes
from infopt.protocols import Machine, Prediction, Shapes
from infopt.recipe import Recipe
from infopt.settings import LoadOptions
from infopt.techniques.base import Technique

DISK_PROBE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Forecast:
    """`steps`: loading, each step, saving and checking. `peak_bytes` of each counts this process as it is now."""

    reference: str
    recipe: str
    steps: tuple[tuple[str, Prediction], ...]
    stored_bytes: int
    disk_bytes: int
    """The artifact, and beside it what lets an interrupted run go on."""
    free_disk_bytes: int
    free_memory_bytes: int
    """Of the device, or of the host where the weights stay there."""

    @property
    def peak_bytes(self) -> int:
        return max(prediction.peak_bytes for _, prediction in self.steps)

    @property
    def seconds(self) -> float | None:
        parts = [prediction.seconds for _, prediction in self.steps]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def forecast(model: str, chosen: Recipe, out: Path, options: LoadOptions) -> Forecast:
    """Peak memory, disk and seconds per step. Raises InputError for what `optimize` would refuse."""
    import psutil

    artifact.require_reference(model)
    save.require_free_target(out)
    ref = pipeline.resolve(model, options)
    leakage.of_recipe(chosen, options.allow_leakage)
    imports_s = _import_seconds()
    device = host.device_name(options.device)
    machine = host.measured(device, host.set_threads(options.threads))
    found = shapes.shapes(ref)
    pipeline.calibration_ids(ref, chosen)  # refuses what is too short
    open_s = _open_seconds()
    stored = shapes.stored_bytes(ref)
    loaded = _loaded(chosen, found, stored, machine, imports_s + open_s)
    rows = [("load", loaded), *pipeline.predict(chosen, found, loaded, machine)]
    techniques = pipeline.build_techniques(chosen, found, device)
    first, home = pipeline.first_at_load(chosen, techniques), pipeline.home(chosen, techniques, device)
    disk = rows[first][1].weights_bytes
    rows.append(("save and check", _check(found, rows, disk, machine, open_s, _write_rate(out))))
    walking = [(step, made) for step, (_, made) in zip(techniques, rows[1:], strict=False) if step.walks]
    kept = sum(_kept(found, loaded, made, step) for step, made in walking)
    own = psutil.Process().memory_info().rss if home == "cpu" else 0
    return Forecast(
        reference=model,
        recipe=chosen.name,
        steps=tuple((name, Prediction(each.weights_bytes, each.peak_bytes + own, each.seconds)) for name, each in rows),
        stored_bytes=stored,
        disk_bytes=disk + kept,
        free_disk_bytes=atomic.free_bytes(out.absolute()),
        free_memory_bytes=_free_memory(home) + own,
    )


def _loaded(chosen: Recipe, found: Shapes, stored: int, machine: Machine, open_s: float) -> Prediction:
    """Weights mapped from the disk, whose pages count while they are read, and held once in the dtype asked for."""
    dtype = chosen.engine.dtype
    held = stored if dtype == "auto" else found.parameters * pipeline.ELEMENT_BYTES[dtype]
    seconds = open_s + (stored + held) / machine.read_bytes_per_s if machine.read_bytes_per_s else None
    return Prediction(weights_bytes=held, peak_bytes=held + stored, seconds=seconds)


def _kept(found: Shapes, loaded: Prediction, made: Prediction, technique: Technique) -> int:
    """What a step keeps on the disk so that an interrupted run can go on: its blocks dense and packed, two hidden states."""
    element = loaded.weights_bytes // found.parameters
    return loaded.weights_bytes + made.weights_bytes + 2 * technique.calibration_tokens * found.hidden * element


def _check(
    found: Shapes, rows: list[tuple[str, Prediction]], disk: int, machine: Machine, open_s: float, write_rate: float
) -> Prediction:
    """Written once; read back by transformers and by infopt, each with one forward over the probe's tokens."""
    read, flops = machine.read_bytes_per_s, machine.flops.get("float32")
    dense, final = rows[0][1].weights_bytes, rows[-1][1]
    seconds = None
    if read and flops:
        forward = 2 * pipeline.PROBE_TOKENS * (found.linear_parameters + found.head_parameters) / flops
        seconds = disk / write_rate + 2 * (open_s + (disk + dense) / read) + 3 * forward
    return Prediction(final.weights_bytes, max(dense + disk, final.peak_bytes), seconds)


def _import_seconds() -> float:
    """What the run will spend on importing the libraries that open a model; next to nothing where they are imported already."""
    start = time.perf_counter()
    pipeline.import_libraries(Recipe(name=""))
    return time.perf_counter() - start


def _open_seconds() -> float:
    """What opening any model takes besides its weights: the time of the tiny one, second time round."""
    tiny = reference.parse("tiny")
    for _ in range(2):
        start = time.perf_counter()
        load.load(tiny)
    return time.perf_counter() - start


def _write_rate(out: Path) -> float:
    """Bytes per second that the disk under `out` takes, synchronised, from a file without a name."""
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(DISK_PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return DISK_PROBE_BYTES / (time.perf_counter() - start)


def _free_memory(device: str) -> int:
    if device == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    import torch

    free: Any = torch.cuda.mem_get_info(device)[0]
    return int(free)
