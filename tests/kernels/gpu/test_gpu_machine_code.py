"""What the compiler makes of the kernels, read from the machine code for Hopper and A100: no GPU is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from gpu_predict import BESIDE, INSTRUCTIONS

from infopt.kernels.gpu.launches import KERNELS

#: Reads a few numbers, as many as a vocabulary has blocks.
SMALL = {"largest_of_blocks"}
#: Bytes of shared memory that a program may have.
SHARED = {90: 227 * 1024, 80: 163 * 1024}


@pytest.fixture(scope="module")
def made() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_was_compiled(made: list[dict[str, Any]]) -> None:
    for capability in (90, 80):
        assert {row["kernel"] for row in made if row["capability"] == capability} == {
            name for names in KERNELS.values() for name in names
        }


def test_who_overlaps_waits_before_it_reads_or_writes(made: list[dict[str, Any]]) -> None:
    """Every kernel of a step, or whoever waits for the next would not have waited for the one before."""
    found = [row for row in made if row["step"] == "overlapping"]
    assert {row["kernel"] for row in found} == {name for names in KERNELS.values() for name in names} - {"spread"}
    assert not [row["kernel"] for row in found if row["before_wait"] != []]
    assert {row["before_wait"] is None for row in made if row["step"] != "overlapping"} == {True}
    asked = {row["kernel"] for row in made if any(name.startswith("CCTL.E.PF2") for name in row["operations"])}
    assert asked == {"vector", "slices", "tiles"}  # for weights


def test_nothing_spills(made: list[dict[str, Any]]) -> None:
    assert not [row for row in made if row["spills"]]


def test_weights_and_keys_are_read_16_bytes_at_a_time(made: list[dict[str, Any]]) -> None:
    assert not [row for row in made if "16" not in row["loads"] and row["kernel"] not in SMALL]
    products = [row for row in made if "needed" in row]
    assert len(products) > 50
    assert not [row for row in products if row["loads"]["16"] < row["needed"]]


def test_tiles_use_tensor_cores(made: list[dict[str, Any]]) -> None:
    for row in made:
        if row["kernel"] in ("slices", "tiles", "attend"):
            kinds = {name.split(".")[0] for name in row["operations"]}
            assert kinds & {"HGMMA", "HMMA"}, row["step"]


def test_shared_memory_fits(made: list[dict[str, Any]]) -> None:
    assert not [row for row in made if row["shared_bytes"] > SHARED[row["capability"]]]


def test_products_take_the_instructions_that_are_reckoned_with(made: list[dict[str, Any]]) -> None:
    """No more, since an H200 issues some three while it reads a weight of four bits; nor many fewer, or the reckoning is
    wrong."""
    weights: dict[tuple[str, str], list[float]] = {}
    programs: dict[str, list[int]] = {}
    for row in made:
        if "each" in row and row["is_first"] and row["capability"] == 90:
            weights.setdefault((row["kernel"], row["weights"]), []).append(row["loop"] / row["each"])
            programs.setdefault(row["kernel"], []).append(sum(row["operations"].values()) - row["loop"])
    assert (weights.keys(), programs.keys()) == (INSTRUCTIONS.keys(), BESIDE.keys())
    for key, numbers in weights.items():
        assert 0.6 * INSTRUCTIONS[key] < max(numbers) <= INSTRUCTIONS[key], (key, numbers)
    for name, counts in programs.items():
        assert sum(counts) / len(counts) == pytest.approx(BESIDE[name], rel=0.35), (name, counts)
