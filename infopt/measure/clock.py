"""One monotonic clock, and the device brought to rest at the edges of a window."""

from __future__ import annotations

import time
from typing import Protocol

from infopt.errors import InputError

DEVICES = ("cpu", "cuda")


class Clock(Protocol):
    def now(self) -> float:
        """Seconds from an arbitrary start, never going back."""

    def sleep(self, seconds: float) -> None: ...

    def synchronise(self) -> None:
        """Returns when the device has finished all work it was given."""


class WallClock:
    """`time.perf_counter_ns`. Raises InputError for a device that cannot be synchronised: its times would be guesses."""

    def __init__(self, device: str = "cpu") -> None:
        kind = device.partition(":")[0]
        if kind not in DEVICES:
            raise InputError(
                f"device {device!r} cannot be synchronised by infopt, so nothing on it can be timed; known: {', '.join(DEVICES)}",
                hint="use --device cpu",
            )
        self._device = device if kind == "cuda" else None

    def now(self) -> float:
        return time.perf_counter_ns() / 1e9

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))

    def synchronise(self) -> None:
        if self._device:
            import torch

            torch.cuda.synchronize(self._device)
