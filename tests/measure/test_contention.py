from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from infopt.measure.contention import ContentionMeter, contention_flags, machine_busy_s, own_busy_s


def reader(values: tuple[float, float]) -> Callable[[], float]:
    source: Iterator[float] = iter(values)
    return lambda: next(source)


@pytest.mark.parametrize(
    ("machine", "own", "wall", "cores"),
    [
        ((100.0, 120.0), (10.0, 25.0), (0.0, 10.0), 0.5),
        ((100.0, 115.0), (10.0, 25.0), (0.0, 10.0), 0.0),
        # Counters tick in hundredths of a second: never less than nothing.
        ((100.0, 114.9), (10.0, 25.0), (0.0, 10.0), 0.0),
        ((0.0, 0.0), (10.0, 25.0), (0.0, 10.0), None),
        ((100.0, 120.0), (10.0, 25.0), (5.0, 5.0), None),
    ],
)
def test_cores_that_others_used(
    machine: tuple[float, float], own: tuple[float, float], wall: tuple[float, float], cores: float | None
) -> None:
    meter = ContentionMeter(reader(machine), reader(own), reader(wall))
    meter.begin()
    assert meter.end() == cores


def test_flags_name_the_load_and_the_limit() -> None:
    assert contention_flags(0.15) == contention_flags(None) == ()
    assert contention_flags(0.16) == ("contended: others used 0.16 cores, 0.15 allowed",)
    assert contention_flags(0.0, ("power brake",)) == ("throttled: power brake",)


def test_the_readers_count_work_and_never_go_back() -> None:
    before = own_busy_s(), machine_busy_s()
    start = os.times()
    while os.times().user + os.times().system - start.user - start.system < 0.1:
        pass
    after = own_busy_s(), machine_busy_s()
    assert after[0] - before[0] >= 0.09
    assert after[1] >= before[1]
