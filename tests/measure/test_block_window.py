from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import pytest
from fakes import FakeClock, FakeEngine, Script

from infopt.errors import InputError
from infopt.measure import latency
from infopt.measure.contention import ContentionMeter
from infopt.measure.energy import Counter, CounterMeter, NoEnergy
from infopt.measure.latency import goodput, summarise
from infopt.measure.window import Instruments, Place, measure_block
from infopt.protocols import Request, Trace
from infopt.result import Block, Sample
from infopt.settings import WARMUP_CAP

PLACE = Place(arm="a", index=3, round=1, position=1)


def request(name: str = "r", length: int = 4, scheduled_s: float | None = None) -> Request:
    return Request(id=name, prompt_ids=tuple(range(1, length + 1)), max_new_tokens=3, scheduled_s=scheduled_s)


def quiet(clock: FakeClock) -> ContentionMeter:
    return ContentionMeter(machine_s=lambda: 0.0, own_s=lambda: 0.0, now=clock.now)


def run(
    engine: FakeEngine, batches: list[list[Request]], *, is_first_block: bool = False, **rest: object
) -> tuple[Block, list[Sample]]:
    instruments = Instruments(clock=engine.clock, **{"contention": quiet(engine.clock), **rest})  # type: ignore[arg-type]
    warmup: Iterator[list[Request]] = repeat([request("warm")])
    return measure_block(engine, batches, instruments, PLACE, warmup=warmup, is_first_block=is_first_block)


def test_scripted_token_times_come_back_exactly() -> None:
    clock = FakeClock()
    warm = Script((7.0, 8.0))
    engine = FakeEngine(clock, [warm, Script((0.5, 0.75, 1.0), prefill_s=0.25), Script((1.0, 1.5, 2.0), (1, 2, 1))])
    block, samples = run(engine, [[request("x", 4), request("y", 7)], [request("z")]])
    assert [sample.warmup for sample in samples] == [True, False, False]
    first, second = samples[1:]
    assert (first.batch, first.prompt_tokens, first.out_tokens, first.submitted_s) == (2, 5, 3, 0.0)
    assert (second.batch, second.out_tokens, second.submitted_s) == (1, 4, 1.0)
    assert (latency.ttft_s(first), latency.tpot_s(first), latency.itl_s(first)) == (0.5, 0.25, [0.25, 0.25])
    assert (latency.ttft_s(second), latency.tpot_s(second), latency.itl_s(second)) == (1.0, 1 / 3, [0.25, 0.5])
    assert first.prefill_s == 0.25
    assert block.wall_s == 3.0
    assert (block.arm, block.index, block.round, block.position) == ("a", 3, 1, 1)
    found = summarise(samples, [block], {"ttft_s": 0.6, "tpot_s": 0.3})
    assert found["throughput_tok_per_s"].value == pytest.approx((2 * 3 + 4) / 3.0)
    assert found["goodput_share"].value == pytest.approx(2 / 3)
    assert found["goodput_req_per_s"].value == pytest.approx(2 / 3.0)


def test_one_token_outputs_have_no_time_per_token() -> None:
    engine = FakeEngine(FakeClock(), [Script((0.5,))])
    block, samples = run(engine, [[request()]])
    assert samples[-1].out_tokens == 1
    assert summarise(samples, [block])["tpot_s.p50"].value is None


def test_a_failing_request_is_a_sample_and_counts_against_goodput() -> None:
    engine = FakeEngine(FakeClock(), [Script((0.5,)), RuntimeError("no room"), Script((0.5, 0.6))])
    _, samples = run(engine, [[request(), request()], [request()]])
    failed, good = samples[1:]
    assert failed.error == "RuntimeError: no room"
    assert (failed.batch, failed.out_tokens, failed.emission_s) == (2, 0, ())
    assert good.error is None
    counts = goodput(samples, {"ttft_s": 1.0})
    assert (counts.met, counts.errors, counts.total) == (1, 2, 3)


def test_what_infopt_refuses_is_raised() -> None:
    with pytest.raises(InputError, match="no requests"):
        run(FakeEngine(FakeClock(), [InputError("no requests")]), [[request()]])


