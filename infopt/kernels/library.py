"""The kernel library, loaded with ctypes. Structures have the fields of `native/interface.h`, in its order."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from infopt.errors import MissingNeedError
from infopt.kernels import build
from infopt.kernels.packed import KINDS, Packed

Pointers = POINTER(c_void_p)


class CMatrix(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("kind", "rows", "inner", "group")),
        *((name, c_void_p) for name in ("weights", "scales", "zeros", "bias")),
        ("scales_are_float32", c_int32),
    )


class CSource(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("kind", "rows", "inner")),
        ("stride", c_int64),
        ("data", c_void_p),
    )


class CLayer(Structure):
    _fields_ = (
        *((name, CMatrix) for name in ("qkv", "output", "gate_up", "down")),
        *(
            (name, c_void_p)
            for name in ("input_norm", "query_norm", "key_norm", "attention_out_norm", "feed_norm", "feed_out_norm")
        ),
        ("window", c_int32),
        ("rotary", c_int32),
    )


class CModel(Structure):
    _fields_ = (
        *(
            (name, c_int32)
            for name in (
                "layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "activation", "rotary_dim",
                "page", "kv_is_half",
            )
        ),
        *((name, c_float) for name in ("norm_epsilon", "attention_scale", "embedding_scale")),
        ("layer", POINTER(CLayer)),
        ("embedding", POINTER(CMatrix)),
        ("head", POINTER(CMatrix)),
        ("final_norm", c_void_p),
        ("rotary_cos", Pointers),
        ("rotary_sin", Pointers),
    )  # fmt: skip


class CBatch(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("tokens", "runs", "outputs", "check", "is_prompt")),
        ("ids", POINTER(c_int32)),
        ("run_start", POINTER(c_int32)),
        ("run_position", POINTER(c_int32)),
        ("run_pages", POINTER(Pointers)),
        ("output_token", POINTER(c_int32)),
        ("logits", c_void_p),
        ("largest", POINTER(c_int32)),
        ("margin", POINTER(c_float)),
        ("bad_layer", c_int32),
    )


#: Function → (what it returns, what it takes)
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "infopt_isa": (c_char_p, ()),
    "infopt_page_bytes": (c_int64, (POINTER(CModel),)),
    "infopt_open": (c_void_p, (POINTER(CModel), c_int32)),
    "infopt_open_beside": (c_void_p, (POINTER(CModel), c_void_p)),
    "infopt_close": (None, (c_void_p,)),
    "infopt_step": (None, (c_void_p, POINTER(CBatch))),
    "infopt_pack": (None, (POINTER(CMatrix), POINTER(CSource), c_int32, c_int32, c_int32)),
    "infopt_multiply": (None, (c_void_p, POINTER(CMatrix), c_void_p, c_int32, c_void_p, c_int32)),
    "infopt_read_seconds": (c_double, (c_void_p, c_void_p, c_int64)),
}


@cache
def load(isa: str | None = None) -> ctypes.CDLL:
    """The library for `isa`, or for the best instruction set that this processor has.

    Raises MissingNeedError where it cannot be built, or the processor lacks the instruction set.
    """
    wanted = isa or os.environ.get("INFOPT_ISA") or build.usable()[0]
    if wanted not in build.usable():
        raise MissingNeedError(f"this processor does not run {wanted}", hint=f"it runs {', '.join(build.usable())}")
    try:
        library = ctypes.CDLL(str(build.find(wanted)))
    except OSError:  # for another kind of processor, or a newer glibc: once more, from the sources
        library = _loaded(build.rebuilt(wanted))
    library.infopt_isa.restype = c_char_p
    if library.infopt_isa().decode() != wanted:
        raise MissingNeedError(
            f"{library._name} was built for {library.infopt_isa().decode()}, not for {wanted}", hint=f"remove {library._name}"
        )
    for name, (returned, taken) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = returned, taken
    return library


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        hint = f"set INFOPT_CACHE to a folder whose files may be executed; {build.HINT}"
        raise MissingNeedError(f"the kernel library cannot be loaded: {error}", hint=hint) from None


def matrix(packed: Packed) -> CMatrix:
    """What the library calls a packed matrix; its tensors must outlive it."""
    return CMatrix(
        KINDS.index(packed.kind), packed.rows, packed.padded_inner, packed.group,
        *(None if part is None else part.data_ptr() for part in (packed.weights, packed.scales, packed.zeros, packed.bias)),
        int(packed.scales is not None and packed.scales.dtype == torch.float32),
    )  # fmt: skip
