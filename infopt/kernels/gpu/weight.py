"""Weights as the GPU kernels read them.

Integers are shuffled so that one 16-byte load of a lane has 4 words of `32 / bits` inputs each that lie side by side in the
activations: word t of unit u holds, as field j, input `u · 128 / bits + 4j + t`. So field j of a lane's four words meets four
neighbours of x, and a unit of 32 (4 bits) or 16 (8 bits) inputs shares one scale. Integers are stored from 0 on: q + 8 or
q + 128 where the grid is symmetric. Rows are padded to 64 with zeros, gate and up rows of a gated layer taking turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

#: Rows are padded to a multiple of it, so that no tile has a part of them.
ROWS = 64
#: Where field j of a word begins. Four bits: so that all are read from bits 12 and 16 of the word, its neighbours by a byte, and
#: itself turned by half (`products._field`).
FIELDS = {4: (12, 16, 4, 8, 20, 24, 28, 0), 8: (0, 8, 16, 24)}
FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Weight:
    """[rows, inner]. `data`: floating point [padded rows, padded inner], or int32 words [padded rows, units, 4].

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
    def unit(self) -> int:
        """Inputs that a lane loads at a time: 16 bytes of them."""
        return 128 // self.bits if self.bits else 16 // self.data.itemsize

    @property
    def padded_inner(self) -> int:
        return self.data.shape[1] * self.unit if self.bits else self.data.shape[1]

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
    """`q` [rows, inner], signed; `scales` and `zeros` [rows, groups]. Raises ValueError for groups that no unit fits in."""
    rows, inner = q.shape
    unit, offset = 128 // bits, 1 << (bits - 1)
    group = group or -(-inner // unit) * unit
    if group % unit or scales.shape[1] != -(-inner // group):
        raise ValueError(f"groups of {group} inputs, {scales.shape[1]} of them in {inner}")
    stored = torch.full((-(-rows // ROWS) * ROWS, -(-inner // unit) * unit), offset, dtype=torch.int32, device=q.device)
    stored[:rows, :inner] = q.to(torch.int32) + offset
    fields = stored.view(len(stored), -1, 32 // bits, 4)
    words = torch.zeros_like(fields[:, :, 0])
    for field, begin in enumerate(FIELDS[bits]):
        words |= fields[:, :, field] << begin
    moved = None if zeros is None else _padded((zeros.to(torch.int32) + offset).to(scales.dtype), 1)
    return Weight(rows, inner, words, bits, group, _padded(scales, 1), moved, bias)


def dense(weight: Weight) -> torch.Tensor:
    """float32 [rows, inner]: what the weights stand for. Everything that the kernels compute is defined by it."""
    if weight.bits is None:
        found = weight.data.float()
        return (found if weight.scales is None else found * weight.scales[:, None])[: weight.rows, : weight.inner]
    assert weight.scales is not None
    mask = (1 << weight.bits) - 1
    fields = torch.stack([weight.data >> begin & mask for begin in FIELDS[weight.bits]], 2)
    stored = fields.reshape(len(weight.data), -1).float()
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
