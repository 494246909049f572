"""What a GPU could do, and what a step should take on it: bytes over its read rate, and a little for every launch.

limit     max((W + b·k·n)/BW, b·(2·P + 4·L·H·d·n)/F)      as in infopt.measure.roofline
expected  the same at the share of BW that kernels of this size reach, or what their instructions or the second-level cache take,
          if that is longer; and the seconds of a launch for each of them
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_models import SHAPES, Shape, outline

from infopt.kernels.gpu import launches
from infopt.kernels.gpu.choices import THROUGH, Table, candidates, through
from infopt.kernels.gpu.ops import kernels
from infopt.kernels.gpu.weight import FLOAT8
from infopt.measure.peaks import measure_machine
from infopt.runtime.device_tuning import roles
from infopt.runtime.device_weights import DeviceModel
from infopt.runtime.graph_step import GraphStep

#: Of the read rate, that a product or attention alone is expected to reach.
REACHED = 0.92
BUFFER, MATRIX = 2 << 30, 8192
#: Machine instructions a weight that the likeliest ways take on Hopper, groups of 128, for 64 rows of x at most: counted in what
#: the compiler makes of them (tests/kernels/gpu/test_gpu_machine_code.py).
INSTRUCTIONS = {
    ("vector", "bfloat16"): 3.7, ("vector", "float8"): 3.7, ("slices", "bfloat16"): 1.9, ("slices", "float8"): 3.5,
    ("slices", "int4"): 2.5, ("slices", "int8"): 2.9, ("tiles", "bfloat16"): 2.8, ("tiles", "int4"): 4.0, ("tiles", "int8"): 4.5,
}  # fmt: skip
#: And each of a program's lanes before and behind that loop, typically.
BESIDE = {"vector": 280, "slices": 440, "tiles": 550}
#: Instructions that a multiprocessor's lanes can be given a cycle, what share of them kernels are expected to get, and cycles a
#: second under load.
LANES, ISSUED, CLOCK = 128, 0.75, 1.7e9
#: Multiprocessors that only a GPU has.
MANY = 8


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second read, and copied (read and written); FLOP/s; seconds of a launch inside a graph."""

    read: float
    copy: float
    bfloat16: float
    float8: float | None
    launch_s: float
    multiprocessors: int

    @property
    def about(self) -> str:
        eight = "–" if self.float8 is None else f"{self.float8 / 1e12:.0f}"
        return (
            f"Reads {self.read / 1e9:.0f} GB/s, copies {self.copy / 1e9:.0f} GB/s (read and written), multiplies "
            f"{self.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16 and {eight} in float8; a launch in a graph takes "
            f"{self.launch_s * 1e6:.2f} µs."
        )


H200 = Ceilings(4.3e12, 4.3e12, 790e12, None, 1.3e-6, 132)
"""As its copies and products were seen, and launches were told of."""


@dataclass(frozen=True)
class Prediction:
    """Tokens per second of all rows together. `bound`: memory, compute, instructions, cache; launches where over a third."""

    limit: float
    expected: float
    bound: str
    launches: int | None


