"""ggml's 5- and 6-bit super-blocks, which the gguf package reads but does not write.

Blocks of 256 weights. After llama.cpp's ggml/src/ggml-quants.c: `quantize_row_q5_K_ref` with `make_qkx2_quants`,
`quantize_row_q6_K_ref` with `make_qx_quants`; the layouts are those of `block_q5_K` and `block_q6_K` in ggml-common.h.
Sums run in another order than in C, so that a weight that lies between two points may go to the other one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
#: Super-blocks worked on at a time, so that the temporaries of a large matrix stay small.
_CHUNK = 4096
#: Below this magnitude a group counts as all zeros (GROUP_MAX_EPS).
_ZERO = 1e-15

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def q5_k(weight: Floats) -> Bytes:
    """[…, in] → […, in/256·176] bytes; `in` divisible by 256."""
    return _in_chunks(weight, _q5_k_blocks, 176)


def q6_k(weight: Floats) -> Bytes:
    """[…, in] → […, in/256·210] bytes; `in` divisible by 256."""
    return _in_chunks(weight, _q6_k_blocks, 210)


def _in_chunks(weight: Floats, encode: Callable[[Floats], Bytes], size: int) -> Bytes:
    blocks = np.ascontiguousarray(weight, dtype=np.float32).reshape(-1, BLOCK)
    parts = [encode(blocks[start : start + _CHUNK]) for start in range(0, len(blocks), _CHUNK)]
    return np.concatenate(parts).reshape(*weight.shape[:-1], weight.shape[-1] // BLOCK * size)


def _q6_k_blocks(blocks: Floats) -> Bytes:
    """16 groups of 16 with an 8-bit scale each: weight ≈ d · scale · (q − 32)."""
    groups = blocks.reshape(-1, 16, 16)
    scales = _symmetric_scales(groups)  # [blocks, 16]
    largest = np.take_along_axis(scales, np.abs(scales).argmax(-1, keepdims=True), -1)
    inverse = np.divide(-128, largest, out=np.zeros_like(largest), where=np.abs(largest) > _ZERO)
    d = np.divide(1, inverse, out=np.zeros_like(inverse), where=inverse != 0).astype(np.float16)
    stored = np.minimum(np.rint(inverse * scales), 127).astype(np.int8)
    step = (d.astype(np.float32) * stored)[..., None]
    q = np.divide(groups, step, out=np.zeros_like(groups), where=step != 0)
    levels = (np.rint(q).clip(-32, 31) + 32).astype(np.uint8)
    # Two halves of 128, each four rows of 32: low nibbles of rows 0|2 and 1|3, then the high pairs of bits of all four.
    rows = levels.reshape(-1, 2, 4, 32)
    low = (rows[:, :, :2] & 15) | ((rows[:, :, 2:] & 15) << 4)
    high = np.bitwise_or.reduce((rows >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    count = len(blocks)
    return np.concatenate([low.reshape(count, 128), high.reshape(count, 64), stored.view(np.uint8), d.view(np.uint8)], axis=1)


def _symmetric_scales(groups: Floats) -> Floats:
    """[…, 16] → […]: of 19 scales around peak ÷ 32 the one with the least error, weighted by weight² (`make_qx_quants`)."""
    peak = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    live = np.abs(peak) >= _ZERO
    squares = groups * groups
    scale = best = np.zeros(groups.shape[:-1], np.float32)
    for shift in (0, *range(-9, 0), *range(1, 10)):
        inverse = np.divide(np.float32(-(32 + 0.1 * shift)), peak, out=np.zeros_like(peak), where=live)
        q = np.rint(inverse * groups).clip(-32, 31)
        cross, norm = (squares * groups * q).sum(-1), (squares * q * q).sum(-1)
        better = (norm > 0) & (cross * cross > best * norm)
        fitted = np.divide(cross, norm, out=np.zeros_like(cross), where=norm > 0)
        scale, best = np.where(better, fitted, scale), np.where(better, fitted * cross, best)
    return scale


def _q5_k_blocks(blocks: Floats) -> Bytes:
    """8 groups of 32 with a 6-bit scale and a 6-bit minimum each: weight ≈ d · scale · q − dmin · minimum."""
    groups = blocks.reshape(-1, 8, 32)
    scales, minima = _scales_and_minima(groups)  # [blocks, 8]
    d, stored_scales = _six_bits(scales)
    dmin, stored_minima = _six_bits(minima)
    step = (d.astype(np.float32) * stored_scales)[..., None]
    offset = (dmin.astype(np.float32) * stored_minima)[..., None]
    q = np.divide(groups + offset, step, out=np.zeros_like(groups), where=step != 0)
    levels = np.rint(q).clip(0, 31).astype(np.uint8)
    low, high = (levels & 15).reshape(-1, 4, 2, 32), levels >> 4
    nibbles = low[:, :, 0] | (low[:, :, 1] << 4)
    fifth = np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    count = len(blocks)
    packed = _pack_scales(stored_scales, stored_minima)
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, fifth, nibbles.reshape(count, 128)], axis=1)


def _six_bits(values: Floats) -> tuple[NDArray[np.float16], Bytes]:
    """[blocks, 8] of values ≥ 0 as one float16 per block and 6 bits each."""
    largest = values.max(-1, keepdims=True)
    inverse = np.divide(63, largest, out=np.zeros_like(largest), where=largest > 0)
    return (largest / 63).astype(np.float16), np.minimum(np.rint(inverse * values), 63).astype(np.uint8)


def _pack_scales(scales: Bytes, minima: Bytes) -> Bytes:
    """Twice [blocks, 8] of 6 bits in 12 bytes: the first four whole, the last four's upper bits above them."""
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], axis=1)


