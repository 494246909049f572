"""What a recipe's steps need of a machine, and the one rule that says what is missing.

`infopt doctor` prints it, `optimize` and `compare` refuse by it, tests skip with its line.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from typing import Protocol


class Environment(Protocol):
    """A venv that a technique works in (`backends.environments`)."""

    @property
    def name(self) -> str: ...

    def is_installed(self) -> bool: ...

    def provenance(self) -> str:
        """What an artifact made in it records."""
        ...


@dataclass(frozen=True)
class Needs:
    """Needs of a technique, as data, so that a recipe is refused before any weight is read."""

    modules: tuple[str, ...] = ()
    """Importable packages, e.g. ("bitsandbytes",)."""
    compiler: bool = False
    """A C++ compiler on the PATH."""
    cuda: bool = False
    cpu: bool = False
    """CPU only."""
    calibration: bool = False
    """Reads the recipe's calibration text."""
    environment: Environment | None = None
    """Runs out of process, in a venv of its own."""


@dataclass(frozen=True)
class Missing:
    message: str
    hint: str


def compiler() -> str | None:
    """The C++ compiler that torch's extension builder would call, or None."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def has_cuda() -> bool:
    """Whether torch sees a CUDA device; asks the driver's files first, since importing torch takes seconds."""
    if not (os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg") or "torch" in sys.modules):
        return False
    import torch

    return bool(torch.cuda.is_available())


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def missing_need(needs: Needs, device: str = "auto") -> Missing | None:
    """The first thing this machine lacks, or None. `device`: as asked for; `auto` is CUDA where torch sees it."""
    for module in needs.modules:
        if not _is_installed(module):
            package = module.replace(".", "-").replace("_", "-")
            return Missing(f"needs the package {package}, which is not installed", hint=f"pip install {package}")
    if needs.environment is not None and not needs.environment.is_installed():
        name = needs.environment.name
        return Missing(f"needs the environment {name}, which is not installed", hint=f"infopt env install {name}")
    if needs.compiler and compiler() is None:
        return Missing("needs a C++ compiler, and none is on the PATH", hint="e.g. apt-get install g++, then infopt doctor")
    if needs.cuda and not has_cuda():
        return Missing("needs a CUDA device, and torch sees none", hint="infopt doctor")
    if needs.cuda and device == "cpu":
        return Missing("needs a CUDA device, and the CPU was asked for", hint="--device cuda")
    if needs.cpu and (has_cuda() if device == "auto" else device != "cpu"):
        return Missing("runs on the CPU only", hint="--device cpu, or another recipe")
    return None
