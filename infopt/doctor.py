"""`infopt doctor`: what works on this machine, and the line that makes the rest work."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from infopt import needs, recipe, techniques
from infopt.backends import install
from infopt.measure import energy, environment, nvml
from infopt.model.cache import cache_dir
from infopt.model.demo import cached_folder
from infopt.units import size

Level = Literal["ok", "missing", "untested"]
#: What infopt is made of, each with what it is for.
LIBRARIES = {
    "torch": "models and kernels",
    "transformers": "model code, loading, the reference engine",
    "compressed-tensors": "the checkpoint format of rtn and int8",
    "bitsandbytes": "nf4 and bnb_int8",
    "optimum": "quanto's host package",
    "optimum-quanto": "quanto_int8 and quanto_int4",
    "accelerate": "loading of GGUF, quanto and bitsandbytes models",
    "peft": "LoRA adapters",
    "gguf": ".gguf files",
    "nvidia-ml-py": "GPU facts and energy",
}


@dataclass(frozen=True)
class Finding:
    """One line. `fix` is the command that helps, where there is one."""

    name: str
    level: Level
    text: str
    fix: str | None = None


def examine() -> list[Finding]:
    """Everything, in the order it is printed."""
    return [*_machine(), *_libraries(), *_environments(), *_recipes(), *_measuring(), _demo()]


def _machine() -> list[Finding]:
    system = platform.system()
    known = system == "Linux"
    found = [
        Finding("python", "ok", platform.python_version()),
        Finding(
            "system",
            "ok" if known else "untested",
            f"{system} {platform.release()}",
            None if known else "infopt is tested on Linux",
        ),
        Finding("cpu", "ok", environment.cpu_model() or "unknown"),
    ]
    import torch

    hip = getattr(torch.version, "hip", None)
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        found.append(Finding("device", "untested" if hip else "ok", f"{name}{' (ROCm)' if hip else ''}"))
        found.append(_triton())
    elif torch.backends.mps.is_available():
        found.append(Finding("device", "untested", "Apple GPU (MPS); infopt uses the CPU", "--device cpu"))
    else:
        found.append(Finding("device", "ok", f"CPU, {torch.get_num_threads()} threads; no CUDA device seen by torch"))
    path = needs.compiler()
    text = path or "no C++ compiler on the PATH; quanto recipes cannot run"
    found.append(Finding("compiler", "ok" if path else "missing", text, None if path else "apt-get install g++"))
    free = shutil.disk_usage(next(p for p in (cache_dir(), *cache_dir().parents) if p.exists())).free
    found.append(Finding("cache", "ok", f"{cache_dir()}, {size(free)} free (INFOPT_CACHE moves it)"))
    return found


def _triton() -> Finding:
    try:
        return Finding("triton", "ok", f"{metadata.version('triton')}: the native engine's kernels on GPUs")
    except metadata.PackageNotFoundError:
        return Finding(
            "triton", "missing", "the native engine's kernels on GPUs need it", f"{sys.executable} -m pip install triton"
        )


def _libraries() -> list[Finding]:
    found = []
    for name, use in LIBRARIES.items():
        try:
            found.append(Finding(name, "ok", f"{metadata.version(name)}: {use}"))
        except metadata.PackageNotFoundError:
            found.append(Finding(name, "missing", f"not installed: {use}", f"{sys.executable} -m pip install {name}"))
    return found


def _environments() -> list[Finding]:
    """Back-ends with an environment of their own; all of them optional."""
    return [
        Finding(f"environment {each.name}", "ok", f"{each.version}: {each.about}")
        if each.is_installed
        else Finding(f"environment {each.name}", "missing", f"not installed: {each.about}", f"infopt env install {each.name}")
        for each in install.listed()
    ]


def _recipes() -> list[Finding]:
    found = []
    for name in recipe.shipped():
        chosen = recipe.load(name, techniques.find)
        lacking = [need for step in chosen.steps if (need := needs.missing_need(techniques.find(step.name)(step.options).needs))]
        if lacking:
            found.append(Finding(f"recipe {name}", "missing", lacking[0].message, lacking[0].hint))
    ready = len(recipe.shipped()) - len(found)
    return [Finding("recipes", "ok", f"{ready} of {len(recipe.shipped())} can run here"), *found]


def _measuring() -> list[Finding]:
    device = "cuda" if needs.has_cuda() else "cpu"
    gpu, reason = nvml.open_gpu(device)
    meter = energy.open_meter(device, lambda: 0.0, gpu, reason)
    if isinstance(meter, energy.NoEnergy):
        return [Finding("energy", "missing", f"stays null: {meter.reason}")]
    return [Finding("energy", "ok", type(meter).__name__)]


def _demo() -> Finding:
    if cached_folder().is_dir():
        return Finding("demo model", "ok", str(cached_folder()))
    return Finding("demo model", "missing", "not fetched yet (93 MB)", "infopt models fetch demo")
