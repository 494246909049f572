"""Compiles what steps of real shapes launch, for Hopper and A100, and prints what the machine code is like, as JSON lines.

A process of its own: where kernels are interpreted they cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from gpu_models import SHAPES, outline

from infopt.kernels.gpu import launches
from infopt.kernels.gpu.choices import Table, candidates
from infopt.kernels.gpu.ops import kernels
from infopt.kernels.gpu.overlap import overlapping
from infopt.kernels.gpu.products import Behind, Feed
from infopt.runtime.device_tuning import roles
from infopt.runtime.graph_step import GraphStep

#: Shape, kind of weights, rows, tokens of each; and whether what else would be timed is compiled too.
STEPS = [
    ("8B", "bfloat16", 1, 1, True), ("8B", "int4", 1, 1, True), ("8B", "int8", 1, 1, False), ("8B", "float8", 1, 1, False),
    ("8B", "int4", 8, 1, True), ("8B", "int4", 64, 1, True), ("8B", "int8", 64, 1, False), ("8B", "float8", 8, 1, False),
    ("0.6B", "bfloat16", 2, 5, True), ("1B", "bfloat16", 64, 1, True),
]  # fmt: skip
#: Those that are compiled for A100, too; float8 is no type of it.
BOTH = ("bfloat16", "int4")


def weights_a_lane(launch: launches.Launch) -> tuple[str, float] | None:
    """Kind of weights, and how many a lane has in one turn of a product's loop."""
    known, pointer = dict(launch.constants), dict(launch.signature).get("w")
    bits = known.get("BITS") or 0
    count = known.get("BN", 0) * known.get("BK", known.get("WAYS", 1) * known.get("STEP", 0)) * (16 // bits if bits else 1)
    kind = f"int{bits}" if bits else {"*bf16": "bfloat16", "*fp8e4nv": "float8"}.get(str(pointer), "")
    return (kind, count / 32 / launch.warps) if launch.name in ("vector", "slices", "tiles") else None


def launched(shape: str, kind: str, rows: int, tokens: int, others: bool) -> tuple[list[launches.Launch], int]:
    """The others behind as many that a step launches."""
    model, table = outline(SHAPES[shape], kind), Table()
    with launches.recorded() as found:
        GraphStep(model, ops=kernels(table, 132)).rehearse(rows, tokens)
        first, count = len(found), rows * tokens
        for role in [roles(model)[0], roles(model)[3]] if others else []:
            weight = role.weights[0]
            x, squares = (torch.empty(*size, dtype=dtype, device="meta") for size, dtype in (
                ((count, weight.inner), torch.bfloat16), ((64, count), torch.float32)
            ))  # fmt: skip
            gain = torch.empty(weight.rows, dtype=torch.bfloat16, device="meta") if role.feeds_norm else None
            asked = role.asked(weight, count, torch.bfloat16)
            for choice in candidates(asked)[1:]:
                table.chosen = {asked.key: choice}
                kernels(table, 132).product(Feed(x, squares if role.has_norm else None, 1e-5), weight, Behind(gain=gain))
    return found, first


def overlapping_ones() -> list[launches.Launch]:
    """Each kernel once."""
    found = {}
    for kind, rows in (("int4", 1), ("bfloat16", 1), ("int4", 64)):
        with launches.recorded() as each, overlapping(True):
            GraphStep(outline(SHAPES["8B"], kind), ops=kernels(Table(), 132)).rehearse(rows, 1)
        found |= {launch.name: launch for launch in each}
    return list(found.values())


def main() -> None:
    for launch in overlapping_ones():
        known: dict[str, Any] = {"step": "overlapping", "kernel": launch.name, "capability": 90}
        print(json.dumps(known | vars(launches.compiled(launch, 90))), flush=True)
    seen = set()
    for shape, kind, rows, tokens, others in STEPS:
        found, first = launched(shape, kind, rows, tokens, others)
        for place, launch in enumerate(found):
            same = (launch.name, launch.signature, launch.constants, launch.aligned, launch.warps, launch.stages)
            if same in seen:
                continue
            seen.add(same)
            for capability in (90, 80) if kind in BOTH and shape == "8B" else (90,):
                known: dict[str, Any] = {
                    "step": f"{shape} {kind} {rows} × {tokens}",
                    "kernel": launch.name,
                    "capability": capability,
                }
                code, lane = launches.compiled(launch, capability), weights_a_lane(launch)
                if lane is not None and place < first:
                    known |= {"weights": lane[0], "instructions": code.loop / lane[1]}
                print(json.dumps(known | vars(code)), flush=True)


if __name__ == "__main__":
    main()
