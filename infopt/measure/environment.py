"""The machine and the libraries a run used, and which of it must match before two stored runs are compared.

Libraries are read from their metadata, so that knowing them costs no import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from infopt.measure.nvml import Gpu

#: What decides a machine's figures and no recipe changes.
MATCHED = ("device", "driver", "cuda", "power_cap_w", "cpu", "threads")
#: Compared too, unless the user allows different versions.
VERSIONS = ("torch", "transformers")
LIBRARIES = (
    "torch", "transformers", "tokenizers", "accelerate", "bitsandbytes", "compressed-tensors", "optimum",
    "optimum-quanto", "numpy", "triton",
)  # fmt: skip


def gather(device: str, threads: int, gpu: Gpu | None = None) -> dict[str, Any]:
    """Everything of this machine worth keeping in `run.json`; None for what it does not tell. Imports no torch."""
    on_cuda = device.startswith("cuda")
    found: dict[str, Any] = {
        "device": ((gpu.name() if gpu else None) or "CUDA device") if on_cuda else "cpu",
        "driver": gpu.driver() if gpu and on_cuda else None,
        "cuda": cuda_version() if on_cuda else None,
        "power_cap_w": gpu.power_cap_w() if gpu and on_cuda else None,
        "cpu": cpu_model(),
        "cores": _cores(),
        "threads": threads,
        "memory_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := library(name))},
    }
    found |= {name: found["libraries"].get(name) for name in VERSIONS}
    found["fingerprint"] = fingerprint(found)
    return found


def fingerprint(environment: Mapping[str, Any]) -> str:
    """Hash over exactly the fields that stored comparisons must find equal."""
    content = {field: environment.get(field) for field in MATCHED}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differences(a: Mapping[str, Any], b: Mapping[str, Any], fields: Sequence[str] = MATCHED) -> list[str]:
    """One sentence per field of `fields` that differs; empty when the two may be compared."""
    return [f"{field}: {a.get(field)!r} against {b.get(field)!r}" for field in fields if a.get(field) != b.get(field)]


def library(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cuda_version() -> str | None:
    """The CUDA that the installed torch was built for, read from its files."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _cores() -> int | None:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
