"""What the shuffled words stand for, and that nothing is lost on the way."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infopt.kernels.gpu import products
from infopt.kernels.gpu.weight import FIELDS, dense, float8, integers, plain
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


def test_a_word_has_inputs_four_apart() -> None:
    q = torch.arange(32)[None].remainder(16).to(torch.int8) - 8
    words = integers(q, torch.ones(1, 1), None, 4, 32).data[0, 0]
    for field, begin in enumerate(FIELDS[4]):
        assert [int(word) >> begin & 15 for word in words] == [(4 * field + t) % 16 for t in range(4)]


def test_one_scale_a_row_is_a_group_as_long_as_the_row() -> None:
    q, scales = rounded(torch.randn(3, 100), 8, 100)
    made = integers(q, scales, None, 8, None)
    assert torch.equal(dense(made), q.float() * scales.float())


@pytest.mark.parametrize(("bits", "group", "groups"), [(4, 16, 4), (8, 8, 8), (4, 32, 3)])
def test_groups_that_no_load_fits_in_are_refused(bits: int, group: int, groups: int) -> None:
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


def lop3(a: int, b: int, c: int, table: int) -> int:
    """PTX's: bit by bit what `table` says of three bits."""
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def prmt(a: int, b: int, selector: int) -> int:
    """PTX's: four bytes, each chosen from the eight of `a` and `b`."""
    both = a | b << 32
    return sum((both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))


def float32_of(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32))


@given(st.integers(0, 2**32 - 1))
def test_what_instructions_make_of_a_word_is_its_fields(word: int) -> None:
    """The kernels' assembly, which interpreters do not run, by what PTX says of it."""
    source = inspect.getsource(products)
    masks = re.findall(r"lop3\.b32 \$0, \$1, (0x\w+), (0x\w+), (0x\w+);", source)
    assert len(masks) == 2
    turned = {0: word, 1: word << 8, 2: word >> 8, 3: word << 16 | word >> 16}
    for field, begin in enumerate(FIELDS[4]):
        mask, exponent, table = (int(number, 16) for number in masks[field % 2])
        found = float32_of(lop3(turned[field // 2] & 0xFFFFFFFF, mask, exponent, table))
        assert found == (word >> begin & 15) + (2048 >> (4 * (field % 2)))
    assert 'prmt.b32 $0, $1, 0x4B000000, $2;", "=r,r,r", [words, chosen]' in source
    assert "tl.full(words.shape, 0x7540 + J, tl.int32)" in source
    for field, begin in enumerate(FIELDS[8]):
        assert float32_of(prmt(word, 0x4B000000, 0x7540 + field)) == (word >> begin & 255) + 2**23
