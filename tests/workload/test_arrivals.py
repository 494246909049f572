from __future__ import annotations

from itertools import islice

import pytest

from infopt.errors import InputError
from infopt.workload.arrivals import Bursts, ClosedLoop, Poisson, Timed
from infopt.workload.shapes import FixedShape

SHAPE = FixedShape(
    name="s", prompt_tokens=4, new_tokens=2, batch=2, requests=6, text_ids=tuple(range(100)), context=64
)  # fmt: skip


def test_poisson_arrivals_have_exponential_gaps_of_the_rate() -> None:
    times = [time for time in Poisson(4.0).times(20_000, seed=1) if time is not None]
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.03)
    # An exponential distribution's standard deviation is its mean.
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(0.25, rel=0.05)
    assert times == sorted(times)


def test_arrivals_follow_the_seed() -> None:
    assert Poisson(4.0).times(5, 1) == Poisson(4.0).times(5, 1) != Poisson(4.0).times(5, 2)


def test_bursts_come_together_at_the_mean_rate() -> None:
    assert Bursts(rate_per_s=2.0, size=3).times(7, 0) == [0.0, 0.0, 0.0, 1.5, 1.5, 1.5, 3.0]


def test_a_closed_loop_schedules_nothing() -> None:
    assert ClosedLoop().times(3, 0) == [None] * 3


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_must_be_positive(rate: float) -> None:
    with pytest.raises(InputError, match="allowed: above 0"):
        Poisson(rate)
    with pytest.raises(InputError, match="allowed: above 0"):
        Bursts(rate, 2)


def test_a_timed_workload_sends_the_same_batches_on_schedule() -> None:
    timed = Timed(name="t", inner=SHAPE, arrivals=Bursts(rate_per_s=2.0, size=2))
    batches = timed.batches(3, 1)
    assert [[row.prompt_ids for row in batch] for batch in batches] == [
        [row.prompt_ids for row in batch] for batch in SHAPE.batches(3, 1)
    ]
    assert [{row.scheduled_s for row in batch} for batch in batches] == [{0.0}, {0.0}, {1.0}, {1.0}, {2.0}, {2.0}]
    assert list(islice(timed.warmup(3, 1), 2)) == list(islice(SHAPE.warmup(3, 1), 2))


def test_blocks_arrive_differently_and_arms_alike() -> None:
    timed = Timed(name="t", inner=SHAPE, arrivals=Poisson(1.0))
    assert timed.batches(0, 0) == timed.batches(0, 0)
    assert [b[0].scheduled_s for b in timed.batches(0, 0)] != [b[0].scheduled_s for b in timed.batches(0, 1)]


def test_the_hash_knows_the_arrivals() -> None:
    timed = Timed(name="t", inner=SHAPE, arrivals=Poisson(1.0))
    assert timed.hash == Timed(name="u", inner=SHAPE, arrivals=Poisson(1.0)).hash
    assert len({SHAPE.hash, timed.hash, Timed(name="t", inner=SHAPE, arrivals=Poisson(2.0)).hash}) == 3
