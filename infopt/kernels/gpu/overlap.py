"""Kernels that come in while those before them end: programmatic dependent launches, which GPUs from Hopper on have.

A kernel that overlaps begins as soon as all programs of the one before have begun, asks for its first weights, which nobody
writes, and then waits until the other is done. All kernels of a chain wait, so that whatever came before that is done, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_is_on: ContextVar[bool] = ContextVar("overlap", default=False)
#: Lines of memory that a program asks for while it waits: 32 KB of weights.
LINES = tl.constexpr(256)
#: Of what the second-level cache holds, bytes.
LINE = tl.constexpr(128)


@contextmanager
def overlapping(is_on: bool) -> Iterator[None]:
    """Whether kernels that are launched inside overlap."""
    before = _is_on.set(is_on)
    try:
        yield
    finally:
        _is_on.reset(before)


def launch() -> dict[str, Any]:
    """What every launch is told."""
    return {"OVERLAP": True, "launch_pdl": True} if _is_on.get() else {"OVERLAP": False}


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Before a kernel reads what others wrote, or writes."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def wait_with_weights(w, rows, begin, row, BN: tl.constexpr, OVERLAP: tl.constexpr):
    """The same; meanwhile the first weights of `rows` [BN] from `begin` on come into the cache, of `row` elements each."""
    if OVERLAP:
        gdc_launch_dependents()
        EACH: tl.constexpr = LINE // (w.dtype.element_ty.primitive_bitwidth // 8)
        place = tl.minimum(begin + tl.arange(0, LINES // BN) * EACH, row - 1)
        at = w + rows[:, None].to(tl.int64) * row + place[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
        gdc_wait()
