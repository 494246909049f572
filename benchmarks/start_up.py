"""CPU time of the commands that must feel instant: what a shell, an editor or a CI job waits for before any work starts.

    infopt --help                  0.3 s
    a refused recipe               0.3 s
    compare of two stored runs     1 s

User plus system time of the child process, best of five, so that other load on the machine does not count. Prints a
table and exits 1 when a command is over its bar.

    python benchmarks/start_up.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from infopt.result import Arm, Block, Run, Sample, dump

REPEATS = 5
BLOCKS, REQUESTS, TOKENS = 20, 3, 64
RECIPE = "version: 1\nsteps:\n  - rtn: {bit: 4}\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "misspelt.yaml"
        recipe.write_text(RECIPE, encoding="utf-8")
        runs = [str(write_run(folder / "results" / label, label)) for label in ("before", "after")]
        commands = (
            ("infopt --help", 0.3, ["--help"]),
            ("a refused recipe", 0.3, ["compare", "demo", f"demo:{recipe}"]),
            ("compare of two stored runs", 1.0, ["compare", *runs]),
        )
        rows = [(text, bar, min(cpu_s(arguments) for _ in range(REPEATS))) for text, bar, arguments in commands]
    for text, bar, seconds in rows:
        print(f"{text:<28} {seconds:5.2f} s CPU   (at most {bar:.1f} s)   {'ok' if seconds <= bar else 'OVER'}")
    return int(any(seconds > bar for _, bar, seconds in rows))


def write_run(folder: Path, label: str) -> Path:
    """A stored run of the size that a gate leaves behind."""
    folder.mkdir(parents=True)
    recipe = {"version": 1, "name": label, "gates": {"tpot_s.p50": {"max_regress": 0.03}}}
    run = Run(
        id=label, name=label, created_utc="2031-01-01T00:00:00+00:00", is_complete=True, infopt_version="0",
        arm=Arm(label=label, model="demo", reference="demo", reference_hash="", recipe=recipe, engine="transformers",
                dtype="float32", device="cpu"),
        workload={"name": "128+64x1"}, workload_hash="w", environment={"cpu": "any"}, noise={"tpot_s.p50": 0.01},
        blocks=tuple(Block(arm=label, index=i, round=i, position=0, wall_s=1.0) for i in range(BLOCKS)),
    )  # fmt: skip
    (folder / "run.json").write_text(dump(run), encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(BLOCKS * REQUESTS):
            sample = Sample(
                arm=label, block=number // REQUESTS, index=number % REQUESTS, batch=1, prompt_tokens=128, out_tokens=TOKENS,
                emission_s=tuple(0.1 + 0.01 * i for i in range(TOKENS)), emission_tokens=(1,) * TOKENS,
            )  # fmt: skip
            stream.write(sample.model_dump_json() + "\n")
    return folder


def cpu_s(arguments: list[str]) -> float:
    """User and system seconds of one `infopt` process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "infopt", *arguments], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    raise SystemExit(main())
