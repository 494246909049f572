"""What a step launches is known without a GPU, and is what it was meant to be."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from gpu_models import SHAPES, outline
from gpu_predict import H200, launched, predict, prediction_table

from infopt.kernels.gpu import product_kernels
from infopt.kernels.gpu.choices import Table
from infopt.kernels.gpu.launches import recorded
from infopt.kernels.gpu.ops import kernels
from infopt.runtime.graph_step import GraphStep


def test_one_row_takes_six_launches_a_layer() -> None:
    before = product_kernels.slices
    with recorded() as found:
        GraphStep(outline(SHAPES["8B"], "int4"), ops=kernels(Table(), 132)).rehearse(1, 1)
    counts = Counter(launch.name for launch in found)
    assert counts == {
        "rms_norm": 1, "slices": 4 * 32, "attend": 32, "gather": 32, "vector": 1, "largest": 1, "largest_of_blocks": 1,
    }  # fmt: skip
    assert product_kernels.slices is before


def test_a_launch_knows_what_is_compiled_in() -> None:
    with recorded() as found:
        GraphStep(outline(SHAPES["8B"], "int4"), ops=kernels(Table(), 132)).rehearse(1, 1)
    first, fourth = found[1], found[4]
    assert dict(first.signature) | {"w": "*i16", "K": "i32", "M": "constexpr"} == dict(first.signature)
    known = {"BITS": 4, "zeros": None, "squares": None, "gain": None, "M": 1, "EVEN": True}
    assert dict(first.constants) | known == dict(first.constants)
    assert first.grid == (6144 // 16, 1)
    assert dict(fourth.signature) | {"gain": "*bf16", "left": "*fp32", "residual": "*bf16"} == dict(fourth.signature)


@pytest.mark.parametrize(("shape", "kind", "rows", "goal"), [
    ("8B", "bfloat16", 1, 240), ("8B", "int4", 1, 600), ("1B", "bfloat16", 1, 1200), ("0.6B", "bfloat16", 1, 1650),
    ("8B", "bfloat16", 64, 9300), ("8B", "int4", 64, 13500),
])  # fmt: skip
def test_the_roofline_leaves_room_for_the_goals(shape: str, kind: str, rows: int, goal: float) -> None:
    read = outline(SHAPES[shape], kind).read_bytes
    found = predict(SHAPES[shape], kind, read, rows, 640 if rows == 1 else 1088, H200)
    assert goal < found.expected < found.limit


def test_shapes_have_the_weights_of_the_models() -> None:
    for name, linear, head in (("8B", 6.979e9, 0.525e9), ("1B", 0.973e9, 0.263e9), ("0.6B", 0.440e9, 0.156e9)):
        assert SHAPES[name].linear == pytest.approx(linear, rel=1e-3)
        assert SHAPES[name].head == pytest.approx(head, rel=3e-3)
        assert outline(SHAPES[name], "bfloat16").read_bytes == pytest.approx(2 * (linear + head), rel=1e-3)


def test_the_table_of_predictions_has_every_shape_and_kind() -> None:
    rows = [line for line in prediction_table().splitlines() if line.startswith(("| 8B", "| 1B", "| 0.6B"))]
    assert len(rows) == 3 * 3 * 3
    assert launched(SHAPES["8B"], "int4", 1) == 196
