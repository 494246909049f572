"""What candidates cost against one: turns that cancel a drift, and a failure that costs this figure alone."""

from __future__ import annotations

import pytest
from fakes import FakeClock, FakeEngine, Script

from infopt.errors import InputError
from infopt.measure.candidates import KEY, cost_ratio, not_asked
from infopt.protocols import Request

BATCHES = [[Request(str(index), (1, 2, 3), 4)] for index in range(3)]


def script(*seconds: float) -> list[Script | Exception]:
    """One call after another, each two tokens long."""
    return [Script((each / 2, each)) for each in seconds]


def test_both_answer_every_prompt_in_turns() -> None:
    clock = FakeClock()
    many, one = FakeEngine(clock, script(6.0)), FakeEngine(clock, script(9.0, 2.0))
    found = cost_ratio(many, one, BATCHES, clock)
    assert (found.value, found.samples, found.unit, found.id) == (3.0, 3, "ratio", f"{KEY}.v1")
    assert [[request.id for request in batch] for _, batch in many.calls] == [["0"], ["0"], ["1"], ["1"], ["2"], ["2"]]
    assert [[request.id for request in batch] for _, batch in one.calls] == [["0"], ["0"], ["0"], ["1"], ["1"], ["2"], ["2"]]
    times = sorted([(at, "many") for at, _ in many.calls] + [(at, "one") for at, _ in one.calls])
    assert [who for _, who in times] == ["one", *["many", "one", "one", "many"] * 3], "the first call only warms"


def test_a_machine_that_slows_down_does_so_for_both() -> None:
    clock = FakeClock()
    many, one = FakeEngine(clock, script(4.0, 4.0 * 4)), FakeEngine(clock, script(1.0, 2.0 * 2, 2.0 * 3))
    assert cost_ratio(many, one, BATCHES[:1], clock).value == 2.0


def test_the_middle_of_the_prompts_counts() -> None:
    clock = FakeClock()
    many, one = FakeEngine(clock, script(3.0, 3.0, 4.0, 4.0, 90.0)), FakeEngine(clock, script(1.0))
    assert cost_ratio(many, one, BATCHES, clock).value == 4.0


@pytest.mark.parametrize("error", [RuntimeError("out of\nluck"), InputError("too many rows")])
def test_a_failure_leaves_a_reason(error: Exception) -> None:
    clock = FakeClock()
    found = cost_ratio(FakeEngine(clock, [error]), FakeEngine(clock, script(1.0)), BATCHES, clock)
    assert (found.value, found.reason) == (None, f"{type(error).__name__}: {error}".split("\n")[0])


def test_one_candidate_has_no_ratio() -> None:
    assert (not_asked().value, not_asked().reason) == (None, "the recipe draws 1 candidate")
