"""Matrix products of few rows with weights of any kind: y = x · Wᵀ, and what stands around it in a decoder.

Two ways. `vector` reads each weight once and multiplies it with every row in ordinary arithmetic: RMSNorm may come before it,
bias, gated activation and residual behind it, in the same launch. `tiles` multiplies tiles on the tensor cores and may split
the inputs among programs, whose sums a second launch adds in order. Both work in float32 sums and give the same on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from infopt.kernels.gpu.norm import normed
from infopt.kernels.gpu.weight import Weight, dense


def twin(
    x: torch.Tensor, weight: Weight, *, gain: torch.Tensor | None = None, epsilon: float = 0.0, activation: int | None = None,
    residual: torch.Tensor | None = None, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """`x` [rows, inner] → [rows, weight.rows], or half of it with an activation, whose gate and up rows take turns; `dtype` None:
    in x's.

    `activation` 0: silu(gate) · up; 1: the tanh form of GELU instead. `gain` [inner]: x is divided by its root mean square and
    multiplied by it before; `residual` is added last.
    """
    inputs = x.float() if gain is None else normed(x, gain, epsilon)
    y = inputs @ dense(weight).T
    if weight.bias is not None:
        y = y + weight.bias.float()
    if activation is not None:
        y = gated(y, activation)
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype or x.dtype)


def gated(y: torch.Tensor, activation: int) -> torch.Tensor:
    """Of gate and up, which take turns in `y` [rows, 2 · outputs]: [rows, outputs]."""
    gate, up = y[:, 0::2], y[:, 1::2]
    return up * (torch.nn.functional.silu(gate) if activation == 0 else torch.nn.functional.gelu(gate, approximate="tanh"))


@triton.jit
def _field(words, J: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Field j of each word plus `_added(j)`, exactly, in float32: its bits become low ones of a mantissa. ASM: in one
    instruction, of which compilers make two. Interpreters have none."""
    if BITS == 8:
        if ASM:  # byte j, two zeros, the exponent of 2²³
            chosen = tl.full(words.shape, 0x7540 + J, tl.int32)
            found = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, 0x4B000000, $2;", "=r,r,r", [words, chosen], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            found = ((words >> (8 * J)) & 0xFF) | 0x4B000000
    else:
        if J // 2 == 1:
            words = words << 8
        elif J // 2 == 2:
            words = words >> 8
        elif J // 2 == 3:
            words = (words << 16) | ((words >> 16) & 0xFFFF)  # one turn by half
        if ASM:
            if J % 2 == 0:
                found = tl.inline_asm_elementwise(
                    "lop3.b32 $0, $1, 0xF000, 0x45000000, 0xEA;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
                )
            else:
                found = tl.inline_asm_elementwise(
                    "lop3.b32 $0, $1, 0xF0000, 0x43000000, 0xEA;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
                )
        else:
            found = (words & (0xF000 << (4 * (J % 2)))) | (0x45000000 if J % 2 == 0 else 0x43000000)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def _added(J: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr):
    """What a field has that its integer has not: where the mantissa ends, and the middle of a symmetric grid."""
    return ((1 << 23) if BITS == 8 else (2048 >> (4 * (J % 2)))) + (0 if ZEROS else 1 << (BITS - 1))


@triton.jit
def _load(at, mask, EVEN: tl.constexpr):
    return tl.load(at) if EVEN else tl.load(at, mask=mask, other=0.0)


