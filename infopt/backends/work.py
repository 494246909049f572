"""One job of a back-end: a model folder, options and calibration tokens in, a folder out; nothing else is shared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.backends import child
from infopt.backends.environments import Environment, root
from infopt.errors import InfoptError, InputError
from infopt.model import atomic, cache, save

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle
    from infopt.protocols import Context

SCRIPTS = Path(__file__).parent / "scripts"


@contextmanager
def done(environment: Environment, bundle: Bundle, context: Context, options: dict[str, Any]) -> Iterator[Path]:
    """Runs `scripts/<environment>_worker.py` in the environment on `bundle`; yields the folder it filled, gone afterwards.

    Raises InfoptError with the worker's last words when it fails, DiskFullError.
    """
    with cache.lock(environment.folder, shared=True), _scratch(environment.name) as folder:
        context.progress(f"{environment.name}: saving the model for it")
        save.save(bundle, folder / "model")
        job = {
            "options": options,
            "ids": context.calibration_ids,
            "device": context.device.partition(":")[0],
            "seed": context.seed,
        }
        save.write_text(folder / "job.json", json.dumps(job))
        log = root() / f"{environment.name}-{os.getpid()}.log"
        log.unlink(missing_ok=True)
        command = [str(environment.interpreter), str(SCRIPTS / f"{environment.name}_worker.py"), str(folder)]
        code = child.stream(
            command, lambda line: context.progress(f"{environment.name}: {line}"), log, _environment(context.device)
        )
        if code:
            message = f"{environment.name} {child.how_it_ended(code)}: {child.last_words(log)}"
            raise InfoptError(message, hint=f"all it said: {log}")
        log.unlink()
        yield folder / "out"


def require_calibration(context: Context) -> None:
    """Raises InputError where the recipe's calibration gave nothing."""
    if not context.calibration_ids:
        raise InputError("a calibrated step needs text", hint="calibration: {text: bundled, samples: 128, tokens: 512}")


@contextmanager
def _scratch(name: str) -> Iterator[Path]:
    """A folder beside the cache's others, since a model may not fit where temporary files usually go."""
    jobs = cache.cache_dir() / "jobs"
    folder = jobs / f".{name}.{os.getpid()}.tmp"
    with atomic.writing(folder):
        root().mkdir(parents=True, exist_ok=True)
        jobs.mkdir(parents=True, exist_ok=True)
        atomic.sweep(jobs / name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(device: str) -> dict[str, str]:
    """As many threads as here, no hub, and of the GPUs only the one that was asked for."""
    import torch

    changes = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    kind, _, number = device.partition(":")
    if kind == "cpu":
        changes["CUDA_VISIBLE_DEVICES"] = ""
    elif number:
        seen = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
        changes["CUDA_VISIBLE_DEVICES"] = seen[int(number)] if seen else number
    return child.plain_environment(**changes, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
