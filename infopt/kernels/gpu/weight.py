"""Weights as the GPU kernels read them.

Integers lie in elements of 16 bits, 16 elements being a block of `16 · 16 / bits` inputs: field f of element i of block b, its
bits from `f · bits` on, is input `b · 256 / bits + 16f + i`. So one field of 16 neighbouring elements meets 16 neighbours of x:
the depth of a tensor core's tile; and a register with two elements gives two weights of one field at once. Integers are stored
from 0 on: q + 8 or q + 128 where the grid is symmetric. Rows are padded to 64 with zeros, gate and up rows of a gated layer
taking turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

#: Rows are padded to a multiple of it, so that no tile has a part of them.
ROWS = 64
#: Elements of a block.
BLOCK = 16
FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Weight:
    """[rows, inner]. `data`: floating point [padded rows, padded inner], or int16 elements.

    Integers stand for (q − zero) · scale with `scales` and `zeros` [padded rows, groups]; zeros None: 8 or 128. float8 has one
    scale a row, float32 [padded rows]. `bias` [rows].
    """

    rows: int
    inner: int
    data: torch.Tensor
    bits: int | None = None
    group: int = 0
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """As reports name it."""
        return f"int{self.bits}" if self.bits else str(self.data.dtype).removeprefix("torch.").removesuffix("_e4m3fn")

    @property
    def fields(self) -> int:
        """Inputs in an element of `data`."""
        return 16 // self.bits if self.bits else 1

    @property
    def padded_inner(self) -> int:
        return self.data.shape[1] * self.fields

    def step(self, inputs: int) -> int:
        """Elements with at most `inputs` inputs that are whole blocks and, if they are several, share a scale."""
        found = inputs // self.fields
        while self.bits and found > BLOCK and self.group % (found * self.fields) and self.group < self.padded_inner:
            found //= 2
        return max(BLOCK, found)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.data, self.scales, self.zeros, self.bias) if part is not None)

    def to(self, device: torch.device | str) -> Weight:
        scales, zeros, bias = (None if part is None else part.to(device) for part in (self.scales, self.zeros, self.bias))
        return replace(self, data=self.data.to(device), scales=scales, zeros=zeros, bias=bias)


def plain(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Weight:
    """Floating point [rows, inner], as it is."""
    inner = 16 // weight.element_size()
    rows, columns = weight.shape
    return Weight(rows, columns, _padded(weight.detach(), inner), bias=bias)


def float8(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Weight:
    """Rounded to E4M3 with one scale a row: its largest weight becomes 448."""
    largest = torch.finfo(FLOAT8).max
    scales = (weight.detach().float().abs().amax(1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (weight.float() / scales[:, None]).clamp(-largest, largest).to(FLOAT8)
    data = _padded(rounded.view(torch.uint8), 16).view(FLOAT8)
    rows, columns = weight.shape
    return Weight(rows, columns, data, scales=_padded(scales[:, None], 1)[:, 0].contiguous(), bias=bias)


def integers(
    q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int | None,
    bias: torch.Tensor | None = None,
) -> Weight:  # fmt: skip
    """`q` [rows, inner], signed; `scales` and `zeros` [rows, groups]. Raises ValueError for groups that blocks do not go with."""
    rows, inner = q.shape
    offset, block = 1 << (bits - 1), BLOCK * 16 // bits
    padded = -(-inner // block) * block
    group = padded if group is None or group >= inner else group
    if not fits(bits, group, inner) or scales.shape[1] != -(-inner // group):
        raise ValueError(f"groups of {group} inputs, {scales.shape[1]} of them in {inner}")
    stored = torch.full((-(-rows // ROWS) * ROWS, padded), offset, dtype=torch.int32, device=q.device)
    stored[:rows, :inner] = q.to(torch.int32) + offset
    fields = stored.view(len(stored), -1, 16 // bits, BLOCK)
    elements = torch.zeros_like(fields[:, :, 0])
    for field in range(16 // bits):
        elements |= fields[:, :, field] << (field * bits)
    moved = None if zeros is None else _padded((zeros.to(torch.int32) + offset).to(scales.dtype), -(-padded // group))
    return Weight(
        rows, inner, elements.to(torch.int16).flatten(1), bits, group, _padded(scales, -(-padded // group)), moved, bias
    )


def fits(bits: int, group: int | None, inner: int) -> bool:
    """Whether groups are whole blocks, or two of them one; None, or at least `inner`: there is one group."""
    block = BLOCK * 16 // bits
    return group is None or group >= inner or group % block == 0 or 2 * group == block


def dense(weight: Weight) -> torch.Tensor:
    """float32 [rows, inner]: what the weights stand for. Everything that the kernels compute is defined by it."""
    if weight.bits is None:
        found = weight.data.float()
        return (found if weight.scales is None else found * weight.scales[:, None])[: weight.rows, : weight.inner]
    assert weight.scales is not None
    blocks = weight.data.view(len(weight.data), -1, 1, BLOCK).int()
    fields = [blocks >> (field * weight.bits) & ((1 << weight.bits) - 1) for field in range(weight.fields)]
    stored = torch.cat(fields, 2).flatten(1).float()
    zeros = 1 << (weight.bits - 1) if weight.zeros is None else _spread(weight.zeros, weight.group, stored.shape[1])
    found = (stored - zeros) * _spread(weight.scales, weight.group, stored.shape[1])
    return found[: weight.rows, : weight.inner]


def _spread(part: torch.Tensor, group: int, inner: int) -> torch.Tensor:
    return part.float().repeat_interleave(group, 1)[:, :inner]


def _padded(part: torch.Tensor, inner: int) -> torch.Tensor:
    """With zeros, to whole blocks of rows and a multiple of `inner` columns."""
    rows, columns = part.shape
    missing = -rows % ROWS, -columns % inner
    return torch.nn.functional.pad(part, (0, missing[1], 0, missing[0])).contiguous() if any(missing) else part.contiguous()
