"""What this machine really reaches, measured in this process with the threads it will use. Never a data sheet.

read     the larger of a sum over a buffer that no cache holds, and a copy of it (read + write)
flops    a square matrix product on random data per dtype, because zeros run faster than real weights; float32 on a CPU
         by BLAS and by oneDNN, since BLAS leaves half of some processors unused
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from infopt.measure.clock import Clock, WallClock
from infopt.protocols import Machine
from infopt.result import write_atomic

DTYPES = ("float32", "bfloat16", "float16")
BUDGET_S = 1.2
#: Counts up when peaks are found in another way; stored ones of an older way are then measured anew.
METHOD = 2
_CPU_BUFFER, _CUDA_BUFFER = 256 * 2**20, 2 * 2**30
_CPU_MATRIX, _CUDA_MATRIX = 2048, 8192


def measure_machine(device: str = "cpu", dtypes: Sequence[str] = DTYPES, budget_s: float = BUDGET_S) -> Machine:
    """Peaks of `device` within about `budget_s` seconds. Raises InputError for a device that cannot be synchronised."""
    import torch

    from infopt.kernels.onednn import OneDnn

    clock = WallClock(device)
    on_cuda = device.startswith("cuda")
    share = budget_s / (len(dtypes) + 1)
    memory = _memory_bytes(device)
    buffer = min(_CUDA_BUFFER if on_cuda else _CPU_BUFFER, memory // 16)
    with torch.inference_mode():
        read = _read_rate(device, buffer, share, clock)
        largest = _CUDA_MATRIX if on_cuda else _CPU_MATRIX
        flops = {name: _matrix_rate(device, name, largest, share, clock) for name in dtypes}
        if device == "cpu" and "float32" in flops:
            with OneDnn():
                flops["float32"] = max(flops["float32"], _matrix_rate(device, "float32", largest, share, clock))
    return Machine(
        device=device,
        read_bytes_per_s=read,
        flops=flops,
        last_level_cache_bytes=_cuda_cache_bytes(device) if on_cuda else cpu_cache_bytes(),
        memory_bytes=memory,
    )


def cached_machine(path: Path, fingerprint: str, measure: Callable[[], Machine]) -> Machine:
    """The peaks stored at `path` for this fingerprint, or what `measure` finds, stored there. A broken file is replaced."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if (stored["method"], stored["fingerprint"]) == (METHOD, fingerprint):
            return Machine(**stored["machine"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    machine = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"method": METHOD, "fingerprint": fingerprint, "machine": asdict(machine)}, indent=2) + "\n")
    return machine


def cpu_cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Size of the largest cache that a core sees."""
    factor = {"": 1, "K": 2**10, "M": 2**20}
    sizes = []
    for path in root.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) * factor[match[2]])
    return max(sizes, default=None)


def _read_rate(device: str, size: int, seconds: float, clock: Clock) -> float:
    import torch

    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    read = size / _best_s(lambda: source.sum(), seconds / 2, clock)
    copy = 2 * size / _best_s(lambda: target.copy_(source), seconds / 2, clock)
    return max(read, copy)


def _matrix_rate(device: str, dtype: str, largest: int, seconds: float, clock: Clock) -> float:
    """FLOP/s of the largest square product of which several fit into `seconds`."""
    import torch

    side, begin = 128, clock.now()
    while True:
        left, right = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        product = partial(torch.nn.functional.linear, left, right)
        best = _best_s(product, 0.0, clock)
        # The next size takes about eight times as long, and runs three times.
        if side >= largest or best * 24 > seconds:
            break
        side *= 2
    rest = begin + seconds - clock.now()
    return 2 * side**3 / (best if rest <= 0 else min(best, _best_s(product, rest, clock)))


def _best_s(run: Callable[[], object], seconds: float, clock: Clock) -> float:
    """Shortest of at least two runs after a first one, and of as many more as fit into `seconds`."""
    run()
    clock.synchronise()
    begin, best, runs = clock.now(), float("inf"), 0
    while runs < 2 or clock.now() - begin < seconds:
        start = clock.now()
        run()
        clock.synchronise()
        best, runs = min(best, clock.now() - start), runs + 1
    return best


def _memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def _cuda_cache_bytes(device: str) -> int | None:
    import torch

    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None)
    return int(size) if size else None
