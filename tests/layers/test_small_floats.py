"""E4M3 and E2M1 rounding against lists of all their numbers, and the scales against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.layers import small_floats

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
FORMATS = pytest.mark.parametrize(
    ("points", "rounding"), [(E2M1, small_floats.round_e2m1), (E4M3, small_floats.round_e4m3)], ids=["e2m1", "e4m3"]
)


def nearest(x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Brute force in float64; of two that are as near, the one at an even place, which has an even mantissa."""
    distance = (x.double().abs()[:, None] - points).abs()
    tied = (distance == distance.amin(1, keepdim=True)).int()
    odd = torch.arange(len(points)) % 2
    return points[(2 * tied - tied * odd).argmax(1)] * x.sign()


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_and_every_middle_rounds_as_ieee_says(points: torch.Tensor, rounding: object, dtype: torch.dtype) -> None:
    x = torch.cat([points, (points[1:] + points[:-1]) / 2, points[-1:] * 1.5])
    x = torch.cat([x, -x]).to(dtype)
    found = rounding(x)  # type: ignore[operator]
    assert found.dtype == dtype
    assert torch.equal(found.double(), nearest(x, points))


@FORMATS
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_anything_rounds_to_the_nearest(points: torch.Tensor, rounding: object, seed: int, size: float) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * size
    assert torch.equal(rounding(x).double(), nearest(x, points))  # type: ignore[operator]


def test_scales_of_two_by_hand() -> None:
    # 6 and 6.99 round to 6 with scale 1; from 7 on the next power of two is nearer.
    largest = torch.tensor([6.0, 6.99, 7.0, 4.0, 3.0, 3.5, 0.02, 1e-30, 1e30])
    expected = torch.tensor([1, 1, 2, 1, 0.5, 1, 2.0**-8, 2.0**-102, 2.0**97])
    assert torch.equal(small_floats.power_of_two(largest), expected)


@settings(max_examples=100, deadline=None)
@given(st.floats(2.0**-20, 2.0**20, width=32))
def test_a_scale_of_two_loses_at_most_an_eighth_off_the_top(largest: float) -> None:
    scale = float(small_floats.power_of_two(torch.tensor(largest)))
    assert scale == 2.0 ** round(torch.tensor(scale).log2().item())
    assert 3.5 <= largest / scale < 7


def test_nvidias_scales_by_hand() -> None:
    weight = torch.tensor([[12.0, -24.0], [3.0, 0.0]])
    overall = small_floats.global_scale(weight)
    assert overall.item() == 448 * 6 / 24
    scale = small_floats.scale_of_16(torch.tensor([24.0, 3.0, 0.0]), overall)
    assert scale.tolist() == [448.0, 56.0, 0.125]
    assert (scale / overall).tolist()[:2] == [4.0, 0.5]


def test_a_tensor_of_zeros_has_a_scale() -> None:
    overall = small_floats.global_scale(torch.zeros(2, 16))
    assert overall.item() == 1
    assert small_floats.scale_of_16(torch.zeros(2), overall).isfinite().all()
    assert small_floats.power_of_two(torch.zeros(2)).gt(0).all()
