"""One NVIDIA GPU as its driver describes it. Reads only; whatever the driver does not tell is None."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

THROTTLES = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class Gpu:
    """`nvml` is the `pynvml` module, or what stands in for it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def energy_j(self) -> float | None:
        """The total-energy counter. It ticks about every 100 ms."""
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def power_w(self) -> float | None:
        milliwatts = self._read("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def power_cap_w(self) -> float | None:
        milliwatts = self._read("nvmlDeviceGetEnforcedPowerLimit")
        return None if milliwatts is None else milliwatts / 1e3

    def used_bytes(self) -> int | None:
        """Memory in use on the whole device."""
        memory = self._read("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def name(self) -> str | None:
        name: str | None = self._read("nvmlDeviceGetName")
        return name

    def driver(self) -> str | None:
        version: str | None = _try(self._nvml, self._nvml.nvmlSystemGetDriverVersion)
        return version

    def throttles(self) -> tuple[str, ...]:
        """Why the clocks are lowered at this moment; empty when they are not, or when the driver does not tell."""
        bits = self._read("nvmlDeviceGetCurrentClocksEventReasons") or 0
        return tuple(name for bit, name in THROTTLES.items() if bits & bit)

    def _read(self, function: str) -> Any:
        return _try(self._nvml, getattr(self._nvml, function, None), self._handle)


def open_gpu(device: str, nvml: Any = None) -> tuple[Gpu | None, str]:
    """The GPU behind a torch device such as `cuda:0`, or None and why."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None, f"device {device} is no NVIDIA GPU"
    if nvml is None:
        try:
            import pynvml
        except ImportError:
            return None, "nvidia-ml-py is not installed"
        nvml = pynvml
    try:
        nvml.nvmlInit()
        return Gpu(nvml, _handle(nvml, int(index or 0))), ""
    except nvml.NVMLError as error:
        return None, f"NVML: {error}"


def _handle(nvml: Any, index: int) -> Any:
    """NVML numbers all GPUs of the machine; torch only the visible ones, and in an order of its own."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and index < torch.cuda.device_count():
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
        handle = uuid and _try(nvml, nvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")
        if handle is not None:
            return handle
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    entry = visible[index] if index < len(visible) else str(index)
    return nvml.nvmlDeviceGetHandleByIndex(int(entry)) if entry.isdigit() else nvml.nvmlDeviceGetHandleByUUID(entry)


def _try(nvml: Any, function: Callable[..., Any] | None, *arguments: Any) -> Any:
    if function is None:
        return None
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None
