"""Weights packed by the kernel library: what `packed.pack` and `packed.pack_integers` give, in one pass on all threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from infopt.kernels import library
from infopt.kernels.library import CSource
from infopt.kernels.packed import GROUP, LANES, Kind, Packed, checked_group, lay_out_grid, up

SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
BITS = {"int8": 8, "int4": 4}


def takes(parts: Sequence[torch.Tensor]) -> bool:
    """Whether the library reads them: matrices in host memory, row after row, which share no block of 16 rows."""
    return all(
        type(part.data) is torch.Tensor and part.dtype in SOURCES and part.device.type == "cpu"
        and part.dim() == 2 and part.stride(1) == 1
        and (len(parts) == 1 or part.shape[0] % LANES == 0)
        for part in parts
    )  # fmt: skip


def pack(parts: Sequence[torch.Tensor], kind: Kind, *, in_pairs: bool = False) -> Packed:
    """`parts` [rows, inner] in floating point, one below the other, or, `in_pairs`, block by block in turns.

    Integers are rounded to nearest, symmetric, in groups of 32.
    """
    rows, inner = sum(len(part) for part in parts), parts[0].shape[1]
    blocks, padded = up(rows, LANES) // LANES, up(inner, GROUP)
    scales = None
    if kind == "float32":
        weights = torch.zeros(blocks, padded, LANES)
    elif kind == "bfloat16":
        weights = torch.zeros(blocks, padded // 2, LANES, 2, dtype=torch.bfloat16)
    else:
        weights = _bytes(blocks, padded, kind)
        scales = torch.zeros(blocks, padded // GROUP, LANES, dtype=torch.bfloat16)
    made = Packed(kind, rows, inner, weights, GROUP if scales is not None else 0, scales)
    return _filled(made, parts, in_pairs)


def pack_integers(
    parts: Sequence[torch.Tensor], scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int | None,
    *, in_pairs: bool = False,
) -> Packed:  # fmt: skip
    """`parts` int8 [rows, inner], signed; `scales` and `zeros` [rows, groups] in the order of the packed rows."""
    rows, inner = sum(len(part) for part in parts), parts[0].shape[1]
    kind: Kind = "int8" if bits == 8 else "int4"
    group = checked_group(inner, scales.shape[1], bits, group, zeros is not None)
    weights = _bytes(up(rows, LANES) // LANES, up(inner, GROUP), kind)
    return _filled(Packed(kind, rows, inner, weights, group, *lay_out_grid(scales, zeros, bits)), parts, in_pairs)


def _bytes(blocks: int, inner: int, kind: Kind) -> torch.Tensor:
    return torch.zeros(blocks, inner // (4 if kind == "int8" else 8), LANES, 4, dtype=torch.uint8)


def _filled(made: Packed, parts: Sequence[torch.Tensor], in_pairs: bool) -> Packed:
    loaded, target, first = library.load(), library.matrix(made), 0
    for index, part in enumerate(parts):
        source = CSource(SOURCES[part.dtype], part.shape[0], part.shape[1], part.stride(0), part.data_ptr())
        begin, every = (index, len(parts)) if in_pairs else (first, 1)
        loaded.infopt_pack(ctypes.byref(target), ctypes.byref(source), begin, every, torch.get_num_threads())
        first += part.shape[0] // LANES
    return made
