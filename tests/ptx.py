"""A few of PTX's instructions on arrays of registers, and Triton's interpreter with them.

Without a GPU kernels are interpreted, but interpreters have no assembly, multiply the bits of bfloat16 as if they were integers,
and round to it towards zero. With these mended the very code that a GPU runs is held against the twins.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

Registers = np.ndarray[Any, np.dtype[np.uint32]]


def lop3(a: Registers, b: Registers, c: Registers, table: Registers) -> Registers:
    """Bit by bit what `table` says of three bits."""
    found = np.zeros_like(a)
    for i in range(32):
        place = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1
        found |= (table >> place & 1) << np.uint32(i)
    return found


def prmt(a: Registers, b: Registers, selector: Registers) -> Registers:
    """Four bytes, each chosen from the eight of `a` and `b`."""
    both, found = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros_like(a)
    for i in range(4):
        place = (selector >> 4 * i & 7).astype(np.uint64)
        found |= (both >> 8 * place & 0xFF).astype(np.uint32) << np.uint32(8 * i)
    return found


def halves(registers: Registers, dtype: torch.dtype) -> torch.Tensor:
    """The two numbers of 16 bits in each, the low one first: float64 [..., 2]."""
    return torch.from_numpy(registers.view(np.int32)[..., None].copy()).view(dtype).double()


def added(values: list[Registers], dtype: torch.dtype) -> Registers:
    """Sums, or products and sums, of both halves, none of which may need rounding."""
    first, *rest = (halves(value, dtype) for value in values)
    found = first + rest[0] if len(rest) == 1 else first * rest[0] + rest[1]
    assert torch.equal(found.to(dtype).double(), found)
    return np.asarray(found.to(dtype).view(torch.int32)[..., 0].numpy()).view(np.uint32)


def ran(code: str, *given: Registers) -> Registers:
    """What `code` leaves in $0; `given`: $1, $2, …"""
    known = {f"${place}": value for place, value in enumerate(given, 1)}
    for line in code.strip("{}").split(";"):
        name, *rest = re.split(r",?\s+", line.strip())
        if not name or name == ".reg":
            continue
        to, *read = rest
        values = [known[each] if each in known else np.full_like(given[0], int(each, 0)) for each in read]
        if name == "mov.b32":
            known[to] = values[0]
        elif name == "shr.b32":
            known[to] = values[0] >> values[1]
        elif name in ("lop3.b32", "prmt.b32"):
            known[to] = (lop3 if name == "lop3.b32" else prmt)(*values)
        else:
            known[to] = added(values, {"add.rn.f16x2": torch.float16, "fma.rn.bf16x2": torch.bfloat16}[name])
    return known["$0"]


def teach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter learns assembly of two elements at a time, and to multiply and round to bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain, truncated = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def widened(part: Any) -> Any:
        return TensorHandle((part.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if part.dtype.is_bf16() else part

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    def create_fp_trunc(self: Any, source: Any, to: Any) -> Any:
        if not (to.scalar.is_bf16() and source.dtype.is_fp32()):
            return truncated(self, source, to)
        made = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(made.view(np.uint16), to.scalar)

    def create_inline_asm(self: Any, code: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> Any:
        elements, *others = (np.ascontiguousarray(value.data) for value in values)
        assert (elements.itemsize, pack) == (2, 2)
        pairs = elements.view(np.uint32)  # neighbours
        found = ran(code, pairs, *(np.ascontiguousarray(other[..., ::2]).view(np.uint32) for other in others))
        kept = found.view(np.float16 if types[0].scalar.is_fp16() else np.uint16)
        return SimpleNamespace(get_result=lambda place: TensorHandle(kept, types[0].scalar))

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", create_fp_trunc)
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