def _scales_and_minima(groups: Floats) -> tuple[Floats, Floats]:
    """[…, 32] → scale and −minimum […]: least squares over 17 starting grids of 31 steps (`make_qkx2_quants`)."""
    weights = np.sqrt((groups * groups).mean(-1, keepdims=True)) + np.abs(groups)
    offset, high = np.minimum(groups.min(-1, keepdims=True), 0), groups.max(-1, keepdims=True)
    live = high > offset

    def error(scale: Floats, offset: Floats, q: Floats) -> Floats:
        found: Floats = (weights * (scale * q + offset - groups) ** 2).sum(-1, keepdims=True)
        return found

    def levels(steps: float) -> Floats:
        """On a grid from the best minimum so far: each better fit moves the start of the next."""
        inverse = np.divide(np.float32(steps), high - offset, out=np.zeros_like(high), where=live)
        found: Floats = np.rint(inverse * (groups - offset)).clip(0, 31)
        return found

    total, linear = weights.sum(-1, keepdims=True), (weights * groups).sum(-1, keepdims=True)
    scale = (high - offset) / 31
    best = error(scale, offset, levels(31))
    for step in range(16):
        q = levels(31 - 0.5 + 0.1 * step)
        sum_q, sum_qq = (weights * q).sum(-1, keepdims=True), (weights * q * q).sum(-1, keepdims=True)
        sum_xq = (weights * groups * q).sum(-1, keepdims=True)
        determinant = total * sum_qq - sum_q * sum_q
        solvable = determinant > 0
        safe = np.where(solvable, determinant, 1)
        tried, shift = (total * sum_xq - linear * sum_q) / safe, (sum_qq * linear - sum_q * sum_xq) / safe
        above = shift > 0  # minima are subtracted, so none may be positive
        tried = np.where(above, sum_xq / np.where(sum_qq > 0, sum_qq, 1), tried)
        shift = np.where(above, 0, shift)
        found = error(tried, shift, q)
        better = live & solvable & (found < best)
        scale, offset = np.where(better, tried, scale), np.where(better, shift, offset)
        best = np.where(better, found, best)
    return scale[..., 0], -offset[..., 0]
