"""The kernels of `products`, in Triton. Names of arguments as there; sums are float32."""

from __future__ import annotations

import triton
import triton.language as tl

from infopt.kernels.gpu.overlap import wait, wait_with_weights


@triton.jit
def _numbers(e, F: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr, ASM: tl.constexpr):
    """Field F of each element of 16 bits less the middle of its range: exact in TYPE. ASM: two elements at a time, of which
    fields become the low bits of a mantissa, and what that adds goes with the middle. Interpreters have no assembly."""
    if ASM and BITS == 4 and TYPE.is_bf16():  # 128 + field, − 136
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; shr.b32 t, $1, $2;"
            " lop3.b32 t, t, 0xF000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, t, one, less;}",
            "=r,r,r,r", [e, tl.full(e.shape, 4 * F, tl.int32)], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    elif ASM and BITS == 4 and TYPE.is_fp16():  # 1024 + field, − 1032
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, less; mov.b32 less, 0xE408E408; shr.b32 t, $1, $2;"
            " lop3.b32 t, t, 0xF000F, 0x64006400, 0xEA; add.rn.f16x2 $0, t, less;}",
            "=r,r,r,r", [e, tl.full(e.shape, 4 * F, tl.int32)], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    elif ASM and BITS == 8 and TYPE.is_bf16():  # 128 + seven bits, and 128 · the eighth − 256
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, u, one; mov.b32 one, 0x3F803F80; shr.b32 t, $1, $2; lop3.b32 u, t, 0x7F007F, 0x43004300, 0xEA;"
            " lop3.b32 t, t, 0x800080, 0xC300C300, 0xAE; fma.rn.bf16x2 $0, u, one, t;}",
            "=r,r,r,r", [e, tl.full(e.shape, 8 * F, tl.int32)], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    elif ASM and BITS == 8 and TYPE.is_fp16():  # 1024 + field, − 1152
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, less; mov.b32 less, 0xE480E480; prmt.b32 t, $1, 0x64646464, $2; add.rn.f16x2 $0, t, less;}",
            "=r,r,r,r", [e, tl.full(e.shape, 0x4240 + 0x101 * F, tl.int32)], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (((e.to(tl.int32) >> (BITS * F)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))).to(TYPE)


@triton.jit
def _dot(value, xk, part, ASM: tl.constexpr):
    """`part` + value · xk. ASM: float32 is multiplied as the three numbers of bfloat16 that it is the sum of."""
    if ASM and xk.dtype.is_fp32():
        high = xk.to(tl.bfloat16)
        rest = xk - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(value, high, tl.dot(value, middle, tl.dot(value, low, part)))
    else:
        return tl.dot(value, xk, part)


@triton.jit
def _of(grid, SUB: tl.constexpr, SUBS: tl.constexpr):
    """Of scales or zeros [..., SUBS] those of group SUB of a block, [..., 1]."""
    if SUBS == 1:
        return grid
    else:
        first, second = tl.split(grid)
        return tl.expand_dims(first if SUB == 0 else second, -1)


@triton.jit
def _load(at, mask, EVEN: tl.constexpr):
    return tl.load(at) if EVEN else tl.load(at, mask=mask, other=0.0)