def measured_ceilings(device: str) -> Ceilings:
    """Within seconds, on random data: products of zeros are faster."""
    machine = measure_machine(device, ("bfloat16",))
    read, wide = machine.read_bytes_per_s, machine.flops["bfloat16"]
    assert read is not None
    if not device.startswith("cuda"):
        return Ceilings(read, read, wide, None, 1e-5, 2)
    source = torch.randint(0, 1 << 30, (BUFFER // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(MATRIX, MATRIX, device=device).bfloat16() for _ in range(2))
    copy = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Ceilings(max(read, copy), copy, wide, _float8_rate(left, right, 2 * MATRIX**3), _launch_s(device), count)


def _float8_rate(left: torch.Tensor, right: torch.Tensor, flops: float) -> float | None:
    if torch.cuda.get_device_capability() < (8, 9):
        return None
    ones = torch.ones(MATRIX, 1, device=left.device)
    a, b = left.to(FLOAT8), right.to(FLOAT8).t()
    made: Callable[[], Any] = lambda: torch._scaled_mm(a, b, scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16)  # noqa: E731
    return flops / _seconds(made, "cuda")


def _launch_s(device: str, count: int = 1000) -> float:
    """Of a kernel that does next to nothing, one after the other in a graph."""
    small = torch.zeros(32, device=device)
    small.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            small.add_(1)
    return _seconds(graph.replay, device) / count


def _seconds(run: Callable[[], Any], device: str, repeats: int = 10) -> float:
    """Shortest of several."""
    best = float("inf")
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def predict(shape: Shape, kind: str | None, weights_bytes: float, rows: int, context: float, ceilings: Ceilings) -> Prediction:
    """A step of `rows` at `context` tokens, keys and values in bfloat16. `kind`: of the native engine's weights, whose launches
    count; None: of another engine, whose do not."""
    kv = rows * context * 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
    flops = rows * (2 * (shape.linear + shape.head) + 4 * shape.layers * shape.heads * shape.head_dim * context)
    parts = {"memory": (weights_bytes + kv) / ceilings.read, "compute": flops / ceilings.bfloat16}
    limit, count = max(parts.values()), launched(shape, kind, rows) if kind else None
    beside = (count or 0) * ceilings.launch_s
    taken = {name: seconds / REACHED for name, seconds in parts.items()}
    if kind and ceilings.multiprocessors > MANY:
        instructions, moved = issued(shape, kind, rows)
        taken["instructions"] = instructions / (ISSUED * ceilings.multiprocessors * LANES * CLOCK)
        taken["cache"] = (moved + kv) / THROUGH
    expected = max(taken.values()) + beside
    bound = "launches" if beside > expected / 3 else max(taken, key=lambda name: taken[name])
    return Prediction(rows / limit, rows / expected, bound, count)


def issued(shape: Shape, kind: str, rows: int) -> tuple[float, float]:
    """Machine instructions of all lanes in a step's products, and bytes that these move through the second-level cache."""
    count, moved = 0.0, 0.0
    model = outline(shape, kind, min(128, shape.hidden))
    for role, times in zip(roles(model), (shape.layers,) * 4 + (1,), strict=True):
        asked = role.asked(role.weights[0], rows, torch.bfloat16)
        choice = next(each for each in candidates(asked) if each.way != "library")
        if choice.way != "scaled":
            programs = len(asked.weight.data) // choice.block * -(-rows // choice.rows) * choice.splits
            each = -(-rows // 64) * INSTRUCTIONS[choice.way, asked.weight.kind]
            count += times * each * asked.weight.rows * asked.weight.inner
            count += times * programs * 32 * choice.warps * BESIDE[choice.way]
        moved += times * through(asked.weight, rows, choice)
    return count, moved


def launched(shape: Shape, kind: str, rows: int, tokens: int = 1) -> int:
    """How many kernels of ours a step launches."""
    with launches.recorded() as found:
        model = outline(shape, kind, min(128, shape.hidden))
        GraphStep(model, ops=kernels(Table(), H200.multiprocessors)).rehearse(rows, tokens)
    return len(found)


def prediction_table(ceilings: Ceilings = H200) -> str:
    """For all shapes and kinds, at 640 tokens of context with one row and 1,088 with more."""
    lines = [
        ceilings.about,
        "",
        "| shape | weights | rows | read, GB | launches | limit, tok/s | expected, tok/s | of the limit | bound |",
    ]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for name, shape in SHAPES.items():
        for kind in ("bfloat16", "int8", "int4") if name != "tiny" else ():
            read = outline(shape, kind).read_bytes
            for rows in (1, 8, 64):
                found = predict(shape, kind, read, rows, 640 if rows == 1 else 1088, ceilings)
                rates = f"{found.limit:.0f} | {found.expected:.0f} | {found.expected / found.limit:.0%}"
                lines.append(f"| {name} | {kind} | {rows} | {read / 1e9:.2f} | {found.launches} | {rates} | {found.bound} |")
    return "\n".join(lines)


def verified(model: DeviceModel) -> DeviceModel:
    """The same weights with activations in float32: what the kernels' results are held against."""
    outside = replace(model.outside, embedding=model.outside.embedding.float(), is_tied=False)
    return replace(model, dtype=torch.float32, outside=outside)
