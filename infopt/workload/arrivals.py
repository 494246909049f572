"""When requests arrive. Open loops (Poisson, bursts) name the time at which a request should start whatever the engine
is doing, so waiting counts (`scheduled_latency_s`); a closed loop sends the next request when the last one is answered.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from infopt.errors import InputError
from infopt.workload import Batch, Workload, require_positive


class Arrivals(Protocol):
    def times(self, count: int, seed: int) -> list[float | None]:
        """Seconds after the window's start of each of `count` arrivals, not decreasing; None: when the engine is free."""

    def as_dict(self) -> dict[str, Any]: ...


def _require_rate(rate_per_s: float) -> None:
    if not rate_per_s > 0:
        raise InputError(f"rate_per_s is {rate_per_s}; allowed: above 0")


@dataclass(frozen=True)
class ClosedLoop:
    """One request at a time, the next when the last is answered."""

    def times(self, count: int, seed: int) -> list[float | None]:
        return [None] * count

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "closed_loop"}


@dataclass(frozen=True)
class Poisson:
    """Independent arrivals, exponential gaps of mean 1/`rate_per_s`."""

    rate_per_s: float

    def __post_init__(self) -> None:
        _require_rate(self.rate_per_s)

    def times(self, count: int, seed: int) -> list[float | None]:
        source = random.Random(f"poisson/{seed}")
        now, times = 0.0, list[float | None]()
        for _ in range(count):
            now += source.expovariate(self.rate_per_s)
            times.append(now)
        return times

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "poisson", "rate_per_s": self.rate_per_s}


@dataclass(frozen=True)
class Bursts:
    """`size` requests at once, again and again, at `rate_per_s` requests per second in the mean."""

    rate_per_s: float
    size: int

    def __post_init__(self) -> None:
        _require_rate(self.rate_per_s)
        require_positive(size=self.size)

    def times(self, count: int, seed: int) -> list[float | None]:
        return [i // self.size * self.size / self.rate_per_s for i in range(count)]

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "bursts", "rate_per_s": self.rate_per_s, "size": self.size}


@dataclass(frozen=True)
class Timed(Workload):
    """Another workload's static batches, each sent when `arrivals` says."""

    kind: ClassVar[str] = "timed"
    inner: Workload
    arrivals: Arrivals

    def batches(self, seed: int, block: int) -> list[Batch]:
        batches = self.inner.batches(seed, block)
        times = self.arrivals.times(len(batches), seed + block)
        return [[replace(row, scheduled_s=at) for row in rows] for rows, at in zip(batches, times, strict=True)]

    def warmup(self, seed: int, block: int) -> Iterator[Batch]:
        return self.inner.warmup(seed, block)

    def as_dict(self) -> dict[str, Any]:
        # The inner name must not decide the hash either.
        inner = {key: value for key, value in self.inner.as_dict().items() if key != "name"}
        return {"kind": self.kind, "name": self.name, "arrivals": self.arrivals.as_dict(), "workload": inner}