@triton.jit
def _sigmoid(z):
    small = tl.exp(-tl.abs(z))  # e^−z overflows
    return tl.where(z >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _finish(y, rows, m, M, N, K, squares, parts, epsilon, bias, residual, gain, out, fed, left,
            BN: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr):  # fmt: skip
    """What comes behind sums `y` [BM, BN], and where it is stored; arguments that are None are left out. `rows` [BN] of W, all in
    order, `m` [BM] of x."""
    if squares is not None:  # [parts, M], PARTS at least as many
        p = tl.arange(0, PARTS)[:, None]
        found = tl.load(squares + p * M + m[None, :], mask=(p < parts) & (m[None, :] < M), other=0)
        y *= tl.rsqrt(tl.sum(found, 0) / K + epsilon)[:, None]
    if bias is not None:
        y += tl.load(bias + rows, mask=rows < N, other=0).to(tl.float32)[None, :]
    if ACT >= 0:
        gate, up = tl.split(tl.reshape(y, [BM, BN // 2, 2]))
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
    if residual is not None:
        y += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
    y = y.to(out.dtype.element_ty)
    tl.store(out + at, y, mask=mask)
    if gain is not None:
        wide = tl.where(mask, y.to(tl.float32), 0.0)
        scaled = wide * tl.load(gain + n, mask=n < count, other=0).to(tl.float32)[None, :]
        tl.store(fed + at, scaled.to(fed.dtype.element_ty), mask=mask)
        tl.store(left + tl.program_id(0) * M + m, tl.sum(wide * wide, 1), mask=m < M)


@triton.jit
def vector(x, w, scales, squares, bias, residual, gain, out, fed, left, M, N, K, padded, parts, epsilon,
           BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr,
           EVEN: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """BM rows of x with BN rows of W a program, BK floating-point inputs at a time. EVEN: nothing needs a mask."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    wait_with_weights(w, rows, 0, padded, BN, OVERLAP)
    m3 = m[:, None, None]
    sums = tl.zeros([BM, BN, BK], tl.float32)
    for first in range(0, padded, BK):
        k = (first + tl.arange(0, BK))[None, None, :]
        value = _load(w + rows[None, :, None].to(tl.int64) * padded + k, k < padded, EVEN)
        sums += value.to(tl.float32) * _load(x + m3 * K + k, (m3 < M) & (k < K), EVEN).to(tl.float32)
    y = tl.sum(sums, 2)
    if scales is not None:
        y *= tl.load(scales + rows)[None, :]
    _finish(y, rows, m, M, N, K, squares, parts, epsilon, bias, residual, gain, out, fed, left, BN, BM, PARTS, ACT)


@triton.jit
def _grids(scales, zeros, grid, i, row, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Of the blocks at elements `i`, scales and by how much zeros are off the middle; without zeros, scales twice."""
    at, inside = grid + i * (16 // BITS) // GROUP, grid * 0 + i < row
    scale = tl.load(scales + at, mask=inside, other=0).to(tl.float32)
    zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32) - (1 << (BITS - 1)) if zeros is not None else scale
    return scale, zero


@triton.jit
def _multiplied(total, e, xs, k, real, K, scale, zero, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
                EVEN: tl.constexpr, ASM: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """`total` [.., BN, BM] plus elements `e` [.., BN, STEP] times the inputs that they stand for: `xs` [.., STEP, BM] points to
    the first fields', which are at `k`; `real`: of these rows there are some. EXACT: how float32 is multiplied."""
    FIELDS: tl.constexpr = 16 // BITS if BITS else 1
    SUBS: tl.constexpr = 16 * FIELDS // GROUP if BITS and GROUP < 16 * FIELDS else 1
    for sub in tl.static_range(SUBS):
        part = tl.zeros_like(total) if BITS else total
        taken = tl.zeros_like(total)
        for f in tl.static_range(sub * (FIELDS // SUBS), (sub + 1) * (FIELDS // SUBS)):
            xk = tl.load(xs + 16 * f, mask=real if EVEN else real & (k + 16 * f < K), other=0, cache_modifier=".ca")
            if BITS:
                value = _numbers(e, f, BITS, tl.bfloat16 if ASM and xk.dtype.is_fp32() else xk.dtype, ASM)
                part = _dot(value, xk, part, ASM)
                if ZEROS:
                    taken = _dot(tl.full(e.shape, 1, value.dtype), xk, taken, ASM)
            else:
                part = tl.dot(e.to(xk.dtype), xk, part, input_precision=EXACT)
        if ZEROS:
            part -= _of(zero, sub, SUBS) * taken
        total = total + part * _of(scale, sub, SUBS) if BITS else part
    return total


@triton.jit
def slices(x, w, scales, zeros, squares, bias, residual, gain, out, fed, left, M, N, K, row, groups, parts, epsilon,
           BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, WAYS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
           PARTS: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
           OVERLAP: tl.constexpr):  # fmt: skip
    """For few rows, and BN of W a program: as `tiles`, but WAYS steps of inputs at a time, each in a dot product of its own, by
    which warps divide them: all warps read weights that no other needs, and rows may be few without leaving warps idle."""
    FIELDS: tl.constexpr = 16 // BITS if BITS else 1
    BLOCK: tl.constexpr = 16 * FIELDS
    SUBS: tl.constexpr = BLOCK // GROUP if BITS and GROUP < BLOCK else 1
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    wait_with_weights(w, rows, 0, row, BN, OVERLAP)
    way = tl.arange(0, WAYS)[:, None] * STEP
    i = way + tl.arange(0, STEP)[None, :]
    at = rows[None, :, None].to(tl.int64) * row + i[:, None, :]
    k = (i // 16 * BLOCK + i % 16)[:, :, None]
    m3 = m[None, None, :]
    xs = x + m3.to(tl.int64) * K + k
    grid = rows[None, :, None].to(tl.int64) * groups + tl.arange(0, SUBS)[None, None, :]
    way = way[:, :, None]
    total = tl.zeros([WAYS, BN, BM], tl.float32)
    scale, zero = _grids(scales, zeros, grid, way, row, BITS, GROUP) if BITS else (total, total)
    for first in range(0, row, WAYS * STEP):
        e = _load(w + at + first, first + i[:, None, :] < row, EVEN)
        if BITS:
            next_scale, next_zero = _grids(scales, zeros, grid, first + WAYS * STEP + way, row, BITS, GROUP)
        total = _multiplied(total, e, xs + first * FIELDS, k + first * FIELDS, m3 < M, K, scale, zero, BITS, GROUP,
                            zeros is not None, EVEN, ASM, "tf32x3")  # fmt: skip
        if BITS:
            scale, zero = next_scale, next_zero
    y = tl.trans(tl.sum(total, 0))
    if not BITS and scales is not None:
        y *= tl.load(scales + rows)[None, :]
    _finish(y, rows, m, M, N, K, squares, parts, epsilon, bias, residual, gain, out, fed, left, BN, BM, PARTS, ACT)


@triton.jit
def tiles(x, w, scales, zeros, squares, bias, residual, gain, out, fed, left, sums, M, N, K, row, groups, parts, epsilon,
          BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
          PARTS: tl.constexpr, ACT: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
          OVERLAP: tl.constexpr):  # fmt: skip
    """BM rows of x with BN rows of W a program, STEP of W's elements at a time; W's rows are the rows of the tensor cores' tiles,
    since x has few. `row`: elements of a row of W. BITS 0: floating point, an input each. Integers go into the tensor cores as
    they are, and the sum of a group is multiplied by its scale, which was loaded a step before."""
    FIELDS: tl.constexpr = 16 // BITS if BITS else 1
    BLOCK: tl.constexpr = 16 * FIELDS
    SUBS: tl.constexpr = BLOCK // GROUP if BITS and GROUP < BLOCK else 1
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    each = tl.cdiv(tl.cdiv(row, STEP), SPLITS) * STEP
    begin = tl.program_id(2) * each
    wait_with_weights(w, rows, begin, row, BN, OVERLAP)
    i = tl.arange(0, STEP)
    at = rows[:, None].to(tl.int64) * row + i[None, :]
    k = (i // 16 * BLOCK + i % 16)[:, None]
    m2 = m[None, :]
    xs = x + m2.to(tl.int64) * K + k
    grid = rows[:, None].to(tl.int64) * groups + tl.arange(0, SUBS)[None, :]
    total = tl.zeros([BN, BM], tl.float32)
    scale, zero = _grids(scales, zeros, grid, begin, row, BITS, GROUP) if BITS else (total, total)
    for first in range(begin, tl.minimum(begin + each, row), STEP):
        e = _load(w + at + first, first + i[None, :] < row, EVEN)
        if BITS:
            next_scale, next_zero = _grids(scales, zeros, grid, first + STEP, row, BITS, GROUP)
        total = _multiplied(total, e, xs + first * FIELDS, k + first * FIELDS, m2 < M, K, scale, zero, BITS, GROUP,
                            zeros is not None, EVEN, ASM, "ieee")  # fmt: skip
        if BITS:
            scale, zero = next_scale, next_zero
    y = tl.trans(total)
    if not BITS and scales is not None:
        y *= tl.load(scales + rows)[None, :]
    if SPLITS == 1:
        _finish(y, rows, m, M, N, K, squares, parts, epsilon, bias, residual, gain, out, fed, left, BN, BM, PARTS, ACT)
    else:
        to = sums + (tl.program_id(2) * M + m[:, None]).to(tl.int64) * N + rows[None, :]
        tl.store(to, y, mask=(m[:, None] < M) & (rows[None, :] < N))


@triton.jit
def join(sums, squares, bias, residual, gain, out, fed, left, M, N, K, parts, epsilon,
         BN: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The sums of each split, [SPLITS, M, N], added in order; one row a program."""
    wait(OVERLAP)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) + tl.arange(0, 1)
    total = tl.zeros([1, BN], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + (split * M + m[:, None]).to(tl.int64) * N + rows[None, :], mask=rows[None, :] < N, other=0)
    _finish(total, rows, m, M, N, K, squares, parts, epsilon, bias, residual, gain, out, fed, left, BN, 1, PARTS, ACT)


@triton.jit
def spread(w, scales, zeros, out, K, row, groups, BN: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr,
           GROUP: tl.constexpr):  # fmt: skip
    """Integers as the numbers that they stand for, [rows, K]: BN rows and STEP elements a program."""
    FIELDS: tl.constexpr = 16 // BITS
    rows = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    i = (tl.program_id(1) * STEP + tl.arange(0, STEP))[None, :]
    e = tl.load(w + rows.to(tl.int64) * row + i, mask=i < row, other=0)
    for f in tl.static_range(FIELDS):
        k = i // 16 * (16 * FIELDS) + 16 * f + i % 16
        at = rows.to(tl.int64) * groups + k // GROUP
        value = ((e.to(tl.int32) >> (BITS * f)) & ((1 << BITS) - 1)).to(tl.float32)
        value -= tl.load(zeros + at, mask=k < K, other=0).to(tl.float32) if zeros is not None else 1 << (BITS - 1)
        value *= tl.load(scales + at, mask=k < K, other=0).to(tl.float32)
        tl.store(out + rows.to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=k < K)
