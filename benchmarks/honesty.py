"""Does the verdict tell the truth on a real model and this machine?

    python benchmarks/honesty.py [--repeats 3] [--pairs 20]

Each repeat compares three arms of the demo model live: the baseline, the same again, and one that is really 10 % slower per
token (see slow_worker.py). The gate is the usual one, at most 3 % more time per output token. Expected: the same arm never
FAILs, the slowed one FAILs. Exits 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from infopt import arm_run
from infopt.arms import parse
from infopt.compare import Protocol, compare
from infopt.gates import parse_gates
from infopt.judgement import Verdict
from infopt.model.demo import fetch
from infopt.process import WorkerProcess
from infopt.settings import LoadOptions, Settings, WorkloadSpec
from infopt.units import percent

GATE = parse_gates({"tpot_s.p50": {"max_regress": "3%"}}, "gates")


class SlowProcess(WorkerProcess):
    module = "slow_worker"


def process(name: str, *arguments: Any) -> WorkerProcess:
    return (SlowProcess if name == "slowed" else WorkerProcess)(name, *arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--model", default="demo")
    chosen = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    vars(arm_run)["WorkerProcess"] = process
    if chosen.model == "demo":
        fetch()
    labels = ("baseline", "same", "slowed")
    specs = [replace(spec, label=label) for spec, label in zip(parse([chosen.model] * 3), labels, strict=True)]
    shape = WorkloadSpec(prompt_tokens=32, new_tokens=24, requests=2)
    honest = True
    for number in range(1, chosen.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            found, _ = compare(
                specs,
                shape,
                LoadOptions(seed=number),
                Settings(quality=None),
                Protocol(pairs=chosen.pairs, gates=GATE),
                results=Path(folder),
            )
        for label in labels[1:]:
            judged = found.judgements[label][0]
            effect = judged.effect or 1.0
            low, high = (percent(bound - 1, signed=True) if bound else "–" for bound in (judged.low, judged.high))
            print(f"repeat {number}: {label:<7} {percent(effect - 1, signed=True)} [{low}, {high}] {judged.verdict}", flush=True)
            honest &= (judged.verdict is Verdict.FAIL) == (label == "slowed")
    print("honest" if honest else "NOT as expected")
    return 0 if honest else 1


if __name__ == "__main__":
    sys.exit(main())
