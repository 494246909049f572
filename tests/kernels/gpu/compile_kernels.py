"""Compiles what steps of real shapes launch, for Hopper and A100, and prints what the machine code is like, as JSON lines.

A process of its own: where kernels are interpreted they cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from gpu_models import SHAPES, outline, weight

from infopt.kernels.gpu import launches
from infopt.kernels.gpu.choices import Table, candidates
from infopt.kernels.gpu.ops import kernels
from infopt.kernels.gpu.overlap import overlapping
from infopt.kernels.gpu.products import Behind, Feed
from infopt.kernels.gpu.weight import BLOCK
from infopt.runtime.device_tuning import roles
from infopt.runtime.graph_step import GraphStep

#: Shape, kind of weights, rows, tokens of each; and whether what else would be timed is compiled too.
STEPS = [
    ("8B", "bfloat16", 1, 1, True), ("8B", "int4", 1, 1, True), ("8B", "int8", 1, 1, False), ("8B", "float8", 1, 1, False),
    ("8B", "int4", 8, 1, True), ("8B", "int4", 16, 1, True), ("8B", "int4", 64, 1, True), ("8B", "int8", 64, 1, False),
    ("8B", "float8", 8, 1, False), ("0.6B", "bfloat16", 2, 5, True), ("1B", "bfloat16", 64, 1, True),
]  # fmt: skip
#: Those that are compiled for A100, too; float8 is no type of it.
BOTH = ("bfloat16", "int4")


def about_loop(launch: launches.Launch) -> dict[str, Any]:
    """Of a product: its kind of weights, how many of them a lane has in one turn of the loop, and how many loads of 16 bytes it
    needs for these and their activations, which are in flight for as many turns as there are stages."""
    known, pointers = dict(launch.constants), dict(launch.signature)
    if launch.name not in ("vector", "slices", "tiles"):
        return {}
    bits, lanes = known.get("BITS") or 0, 32 * launch.warps
    fields = 16 // bits if bits else 1
    inputs = known["BK"] if launch.name == "vector" else known.get("WAYS", 1) * known["STEP"] * fields
    sizes = {"*i16": 2 / fields, "*bf16": 2, "*fp8e4nv": 1, "*fp16": 2, "*fp32": 4}
    weights, x = (rows * inputs * sizes[pointers[name]] for rows, name in ((known["BN"], "w"), (known["BM"], "x")))
    needed = (weights + (x if launch.name != "tiles" else 0)) / 16 / lanes  # a tile's activations may be read in parts
    kind = f"int{bits}" if bits else {"*bf16": "bfloat16", "*fp8e4nv": "float8"}.get(str(pointers["w"]), "")
    turns = 1 if launch.name == "vector" else launch.stages
    is_wide = bits == 0 or known["STEP"] > BLOCK  # a block alone, of groups that are one, is read eight bytes at a time
    return {"weights": kind, "each": known["BN"] * inputs / lanes, "needed": int(needed) * turns if is_wide else 0}


def launched(shape: str, kind: str, rows: int, tokens: int, others: bool) -> tuple[list[launches.Launch], int]:
    """The others behind as many that a step launches."""
    model, table = outline(SHAPES[shape], kind), Table()
    with launches.recorded() as found:
        GraphStep(model, ops=kernels(table, 132)).rehearse(rows, tokens)
        first, count = len(found), rows * tokens
        for role in [roles(model)[0], roles(model)[3]] if others else []:
            chosen = role.weights[0]
            parts = chosen.inner // (4 if count == 1 else 16)  # as many as the smallest blocks leave
            x, squares = (torch.empty(*size, dtype=dtype, device="meta") for size, dtype in (
                ((count, chosen.inner), torch.bfloat16), ((parts, count), torch.float32)
            ))  # fmt: skip
            gain = torch.empty(chosen.rows, dtype=torch.bfloat16, device="meta") if role.feeds_norm else None
            asked = role.asked(chosen, count, torch.bfloat16)
            for choice in candidates(asked)[1:]:
                table.chosen = {asked.key: choice}
                kernels(table, 132).product(Feed(x, squares if role.has_norm else None, 1e-5), chosen, Behind(gain=gain))
    return found, first


def beside() -> Iterator[tuple[str, launches.Launch]]:
    """Products of integers that the shapes above do not have: zero points, groups of 32, other activations."""
    for dtype, kind, group, has_zeros, rows in (
        (torch.bfloat16, "int4", 128, True, 1), (torch.bfloat16, "int4", 32, True, 8), (torch.bfloat16, "int8", 32, True, 16),
        (torch.bfloat16, "int4", 32, False, 64), (torch.float16, "int4", 128, True, 16), (torch.float16, "int8", 128, False, 1),
        (torch.float16, "int8", 64, False, 64), (torch.float32, "int4", 128, False, 1), (torch.float32, "int8", 128, False, 16),
    ):  # fmt: skip
        made = weight(4096, 4096, kind, group)
        made = replace(made, zeros=made.scales if has_zeros else None)
        x = torch.empty(rows, 4096, dtype=dtype, device="meta")
        with launches.recorded() as found:
            kernels(Table(), 132).product(Feed(x), made)
        yield f"{kind} groups of {group}, {dtype}, zeros {has_zeros}, {rows} rows", found[0]


def overlapping_ones() -> list[launches.Launch]:
    """Each kernel as steps of several kinds have it."""
    found = {}
    for kind, rows, tokens in (("int4", 1, 1), ("bfloat16", 1, 1), ("bfloat16", 2, 4), ("float8", 2, 4), ("int4", 64, 1)):
        with launches.recorded() as each, overlapping(True):
            GraphStep(outline(SHAPES["8B"], kind), ops=kernels(Table(), 132)).rehearse(rows, tokens)
        found |= {(launch.name, launch.signature, launch.constants): launch for launch in each}
    return list(found.values())


def main() -> None:
    for launch in overlapping_ones():
        known: dict[str, Any] = {"step": "overlapping", "kernel": launch.name, "capability": 90}
        print(json.dumps(known | vars(launches.compiled(launch, 90))), flush=True)
    for step, launch in beside():
        known = {"step": step, "kernel": launch.name, "capability": 90, "is_first": False}
        print(json.dumps(known | about_loop(launch) | vars(launches.compiled(launch, 90))), flush=True)
    seen = set()
    for shape, kind, rows, tokens, others in STEPS:
        found, first = launched(shape, kind, rows, tokens, others)
        for place, launch in enumerate(found):
            same = (launch.name, launch.signature, launch.constants, launch.aligned, launch.warps, launch.stages)
            if same in seen:
                continue
            seen.add(same)
            for capability in (90, 80) if kind in BOTH and shape == "8B" else (90,):
                known = {"step": f"{shape} {kind} {rows} × {tokens}", "kernel": launch.name, "capability": capability}
                known |= about_loop(launch) | {"is_first": place < first}
                print(json.dumps(known | vars(launches.compiled(launch, capability))), flush=True)


if __name__ == "__main__":
    main()
