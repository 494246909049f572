"""Peaks of memory: the process, torch's allocator, the device."""

from __future__ import annotations

import gc
import re
from pathlib import Path

from infopt.measure.nvml import Gpu
from infopt.measure.value import value
from infopt.result import Value


def reset_host_peak(proc: Path = Path("/proc/self")) -> bool:
    """Makes the kernel forget the peak so far (proc(5), clear_refs 5). False where it does not let us."""
    try:
        (proc / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def host_peak_bytes(proc: Path = Path("/proc/self")) -> int | None:
    """Peak resident memory of this process, since the last reset where the kernel allows one, else since its start."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", (proc / "status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return int(match[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child_peak_bytes() -> int:
    """Peak resident memory of the largest process that this one has run and waited for; 0 where there was none."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def reset_peak(device: str) -> None:
    """Starts the peak of `device`, or of this process for the CPU, anew."""
    reset_host_peak()
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: str) -> int | None:
    """Peak since `reset_peak`: what torch allocated on a GPU, else resident memory of this process."""
    if not device.startswith("cuda"):
        return host_peak_bytes()
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def release(device: str) -> None:
    """Gives back what a model that is no longer referred to held, so that the next one finds room."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


class MemoryWatch:
    """Create it before the model is loaded: what the device held then is not counted.

    `sample` looks at the device; torch keeps freed blocks, so looking between requests sees the peak of each.
    """

    def __init__(self, device: str, gpu: Gpu | None, gpu_reason: str = "") -> None:
        self._device = device if device.startswith("cuda") else None
        self._gpu, self._gpu_reason = gpu, gpu_reason
        self._before = gpu.used_bytes() if gpu else None
        self._most: int | None = None
        self.reset()

    def reset(self) -> None:
        """Starts the peaks anew, so that loading does not count as running."""
        reset_host_peak()
        self._most = None
        if self._device:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)

    def sample(self) -> None:
        used = self._gpu.used_bytes() if self._gpu else None
        if used is not None:
            self._most = max(used, self._most or 0)

    def values(self) -> dict[str, Value]:
        self.sample()
        torch_peak = None
        if self._device:
            import torch

            torch_peak = torch.cuda.max_memory_allocated(self._device)
        device = None if self._most is None or self._before is None else max(0, self._most - self._before)
        return {
            "host_rss_peak_bytes": value("host_rss_peak_bytes", host_peak_bytes(), reason="this system does not tell"),
            "torch_peak_bytes": value("torch_peak_bytes", torch_peak, reason="torch keeps no peak for the CPU"),
            "device_peak_bytes": value("device_peak_bytes", device, reason=self._gpu_reason or "the driver does not tell"),
        }


def available(device: str = "cpu") -> int:
    """Bytes that the system, or a GPU, could still hand out."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
