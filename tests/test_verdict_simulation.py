"""Are verdicts honest on a machine with drift, noise and bursts? The simulator knows the true change."""

from __future__ import annotations

import numpy as np
import pytest
from simulator import BURST, CHANGES, Row, block_times, simulate, table

TRIALS = 800


@pytest.fixture(scope="module")
def gate_mode() -> dict[float, Row]:
    """20 pairs, threshold 3 %."""
    return {change: simulate(change, 0.03, TRIALS) for change in CHANGES}


@pytest.fixture(scope="module")
def adaptive_mode() -> dict[float, Row]:
    """10 pairs, and five more while undecided, up to 30."""
    return {change: simulate(change, 0.03, TRIALS, first=10, cap=30) for change in CHANGES}


def test_twenty_pairs_keep_their_promises(gate_mode: dict[float, Row]) -> None:
    print(f"\n20 pairs, threshold 3 %\n{table(list(gate_mode.values()))}")
    assert gate_mode[0.0].fail <= 0.01
    assert gate_mode[0.03].fail <= 0.05
    assert gate_mode[0.05].passed <= 0.05
    assert gate_mode[0.10].fail >= 0.90
    assert all(row.pairs == 20 for row in gate_mode.values())


def test_twenty_pairs_are_useful_and_not_only_safe(gate_mode: dict[float, Row]) -> None:
    assert gate_mode[0.0].passed >= 0.75
    assert gate_mode[0.05].fail >= 0.45
    assert gate_mode[0.03].inconclusive >= 0.90, "at the threshold itself there is nothing to decide"


def test_without_a_threshold_false_alarms_stay_below_five_percent() -> None:
    row = simulate(0.0, 0.0, TRIALS)
    assert row.fail <= 0.05
    assert row.passed <= 0.05, "nor is an unchanged candidate called improved"
    assert simulate(0.05, 0.0, TRIALS // 4).fail >= 0.9


def test_adding_pairs_keeps_the_promises_and_saves_pairs(adaptive_mode: dict[float, Row]) -> None:
    print(f"\n10 to 30 pairs in fives, threshold 3 %\n{table(list(adaptive_mode.values()))}")
    assert adaptive_mode[0.0].fail <= 0.01
    assert adaptive_mode[0.03].fail <= 0.05
    assert adaptive_mode[0.05].passed <= 0.05
    assert adaptive_mode[0.10].fail >= 0.90
    assert adaptive_mode[0.10].pairs < 15
    assert adaptive_mode[0.03].pairs > 25


def test_shares_of_verdicts_sum_to_one(adaptive_mode: dict[float, Row]) -> None:
    for row in adaptive_mode.values():
        assert row.fail + row.passed + row.inconclusive == pytest.approx(1)


def test_the_simulator_has_the_noise_it_claims() -> None:
    logs = []
    for seed in range(300):
        baseline, candidate = block_times(20, 0.1, np.random.default_rng(seed))
        logs.append(np.log(candidate / baseline))
    flat = np.concatenate(logs)
    quiet = flat[np.abs(flat - np.median(flat)) < np.log1p(BURST) / 2]
    assert np.median(flat) == pytest.approx(np.log(1.1), abs=0.002)
    assert np.std(quiet) == pytest.approx(np.sqrt(0.01**2 + 2 * 0.02**2), rel=0.05), "a step of the walk and two white terms"
    assert 0.02 < 1 - len(quiet) / len(flat) < 0.09, "pairs that a burst hits on one side only"


def test_rounds_alternate_direction() -> None:
    """On a pure drift the second block of a round is always later: ABBA makes its sign alternate."""

    class Drift(np.random.Generator):
        def normal(self, loc: float = 0, scale: float = 1, size: int = 1) -> np.ndarray:  # type: ignore[override, type-arg]
            return np.full(size, scale if scale == 0.01 else 0.0)

        def random(self, size: int = 1) -> np.ndarray:  # type: ignore[override, type-arg]
            return np.ones(size)

    baseline, candidate = block_times(4, 0.0, Drift(np.random.PCG64(0)))
    np.testing.assert_allclose(np.log(candidate / baseline), [0.01, -0.01, 0.01, -0.01], atol=1e-12)
