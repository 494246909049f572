"""Energy of a window, from counters where there are any. Never an estimate from a data sheet's power.

NVML's counter ticks about every 100 ms, so windows of 5 s and more are good to about 2 %; a shorter one is labelled. GPU
figures are the board's alone, RAPL figures the CPU packages' alone: the method says which.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from infopt.measure.clock import Clock
from infopt.measure.latency import ENERGY_MISSING
from infopt.measure.nvml import Gpu

MIN_WINDOW_S = 5.0
POLL_S = 0.1
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """`reason` says why `joules` is None."""

    joules: float | None
    seconds: float
    method: str
    reason: str | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        """What a block must carry beside the number."""
        if self.joules is None:
            return (f"{ENERGY_MISSING}{self.reason}",)
        short = (f"energy.short_window: {self.seconds:.1f} s, {MIN_WINDOW_S:.0f} s wanted",)
        return (f"energy.method: {self.method}", *(short if self.seconds < MIN_WINDOW_S else ()))


class EnergyMeter(Protocol):
    """`begin` and `end` are called with the device synchronised."""

    def begin(self) -> None: ...

    def end(self) -> Energy: ...


@dataclass(frozen=True)
class Counter:
    """A counter of joules; `wrap_j` is where it starts again from 0."""

    read_j: Callable[[], float | None]
    wrap_j: float | None = None


class CounterMeter:
    """Sum over counters that only grow."""

    def __init__(self, counters: Sequence[Counter], method: str, now: Callable[[], float]) -> None:
        self._counters, self._method, self._now = counters, method, now
        self._before: list[float | None] = []
        self._start = 0.0

    def begin(self) -> None:
        self._before, self._start = [counter.read_j() for counter in self._counters], self._now()

    def end(self) -> Energy:
        seconds = self._now() - self._start
        total = 0.0
        for counter, before in zip(self._counters, self._before, strict=True):
            after = counter.read_j()
            if before is None or after is None:
                return Energy(None, seconds, self._method, f"{self._method}: the counter could not be read")
            if after < before and counter.wrap_j is None:
                return Energy(None, seconds, self._method, f"{self._method}: the counter went back")
            total += after - before if after >= before else after - before + (counter.wrap_j or 0.0)
        if total == 0:
            return Energy(None, seconds, self._method, f"{self._method}: the counter did not tick within {seconds:.2f} s")
        return Energy(total, seconds, self._method)


class PolledMeter:
    """Trapezoids under polled power, for devices without a counter. `period_s` None: only `poll` polls."""

    def __init__(
        self, read_w: Callable[[], float | None], method: str, now: Callable[[], float], period_s: float | None = POLL_S
    ) -> None:
        self._read_w, self._method, self._now, self._period = read_w, method, now, period_s
        self._points: list[tuple[float, float | None]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        self._points = []
        self.poll()
        if self._period is not None:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._stop, self._period), daemon=True)
            self._thread.start()

    def poll(self) -> None:
        self._points.append((self._now(), self._read_w()))

    def end(self) -> Energy:
        if self._thread:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self.poll()
        seconds = self._points[-1][0] - self._points[0][0]
        total = 0.0
        for (t0, w0), (t1, w1) in pairwise(self._points):
            if w0 is None or w1 is None:
                return Energy(None, seconds, self._method, f"{self._method}: power could not be read")
            total += (t1 - t0) * (w0 + w1) / 2
        return Energy(total, seconds, self._method)

    def _run(self, stop: threading.Event, period: float) -> None:
        while not stop.wait(period):
            self.poll()


@dataclass(frozen=True)
class NoEnergy:
    """Stands where nothing can measure."""

    reason: str

    def begin(self) -> None:
        """Nothing to begin."""

    def end(self) -> Energy:
        return Energy(None, 0.0, "none", self.reason)


def open_meter(
    device: str, now: Callable[[], float], gpu: Gpu | None = None, gpu_reason: str = "", powercap: Path = POWERCAP
) -> EnergyMeter:
    """The best meter for `device`: NVML's counter, polled power, RAPL; or one that says why there is none."""
    if device.startswith("cuda"):
        if gpu is None:
            return NoEnergy(gpu_reason or "no NVML")
        if gpu.energy_j() is not None:
            return CounterMeter([Counter(gpu.energy_j)], "NVML energy counter, GPU board", now)
        if gpu.power_w() is not None:
            return PolledMeter(gpu.power_w, f"NVML power polled every {POLL_S} s, GPU board", now)
        return NoEnergy("NVML tells neither energy nor power of this GPU")
    counters = rapl_counters(powercap)
    if counters:
        return CounterMeter(counters, "RAPL, CPU packages", now)
    return NoEnergy(f"no readable RAPL counter under {powercap}")


def rapl_counters(powercap: Path = POWERCAP) -> list[Counter]:
    """One counter per CPU package; empty unless all are readable, which usually takes root."""
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+", zone.name)]
    counters = []
    for zone in zones:
        wrap = _microjoules(zone / "max_energy_range_uj")
        counters.append(Counter(lambda zone=zone: _microjoules(zone / "energy_uj"), wrap))  # type: ignore[misc]
    return counters if all(counter.read_j() is not None for counter in counters) else []


def _microjoules(path: Path) -> float | None:
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):
        return None


def idle_power_w(meter: EnergyMeter, clock: Clock, seconds: float = MIN_WINDOW_S) -> float | None:
    """Mean power while nothing of ours runs; None where energy is not measured."""
    clock.synchronise()
    start = clock.now()
    meter.begin()
    clock.sleep(seconds)
    energy = meter.end()
    elapsed = clock.now() - start
    return energy.joules / elapsed if energy.joules is not None and elapsed > 0 else None
