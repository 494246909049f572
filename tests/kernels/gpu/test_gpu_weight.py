"""What packed integers stand for, and that nothing is lost on the way."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ptx import halves, ran

from infopt.kernels.gpu import product_kernels
from infopt.kernels.gpu.weight import dense, float8, integers, plain
from infopt.kernels.packed import rounded


@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from([4, 8]), st.booleans(), st.integers(0, 2**31))
def test_integers_come_back_as_they_were(rows: int, inner: int, bits: int, has_zeros: bool, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    q = torch.randint(low, high + 1, (rows, inner), generator=source, dtype=torch.int8)
    groups = -(-inner // 32)
    scales = torch.rand(rows, groups, generator=source) + 0.5
    zeros = torch.randint(low, high + 1, (rows, groups), generator=source, dtype=torch.int8) if has_zeros else None
    spread = [part.float().repeat_interleave(32, 1)[:, :inner] for part in (scales, zeros) if part is not None]
    wanted = (q.float() - (spread[1] if has_zeros else 0)) * spread[0]
    assert torch.equal(dense(integers(q, scales, zeros, bits, 32)), wanted)


def test_an_element_has_inputs_sixteen_apart() -> None:
    q = torch.arange(128)[None].remainder(16).add(torch.arange(128) // 16).remainder(16).to(torch.int8) - 8
    elements = integers(q, torch.ones(1, 1), None, 4, 128).data[0]
    assert elements.shape == (32,)
    for place, element in enumerate(elements.tolist()):
        inputs = [place // 16 * 64 + 16 * field + place % 16 for field in range(4)]
        assert [element >> 4 * field & 15 for field in range(4)] == [int(q[0, each]) + 8 for each in inputs]


@pytest.mark.parametrize(("bits", "group", "inputs", "elements"), [
    (4, 128, 128, 32), (4, 64, 128, 16), (4, 32, 128, 16), (4, 128, 256, 32), (4, 192, 128, 16), (4, None, 128, 32),
    (8, 128, 128, 64), (8, 32, 128, 16), (8, None, 64, 32),
])  # fmt: skip
def test_a_step_is_whole_blocks_of_one_scale(bits: int, group: int | None, inputs: int, elements: int) -> None:
    groups = 1 if group is None else 768 // group
    made = integers(torch.zeros(2, 768, dtype=torch.int8), torch.ones(2, groups), None, bits, group)
    assert made.step(inputs) == elements


def test_one_scale_a_row_is_a_group_as_long_as_the_row() -> None:
    q, scales = rounded(torch.randn(3, 100), 8, 100)
    made = integers(q, scales, None, 8, None)
    assert torch.equal(dense(made), q.float() * scales.float())


@pytest.mark.parametrize(("bits", "group", "groups"), [(4, 16, 4), (8, 8, 8), (4, 32, 3)])
def test_groups_that_go_with_no_blocks_are_refused(bits: int, group: int, groups: int) -> None:
    with pytest.raises(ValueError, match="groups of"):
        integers(torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, groups), None, bits, group)


def test_floating_point_stays_what_it_is() -> None:
    weight = torch.randn(5, 13)
    assert torch.equal(dense(plain(weight)), weight)
    assert plain(weight.bfloat16()).kind == "bfloat16"


def test_float8_is_within_half_a_step_of_each_number() -> None:
    weight = torch.randn(7, 90) * torch.logspace(-3, 3, 7)[:, None]
    made = float8(weight)
    largest = weight.abs().amax(1, keepdim=True)
    # Three bits of mantissa: half a step is 1/16 of a number, or of the smallest that is not subnormal.
    assert bool(((dense(made) - weight).abs() <= weight.abs() / 16 + largest / 448 * 2**-10).all())
    assert made.kind == "float8"
    assert torch.allclose(dense(made).abs().amax(1, keepdim=True), largest)


@given(st.integers(0, 2**32 - 1))
def test_what_instructions_make_of_two_elements_is_their_fields(pair: int) -> None:
    """The kernels' assembly by what PTX says of it."""
    source = inspect.getsource(product_kernels._numbers.fn)
    codes = [re.sub(r'"\s+"', "", found) for found in re.findall(r'"(\{.*?\})"', source, re.S)]
    operands = re.findall(r"tl\.full\(e\.shape, (.*?), tl\.int32\)", source)
    cases = [(4, torch.bfloat16), (4, torch.float16), (8, torch.bfloat16), (8, torch.float16)]
    for code, operand, (bits, dtype) in zip(codes, operands, cases, strict=True):
        for field in range(16 // bits):
            found = ran(code, np.array([pair], np.uint32), np.array([eval(operand, {"F": field})], np.uint32))
            wanted = [(pair >> 16 * element + bits * field & ((1 << bits) - 1)) - (1 << (bits - 1)) for element in range(2)]
            assert halves(found, dtype).tolist() == [wanted]
