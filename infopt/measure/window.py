"""One block: warm up, open the window, run the requests, close it. The worker calls this for each block of its arm.

Tokenisation happens before the window and is timed apart, as is detokenisation; what is done between requests besides
(handing samples on) does not count as wall time of the window either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from infopt.errors import InfoptError
from infopt.measure.clock import Clock
from infopt.measure.contention import ContentionMeter, contention_flags
from infopt.measure.energy import EnergyMeter, NoEnergy
from infopt.measure.memory import MemoryWatch
from infopt.measure.nvml import Gpu
from infopt.measure.warmup import warm_up
from infopt.protocols import Engine, Request, Trace
from infopt.result import Block, Sample
from infopt.settings import WARMUP_CAP, WARMUP_LATER

Batch = Sequence[Request]


def _drop(sample: Sample) -> None:
    """Samples are returned anyway."""


@dataclass(frozen=True)
class Instruments:
    """What watches a block. `tokenise` and `detokenise` do a request's text work once more, to be timed; None: untimed."""

    clock: Clock
    energy: EnergyMeter = field(default_factory=lambda: NoEnergy("no energy meter"))
    contention: ContentionMeter = field(default_factory=ContentionMeter)
    memory: MemoryWatch | None = None
    gpu: Gpu | None = None
    tokenise: Callable[[Batch], object] | None = None
    detokenise: Callable[[Trace], object] | None = None
    idle_power_w: float | None = None


@dataclass(frozen=True)
class Place:
    """Which block this is: `round` and `position` as in `result.Block`."""

    arm: str
    index: int
    round: int
    position: int


def measure_block(
    engine: Engine,
    batches: Sequence[Batch],
    instruments: Instruments,
    place: Place,
    *,
    warmup: Iterator[Batch],
    is_first_block: bool,
    warmup_cap: int = WARMUP_CAP,
    warmup_later: int = WARMUP_LATER,
    on_sample: Callable[[Sample], None] = _drop,
) -> tuple[Block, list[Sample]]:
    """Runs `batches` through `engine`. Warm-up samples come first in the list, marked.

    A request that fails becomes a sample with `error`; what infopt refuses on purpose (InfoptError) is raised.
    """
    clock = instruments.clock
    samples: list[Sample] = []
    runner = _Runner(engine, instruments, place)

    def warm() -> float:
        start = clock.now()
        sample = runner.run(next(warmup), len(samples), start, is_warmup=True)
        samples.append(sample)
        on_sample(sample)
        return clock.now() - start

    warmed = warm_up(warm, is_first_block=is_first_block, cap=warmup_cap, later=warmup_later)
    flags = [] if warmed.is_steady else [f"warmup.cap: still a trend after {warmed.iterations} iterations"]
    tokenise_s = [runner.timed(instruments.tokenise, batch) for batch in batches]

    clock.synchronise()
    instruments.contention.begin()
    instruments.energy.begin()
    start, aside = clock.now(), 0.0
    for index, (batch, seconds) in enumerate(zip(batches, tokenise_s, strict=True)):
        _wait(clock, start, batch)
        sample = runner.run(batch, index, start, tokenise_s=seconds)
        pause = clock.now()
        samples.append(sample)
        on_sample(sample)
        if instruments.memory:
            instruments.memory.sample()
        aside += clock.now() - pause + (sample.detokenize_s or 0.0)
    clock.synchronise()
    wall_s = clock.now() - start - aside
    return _close(instruments, place, wall_s, flags), samples


def _close(instruments: Instruments, place: Place, wall_s: float, flags: Sequence[str]) -> Block:
    """Reads every instrument at the window's end."""
    energy = instruments.energy.end()
    other = instruments.contention.end()
    throttles = instruments.gpu.throttles() if instruments.gpu else ()
    return Block(
        arm=place.arm,
        index=place.index,
        round=place.round,
        position=place.position,
        wall_s=wall_s,
        other_cpu_cores=other,
        flags=(*flags, *contention_flags(other, throttles), *energy.flags),
        energy_j=energy.joules,
        idle_power_w=instruments.idle_power_w,
    )


def _wait(clock: Clock, start: float, batch: Batch) -> None:
    """A static batch leaves when its last member is due."""
    due = max((request.scheduled_s for request in batch if request.scheduled_s is not None), default=None)
    if due is not None and (early := start + due - clock.now()) > 0:
        clock.sleep(early)


@dataclass(frozen=True)
class _Runner:
    engine: Engine
    instruments: Instruments
    place: Place

    def run(self, batch: Batch, index: int, start: float, *, is_warmup: bool = False, tokenise_s: float | None = None) -> Sample:
        """One `generate` call as a sample."""
        clock = self.instruments.clock
        clock.synchronise()
        submitted = clock.now() - start
        try:
            trace, error = self.engine.generate(batch), None
        except InfoptError:
            raise
        except Exception as problem:
            trace, error = Trace((), (), ()), f"{type(problem).__name__}: {problem}"
        detokenise_s = None if error else self.timed(self.instruments.detokenise, trace)
        return Sample(
            arm=self.place.arm,
            block=self.place.index,
            index=index,
            warmup=is_warmup,
            batch=len(trace.output_ids) or len(batch),
            # Padding is no prompt: an uneven batch counts its mean length.
            prompt_tokens=sum(len(request.prompt_ids) for request in batch) // len(batch),
            out_tokens=max((len(row) for row in trace.output_ids), default=0),
            emission_s=trace.emission_s,
            emission_tokens=trace.emission_tokens,
            prefill_s=trace.prefill_s,
            tokenize_s=tokenise_s,
            detokenize_s=detokenise_s,
            drafted=trace.drafted,
            accepted=trace.accepted,
            accepted_at=trace.accepted_at,
            reused_tokens=trace.reused_tokens,
            # The request that waits longest speaks for its batch.
            scheduled_s=min((r.scheduled_s for r in batch if r.scheduled_s is not None), default=None),
            submitted_s=submitted,
            error=error,
        )

    def timed(self, work: Callable[..., object] | None, subject: object) -> float | None:
        """Seconds that `work` takes on `subject`; None without work."""
        if work is None:
            return None
        start = self.instruments.clock.now()
        work(subject)
        return self.instruments.clock.now() - start