@triton.jit
def _sigmoid(z):
    small = tl.exp(-tl.abs(z))  # e^−z overflows
    return tl.where(z >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _finish(y, rows, m, M, N, bias, residual, out, BN: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
            RESIDUAL: tl.constexpr):  # fmt: skip
    """Bias, activation and residual of sums `y` [ROWS, BN], and where they are stored. `rows` [BN], `m` [ROWS]."""
    if BIAS:
        y += tl.load(bias + rows, mask=rows < N, other=0).to(tl.float32)[None, :]
    if ACT >= 0:
        gate, up = tl.split(tl.reshape(y, [ROWS, BN // 2, 2]))
        if ACT == 0:
            y = gate * _sigmoid(gate) * up
        else:  # tanh(z) = 2 σ(2z) − 1
            y = gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
        n = tl.min(rows, 0) // 2 + tl.arange(0, BN // 2)
        count = N // 2
    else:
        n = rows
        count = N
    at = m[:, None].to(tl.int64) * count + n[None, :]
    mask = (m[:, None] < M) & (n[None, :] < count)
    if RESIDUAL:
        y += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def vector_integers(x, w, scales, zeros, gain, bias, residual, out, M, N, K, units, groups, epsilon,
                    ROWS: tl.constexpr, BN: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                    ZEROS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
                    RESIDUAL: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """ROWS rows of x with BN rows of W a program. Four bits: fields are left with what `_field` added to them, and the sum of
    that over x is taken off once a unit, which saves an addition for every weight; at 2¹¹ + q in float32 it costs no accuracy
    that activations of 16 bits have. EVEN: nothing needs a mask."""
    PER: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = 4 * UNITS
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m3 = m[:, None, None]
    sums = tl.zeros([ROWS, BN, UNITS], tl.float32)
    squares = tl.zeros([ROWS, 1, WORDS], tl.float32)
    for first in range(0, units, UNITS):
        i = tl.arange(0, WORDS)
        word = (first * 4 + i)[None, None, :]
        words = _load(w + rows[None, :, None].to(tl.int64) * (units * 4) + word, word < units * 4, EVEN)
        part = tl.zeros([ROWS, BN, WORDS], tl.float32)
        total = tl.zeros([ROWS, 1, WORDS], tl.float32)
        taken = tl.zeros([ROWS, 1, WORDS], tl.float32)
        for j in tl.static_range(PER):
            k = (first * (4 * PER) + (i // 4) * (4 * PER) + 4 * j + i % 4)[None, None, :]
            xj = _load(x + m3 * K + k, (m3 < M) & (k < K), EVEN).to(tl.float32)
            if NORM:
                squares += xj * xj
                xj *= _load(gain + k, k < K, EVEN).to(tl.float32)
            if BITS == 4:
                part += _field(words, j, BITS, ASM) * xj
                taken += _added(j, BITS, ZEROS) * xj
            else:
                part += (_field(words, j, BITS, ASM) - _added(j, BITS, ZEROS)) * xj
            if ZEROS:
                total += xj
        u = first + tl.arange(0, UNITS)[None, None, :]
        grid = rows[None, :, None] * groups + (u * (4 * PER)) // GROUP
        unit = tl.sum(tl.reshape(part - taken if BITS == 4 else part, [ROWS, BN, UNITS, 4]), 3)
        if ZEROS:
            zero = _load(zeros + grid, u < units, EVEN).to(tl.float32)
            unit -= zero * tl.sum(tl.reshape(total, [ROWS, 1, UNITS, 4]), 3)
        sums += unit * _load(scales + grid, u < units, EVEN).to(tl.float32)
    y = tl.sum(sums, 2)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 2) / K + epsilon)
    _finish(y, rows, m, M, N, bias, residual, out, BN, ROWS, BIAS, ACT, RESIDUAL)


@triton.jit
def vector_floats(x, w, scales, gain, bias, residual, out, M, N, K, padded, epsilon,
                  ROWS: tl.constexpr, BN: tl.constexpr, UNITS: tl.constexpr, VEC: tl.constexpr, SCALED: tl.constexpr,
                  NORM: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
                  EVEN: tl.constexpr):  # fmt: skip
    """The same for floating-point weights, VEC of which are 16 bytes."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m3 = m[:, None, None]
    sums = tl.zeros([ROWS, BN, UNITS * VEC], tl.float32)
    squares = tl.zeros([ROWS, 1, UNITS * VEC], tl.float32)
    for first in range(0, padded, UNITS * VEC):
        k = (first + tl.arange(0, UNITS * VEC))[None, None, :]
        value = _load(w + rows[None, :, None].to(tl.int64) * padded + k, k < padded, EVEN)
        xs = _load(x + m3 * K + k, (m3 < M) & (k < K), EVEN).to(tl.float32)
        if NORM:
            squares += xs * xs
            xs *= _load(gain + k, k < K, EVEN).to(tl.float32)
        sums += value.to(tl.float32) * xs
    y = tl.sum(sums, 2)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 2) / K + epsilon)
    if SCALED:
        y *= tl.load(scales + rows)[None, :]
    _finish(y, rows, m, M, N, bias, residual, out, BN, ROWS, BIAS, ACT, RESIDUAL)


@triton.jit
def _multiplied(total, value, xk, EXACT: tl.constexpr):
    """`total` + `value` · `xk` in xk's type. EXACT: float32 is not multiplied as tf32."""
    return tl.dot(value.to(xk.dtype), xk, total, input_precision="ieee" if EXACT else "tf32")


@triton.jit
def tiles(x, w, scales, zeros, bias, residual, out, sums, M, N, K, row, groups,
          BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
          SCALED: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, SPLITS: tl.constexpr,
          EXACT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """BM rows of x with BN rows of W a program, BK inputs at a time; W's rows are the rows of the tensor cores' tiles, since x
    has few. BITS 0: floating point. `row`: numbers, or words, of a row of W. Where BK inputs share a scale it is multiplied by
    their sum, and integers go into the tensor cores as they are."""
    PER: tl.constexpr = 32 // BITS if BITS else 1
    STEP: tl.constexpr = BK // PER
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    each = tl.cdiv(tl.cdiv(row, STEP), SPLITS) * STEP
    begin = tl.program_id(2) * each
    total = tl.zeros([BN, BM], tl.float32)
    for first in range(begin, tl.minimum(begin + each, row), STEP):
        i = tl.arange(0, STEP)
        at = w + rows[:, None].to(tl.int64) * row + first + i[None, :]
        inside = first + i[None, :] < row
        if BITS == 0:
            k = first + i
            value = tl.load(at, mask=inside, other=0.0)
            xk = tl.load(x + m[None, :].to(tl.int64) * K + k[:, None], mask=(m[None, :] < M) & (k[:, None] < K), other=0)
            total = _multiplied(total, value, xk, EXACT)
        else:
            words = tl.load(at, mask=inside, other=0)
            if GROUP % BK == 0:
                grid = rows * groups + (first * PER) // GROUP
                scale = tl.load(scales + grid).to(tl.float32)[:, None]
                zero = tl.load(zeros + grid).to(tl.float32)[:, None] if ZEROS else 0.0
                part = tl.zeros([BN, BM], tl.float32)
            else:
                u = first // 4 + tl.arange(0, STEP // 4)
                grid = rows[:, None] * groups + (u[None, :] * 4 * PER) // GROUP
                inside = u[None, :] * 4 < row
                scale = tl.load(scales + grid, mask=inside, other=0).to(tl.float32)
                scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [BN, STEP // 4, 4]), [BN, STEP])
                if ZEROS:
                    zero = tl.load(zeros + grid, mask=inside, other=0).to(tl.float32)
                    zero = tl.reshape(tl.broadcast_to(zero[:, :, None], [BN, STEP // 4, 4]), [BN, STEP])
                else:
                    zero = 0.0
                part = total
            for j in tl.static_range(PER):
                k = first * PER + (i // 4) * (4 * PER) + 4 * j + i % 4
                xk = tl.load(x + m[None, :].to(tl.int64) * K + k[:, None], mask=(m[None, :] < M) & (k[:, None] < K), other=0)
                value = _field(words, j, BITS, ASM) - _added(j, BITS, ZEROS)
                if ZEROS:
                    value -= zero
                part = _multiplied(part, value if GROUP % BK == 0 else value * scale, xk, EXACT)
            total = total + part * scale if GROUP % BK == 0 else part
    if SCALED:
        total *= tl.load(scales + rows)[:, None]
    y = tl.trans(total)
    if SPLITS == 1:
        _finish(y, rows, m, M, N, bias, residual, out, BN, BM, BIAS, ACT, RESIDUAL)
    else:
        to = sums + (tl.program_id(2) * M + m[:, None]).to(tl.int64) * N + rows[None, :]
        tl.store(to, y, mask=(m[:, None] < M) & (rows[None, :] < N))


@triton.jit
def join(sums, bias, residual, out, M, N, BN: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
         RESIDUAL: tl.constexpr):  # fmt: skip
    """The sums that `tiles` left of each split, [SPLITS, M, N], added in order; one row a program."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) + tl.arange(0, 1)
    total = tl.zeros([1, BN], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + (split * M + m[:, None]).to(tl.int64) * N + rows[None, :], mask=rows[None, :] < N, other=0)
    _finish(total, rows, m, M, N, bias, residual, out, BN, 1, BIAS, ACT, RESIDUAL)


@triton.jit
def spread(w, scales, zeros, out, K, row, groups, BN: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr,
           GROUP: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Integers as the numbers that they stand for, [rows, K]: BN rows and STEP words a program."""
    PER: tl.constexpr = 32 // BITS
    rows = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    i = (tl.program_id(1) * STEP + tl.arange(0, STEP))[None, :]
    words = tl.load(w + rows.to(tl.int64) * row + i, mask=i < row, other=0)
    grid = rows * groups + (i // 4 * 4 * PER) // GROUP
    scale = tl.load(scales + grid, mask=i < row, other=0).to(tl.float32)
    zero = tl.load(zeros + grid, mask=i < row, other=0).to(tl.float32) if ZEROS else 0.0
    for j in tl.static_range(PER):
        k = (i // 4) * (4 * PER) + 4 * j + i % 4
        value = (_field(words, j, BITS, ASM) - _added(j, BITS, ZEROS) - zero) * scale
        tl.store(out + rows.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=k < K)


def by_vector(
    x: torch.Tensor, weight: Weight, *, gain: torch.Tensor | None, epsilon: float, activation: int | None,
    residual: torch.Tensor | None, dtype: torch.dtype, block: int, rows: int, warps: int,
) -> torch.Tensor:  # fmt: skip
    """`block` rows of W and `rows` of x a program of `warps` warps."""
    count = x.shape[0]
    units = 32 * warps
    out = _room(x, weight, activation, dtype)
    around: dict[str, Any] = {
        "ROWS": rows, "BN": block, "UNITS": units, "NORM": gain is not None, "BIAS": weight.bias is not None,
        "ACT": -1 if activation is None else activation, "RESIDUAL": residual is not None, "num_warps": warps,
        "EVEN": weight.inner % (units * weight.unit) == 0 and count % rows == 0,
    }  # fmt: skip
    grid = (weight.data.shape[0] // block, -(-count // rows))
    if weight.bits is None:
        vector_floats[grid](
            x, weight.data, weight.scales, gain, weight.bias, residual, out, count, weight.rows, weight.inner,
            weight.padded_inner, epsilon, VEC=weight.unit, SCALED=weight.scales is not None, **around,
        )  # fmt: skip
    else:
        assert weight.scales is not None
        vector_integers[grid](
            x, weight.data, weight.scales, weight.zeros, gain, weight.bias, residual, out, count, weight.rows, weight.inner,
            weight.data.shape[1], weight.scales.shape[1], epsilon, BITS=weight.bits, GROUP=weight.group,
            ZEROS=weight.zeros is not None, ASM=_has_asm(x), **around,
        )  # fmt: skip
    return out


def by_tiles(
    x: torch.Tensor, weight: Weight, *, activation: int | None, residual: torch.Tensor | None, dtype: torch.dtype, block: int,
    rows: int, inputs: int, splits: int, warps: int, stages: int,
) -> torch.Tensor:  # fmt: skip
    """Tiles of `block` rows of W, `rows` of x and `inputs` inputs, these in `splits` parts."""
    count = x.shape[0]
    out = _room(x, weight, activation, dtype)
    sums = torch.empty(splits, count, weight.rows, device=x.device) if splits > 1 else None
    around: dict[str, Any] = {
        "BIAS": weight.bias is not None, "ACT": -1 if activation is None else activation, "RESIDUAL": residual is not None,
        "SPLITS": splits,
    }  # fmt: skip
    grid = (weight.data.shape[0] // block, -(-count // rows), splits)
    tiles[grid](
        x, weight.data, weight.scales, weight.zeros, weight.bias, residual, out, sums, count, weight.rows, weight.inner,
        weight.data[0].numel(), weight.scales.shape[1] if weight.bits and weight.scales is not None else 0,
        BM=rows, BN=block, BK=inputs, BITS=weight.bits or 0, GROUP=weight.group, ZEROS=weight.zeros is not None,
        SCALED=weight.bits is None and weight.scales is not None, EXACT=x.dtype == torch.float32, ASM=_has_asm(x),
        num_warps=warps, num_stages=stages, **around,
    )  # fmt: skip
    if sums is not None:
        wide = min(256, triton.next_power_of_2(weight.rows))
        join[(-(-weight.rows // wide), count)](
            sums, weight.bias, residual, out, count, weight.rows, BN=wide, num_warps=2, **around
        )
    return out


def _room(x: torch.Tensor, weight: Weight, activation: int | None, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.rows if activation is None else weight.rows // 2, dtype=dtype)


def widened(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """[padded rows, inner] in floating point: the weight itself where it is that."""
    if weight.bits is None:
        data = weight.data[:, : weight.inner].to(dtype)
        return data if weight.scales is None else data * weight.scales[:, None].to(dtype)
    assert weight.scales is not None
    rows, words = len(weight.data), weight.data[0].numel()
    out = torch.empty(rows, weight.inner, dtype=dtype, device=weight.data.device)
    spread[(rows // 16, -(-words // 64))](
        weight.data, weight.scales, weight.zeros, out, weight.inner, words, weight.scales.shape[1], BN=16, STEP=64,
        BITS=weight.bits, GROUP=weight.group, ZEROS=weight.zeros is not None, ASM=_has_asm(out),
    )  # fmt: skip
    return out


def _has_asm(x: torch.Tensor) -> bool:
    """On the CPU kernels are interpreted."""
    return x.device.type != "cpu"
