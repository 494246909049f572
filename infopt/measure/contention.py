"""CPU time that other processes took during a block. A timing beside other load is flagged, or taken again."""

from __future__ import annotations

import time
from collections.abc import Callable

from infopt.checks import OTHER_CPU_LIMIT_CORES


def machine_busy_s() -> float:
    """CPU seconds that all cores have worked since boot; time a hypervisor took away counts as someone else's work."""
    import psutil

    times = psutil.cpu_times()
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")))


def own_busy_s() -> float:
    """CPU seconds of this process and its descendants, finished ones included."""
    import psutil

    own = psutil.Process()
    total = float(sum(own.cpu_times()[:4]))
    for child in own.children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


class ContentionMeter:
    def __init__(
        self,
        machine_s: Callable[[], float] = machine_busy_s,
        own_s: Callable[[], float] = own_busy_s,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._machine_s, self._own_s, self._now = machine_s, own_s, now
        self._before = (0.0, 0.0, 0.0)

    def begin(self) -> None:
        self._before = self._read()

    def end(self) -> float | None:
        """Cores that others kept busy since `begin`; None when this system does not count CPU time."""
        machine, own, wall = (after - before for after, before in zip(self._read(), self._before, strict=True))
        if wall <= 0 or (machine == 0 and own > 0):
            return None
        return max(0.0, machine - own) / wall

    def _read(self) -> tuple[float, float, float]:
        return self._machine_s(), self._own_s(), self._now()


def contention_flags(other_cores: float | None, throttles: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Flags of a block that ran beside other load or on lowered clocks."""
    busy = other_cores is not None and other_cores > OTHER_CPU_LIMIT_CORES
    return (
        *((f"contended: others used {other_cores:.2f} cores, {OTHER_CPU_LIMIT_CORES} allowed",) if busy else ()),
        *(f"throttled: {reason}" for reason in throttles),
    )
