"""A noisy shared machine with a known true change, to see how often the verdict is right.

    python tests/simulator.py --trials 2000

Log-time of a block = random walk (1 % per block) + white noise (2 %) + bursts of 30 % that last 1–4 blocks and start
with probability 0.03 per block. Blocks run in ABBA order: even rounds baseline first, odd rounds candidate first.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infopt.gates import Gate
from infopt.judgement import Verdict
from infopt.stats import looks
from infopt.verdict import judge_paired

WALK, WHITE, BURST, BURST_BLOCKS, BURST_START = 0.01, 0.02, 0.30, 4, 0.03
CHANGES = (0.0, 0.02, 0.03, 0.05, 0.10)
Times = NDArray[np.float64]


def block_times(rounds: int, change: float, generator: np.random.Generator) -> tuple[Times, Times]:
    """Seconds per block of (baseline, candidate): [rounds] each. The candidate takes `1 + change` times as long."""
    blocks = 2 * rounds
    log_time = np.cumsum(generator.normal(0, WALK, blocks)) + generator.normal(0, WHITE, blocks)
    is_burst = np.zeros(blocks, dtype=bool)
    for start in np.flatnonzero(generator.random(blocks) < BURST_START):
        is_burst[start : start + generator.integers(1, BURST_BLOCKS + 1)] = True
    log_time[is_burst] += np.log1p(BURST)
    in_round = log_time.reshape(rounds, 2)
    in_round[1::2] = in_round[1::2, ::-1]
    return np.exp(in_round[:, 0]), np.exp(in_round[:, 1]) * (1 + change)


@dataclass(frozen=True)
class Row:
    """Shares of verdicts at one true change; IMPROVED counts as PASS, since both let a change through."""

    change: float
    fail: float
    passed: float
    inconclusive: float
    pairs: float


def simulate(change: float, tau: float, trials: int, first: int = 20, cap: int = 20, alpha: float = 0.05, seed: int = 0) -> Row:
    """`first` < `cap`: pairs are added in fives while the verdict is open, alpha split over the looks."""
    gate = Gate(figure="tpot_s.p50", condition="max_regress", limit=tau)
    plan = looks(alpha, first, cap)
    verdicts: Counter[Verdict | None] = Counter()
    used = 0
    for trial in range(trials):
        baseline, candidate = block_times(cap, change, np.random.default_rng([seed, round(change * 1e6), trial]))
        for look in plan:
            result = judge_paired(
                gate.figure, baseline[: look.pairs].tolist(), candidate[: look.pairs].tolist(), gate, look.alpha
            )
            if result.verdict is not Verdict.INCONCLUSIVE:
                break
        verdicts[result.verdict] += 1
        used += look.pairs
    passed = verdicts[Verdict.PASS] + verdicts[Verdict.IMPROVED]
    return Row(change, verdicts[Verdict.FAIL] / trials, passed / trials, verdicts[Verdict.INCONCLUSIVE] / trials, used / trials)


def table(rows: list[Row]) -> str:
    lines = [f"{'change':>7} {'P(FAIL)':>8} {'P(PASS)':>8} {'P(INCONCLUSIVE)':>16} {'pairs':>6}"]
    lines += [f"{r.change:7.0%} {r.fail:8.3f} {r.passed:8.3f} {r.inconclusive:16.3f} {r.pairs:6.1f}" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--alpha", type=float, default=0.05)
    arguments = parser.parse_args()
    for title, tau, first, cap in (
        ("20 pairs, threshold 3 %", 0.03, 20, 20),
        ("20 pairs, threshold 0", 0.0, 20, 20),
        ("10 to 30 pairs in fives, threshold 3 %", 0.03, 10, 30),
    ):
        rows = [simulate(change, tau, arguments.trials, first, cap, arguments.alpha) for change in CHANGES]
        print(f"{title}\n{table(rows)}\n")


if __name__ == "__main__":
    main()
