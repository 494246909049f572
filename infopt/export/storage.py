"""How one tensor is stored in a GGUF file: its type where the shape allows, the nearest type where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infopt.errors import InputError, unknown
from infopt.export import kquants

Array = NDArray[Any]

#: What a user may ask for → ggml's name.
TYPES = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_k": "Q5_K", "q6_k": "Q6_K",
}  # fmt: skip
#: Where rows do not divide into its blocks, llama.cpp takes the next plainer type (src/llama-quant.cpp, `tensor_type_fallback`).
FALLBACK = {"Q5_K": "Q5_1", "Q6_K": "Q8_0"}
BLOCKS = {"Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "Q5_1": 32, "Q5_K": 256, "Q6_K": 256}
#: Types whose head, or embedding where the two are one, llama.cpp keeps at 6 bits.
FINE_HEAD = ("Q4_0", "Q4_1", "Q5_K")
#: Types that can hold a grid of equal steps as it is, and the integers they have room for.
GRIDS = {"Q8_0": (-128, 127), "Q4_0": (-8, 7), "Q4_1": (0, 15)}


@dataclass(frozen=True)
class Encoded:
    """`data` as the file holds it, `dense` float32 as every reader sees it.

    `is_exact`: `dense` is the weight itself. `keeps_grid`: its integers are those that it had, its scales in float16.
    """

    kind: str
    data: Array
    dense: NDArray[np.float32]
    is_exact: bool
    keeps_grid: bool = False


def check(name: str) -> str:
    """ggml's name of a storage type. Raises InputError."""
    if name not in TYPES:
        raise InputError(unknown("GGUF type", name, TYPES), hint="infopt export --help lists them")
    return TYPES[name]


def choose(asked: str, shape: tuple[int, ...], *, is_head: bool = False) -> str:
    """The type of a tensor when the user asked for `asked`: vectors stay float32, rows that do not divide fall back."""
    if len(shape) < 2:
        return "F32"
    kind = "Q6_K" if is_head and asked in FINE_HEAD else asked
    while kind in BLOCKS and shape[-1] % BLOCKS[kind]:
        kind = FALLBACK.get(kind, "F16")
    return kind


def encode(weight: NDArray[np.float32], kind: str, scale: NDArray[np.float32] | None = None) -> Encoded:
    """`weight` [out, in] or [n] in `kind`. Raises InputError for values that the type cannot hold.

    `scale` [out, groups]: the grid that the weight lies on already, where there is one; its integers are stored as they
    are where the type has room for them, which is the same weight if float16 holds the scales.
    """
    with np.errstate(over="ignore"):  # what does not fit is refused below
        data = _quantize(weight, kind)
    dense, keeps = _dequantize(data, kind), False
    if scale is not None and kind in GRIDS:
        kept = _keep_grid(weight, kind, scale)
        seen = None if kept is None else _dequantize(kept, kind)
        if kept is not None and seen is not None and _error(seen, weight) <= _error(dense, weight):
            data, dense, keeps = kept, seen, True
    if not np.isfinite(dense).all():
        raise InputError(f"{kind}: a weight of magnitude {np.abs(weight).max():.3g} does not fit", hint="--type bf16 or f32")
    return Encoded(kind, data, dense, bool(np.array_equal(dense, weight)), keeps)


def _error(dense: Array, weight: Array) -> float:
    return float(np.square(dense - weight, dtype=np.float64).sum())


def _quantize(weight: NDArray[np.float32], kind: str) -> Array:
    import gguf

    own = {"Q5_K": kquants.q5_k, "Q6_K": kquants.q6_k}
    if kind in own:
        return own[kind](weight)
    data: Array = gguf.quantize(np.ascontiguousarray(weight), gguf.GGMLQuantizationType[kind])
    return data


def _dequantize(data: Array, kind: str) -> NDArray[np.float32]:
    import gguf

    dense: NDArray[np.float32] = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    return dense.astype(np.float32, copy=False)


def _keep_grid(weight: NDArray[np.float32], kind: str, scale: NDArray[np.float32]) -> Array | None:
    """The blocks of 32 that hold the grid's own integers; None where blocks and groups, or the integers, do not go together."""
    rows, columns = weight.shape
    blocks = columns // 32
    if scale.shape[1] == 0 or blocks % scale.shape[1]:
        return None
    d = scale.repeat(blocks // scale.shape[1], axis=1).reshape(-1, 1)  # [out · in/32, 1]
    groups = weight.reshape(-1, 32)
    offset = groups.min(-1, keepdims=True) if kind == "Q4_1" else np.zeros_like(d)
    q = np.rint(np.divide(groups - offset, d, out=np.zeros_like(groups), where=d != 0))
    low, high = GRIDS[kind]
    if q.min() < low or q.max() > high:
        return None
    with np.errstate(over="ignore"):
        head = [part.astype(np.float16).view(np.uint8) for part in ((d, offset) if kind == "Q4_1" else (d,))]
    if kind == "Q8_0":
        body: Array = q.astype(np.int8).view(np.uint8)
    else:
        nibbles = (q - low).astype(np.uint8).reshape(-1, 2, 16)
        body = nibbles[:, 0] | (nibbles[:, 1] << 4)
    return np.concatenate([*head, body], axis=1).reshape(rows, -1)