def test_first_block_warms_up_until_steady_and_later_ones_once() -> None:
    falling = [Script((seconds,)) for seconds in (9.0, 8.0, 7.0, 6.0, 5.0)]
    steady = [Script((seconds,)) for seconds in (4.0, 4.1, 4.0, 4.1, 4.0)]
    engine = FakeEngine(FakeClock(), [*falling, *steady])
    block, samples = run(engine, [[request()]], is_first_block=True)
    warm = [sample for sample in samples if sample.warmup]
    assert 5 < len(warm) <= 10
    assert block.flags == ("energy.missing: no energy meter",)
    later = FakeEngine(FakeClock(), [*falling, *steady])
    assert sum(sample.warmup for sample in run(later, [[request()]])[1]) == 1


def test_a_warm_up_that_never_settles_is_flagged() -> None:
    engine = FakeEngine(FakeClock(), [Script((100.0 - i,)) for i in range(50)])
    block, samples = run(engine, [[request()]], is_first_block=True)
    assert sum(sample.warmup for sample in samples) == WARMUP_CAP
    assert any(flag.startswith("warmup.cap: ") for flag in block.flags)


def test_text_work_is_timed_apart_and_is_no_part_of_the_window() -> None:
    clock = FakeClock()
    engine = FakeEngine(clock, [Script((1.0, 2.0))])

    def tokenise(batch: object) -> None:
        clock.sleep(0.25)

    def detokenise(trace: Trace) -> None:
        clock.sleep(0.125 * len(trace.output_ids))

    block, samples = run(engine, [[request(), request()], [request()]], tokenise=tokenise, detokenise=detokenise)
    measured = samples[1:]
    assert [sample.tokenize_s for sample in measured] == [0.25, 0.25]
    assert [sample.detokenize_s for sample in measured] == [0.25, 0.125]
    assert block.wall_s == 4.0
    assert latency.e2e_s(measured[0]) == 2.0


def test_handing_a_sample_on_is_no_part_of_the_window() -> None:
    clock = FakeClock()
    engine = FakeEngine(clock, [Script((1.0,))])
    seen: list[Sample] = []

    def slow(sample: Sample) -> None:
        seen.append(sample)
        clock.sleep(10.0)

    block, samples = measure_block(
        engine,
        [[request()], [request()]],
        Instruments(clock=clock, contention=quiet(clock)),
        PLACE,
        warmup=repeat([request()]),
        is_first_block=False,
        on_sample=slow,
    )
    assert seen == samples
    assert block.wall_s == 2.0


def test_open_loop_waits_for_the_schedule_and_counts_queueing() -> None:
    clock = FakeClock()
    engine = FakeEngine(clock, [Script((1.0, 3.0))])
    _, samples = run(engine, [[request(scheduled_s=0.5)], [request(scheduled_s=1.0)], [request(scheduled_s=20.0)]])
    measured = samples[1:]
    assert [sample.submitted_s for sample in measured] == [0.5, 3.5, 20.0]
    assert [latency.scheduled_latency_s(sample) for sample in measured] == [3.0, 5.5, 3.0]


def test_energy_covers_the_window_and_the_device_is_synchronised_at_its_edges() -> None:
    clock = FakeClock()
    at: list[tuple[float, int]] = []

    def read() -> float:
        at.append((clock.now(), clock.synchronised))
        return 50.0 * clock.now()

    engine = FakeEngine(clock, [Script((9.0,)), Script((2.0, 4.0))])
    meter = CounterMeter([Counter(read)], "counter", clock.now)
    block, _ = run(engine, [[request()], [request()]], energy=meter, idle_power_w=10.0)
    assert block.energy_j == pytest.approx(50.0 * 8.0)
    assert block.idle_power_w == 10.0
    assert block.flags == ("energy.method: counter",)
    # Warm-up synchronises once, each of the two requests once, and each edge of the window once before its reading.
    assert at == [(109.0, 2), (117.0, 5)]


def test_a_block_beside_other_load_is_flagged() -> None:
    clock = FakeClock()
    engine = FakeEngine(clock, [Script((4.0,))])
    busy = ContentionMeter(machine_s=lambda: 1.5 * clock.now(), own_s=lambda: clock.now(), now=clock.now)
    block, _ = run(engine, [[request()]], contention=busy, energy=NoEnergy("none here"))
    assert block.other_cpu_cores == pytest.approx(0.5)
    assert block.flags == ("contended: others used 0.50 cores, 0.15 allowed", "energy.missing: none here")
