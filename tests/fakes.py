"""A clock that only moves when told, and an engine whose tokens come at scripted times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from infopt.protocols import Request, Trace


@dataclass
class FakeClock:
    time_s: float = 100.0
    synchronised: int = 0

    def now(self) -> float:
        return self.time_s

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds

    def synchronise(self) -> None:
        self.synchronised += 1


@dataclass(frozen=True)
class Script:
    """One call: when tokens come, seconds from submission, and how many of them each time."""

    emission_s: tuple[float, ...]
    emission_tokens: tuple[int, ...] | None = None
    prefill_s: float | None = None
    drafted: int | None = None
    accepted: int | None = None


@dataclass
class FakeEngine:
    """Plays `scripts` in order, the last one for ever; an exception among them is raised."""

    clock: FakeClock
    scripts: Sequence[Script | Exception]
    name: str = "fake"
    calls: list[tuple[float, list[Request]]] = field(default_factory=list)
    is_closed: bool = False

    def generate(self, requests: Sequence[Request]) -> Trace:
        script = self.scripts[min(len(self.calls), len(self.scripts) - 1)]
        self.calls.append((self.clock.now(), list(requests)))
        if isinstance(script, Exception):
            raise script
        self.clock.sleep(script.emission_s[-1])
        tokens = script.emission_tokens or (1,) * len(script.emission_s)
        return Trace(
            output_ids=tuple(tuple(range(sum(tokens))) for _ in requests),
            emission_s=script.emission_s,
            emission_tokens=tokens,
            prefill_s=script.prefill_s,
            drafted=script.drafted,
            accepted=script.accepted,
        )

    def close(self) -> None:
        self.is_closed = True
