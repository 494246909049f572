"""Weights as the kernels read them, and what the kernels compute, in plain torch.

Rows lie in blocks of 16, so that sixteen of them are multiplied at a time without adding across lanes. Within a block, by
inner index: float32 one after the other, [inner][16]; bfloat16 in pairs, [inner / 2][16][2]; int8 in fours, as q + 128,
[inner / 4][16][4]; int4 in eights, as q + 8 (or as stored, with zeros), the first four in the low halves of the bytes and
the others in the high ones, [inner / 8][16][4]. Scales and zeros: [group][16]. Rows are padded to 16 and inner to 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

Kind = Literal["float32", "bfloat16", "int8", "int4"]
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "int8", "int4")
LANES = 16
GROUP = 32
"""Inputs that are rounded to int8 together, with integer weights."""


@dataclass(frozen=True)
class Packed:
    """A weight [rows, inner]. Tensors are laid out as above; `zeros` only where the grid is not symmetric."""

    kind: Kind
    rows: int
    inner: int
    weights: torch.Tensor
    group: int = 0
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    """float32 [rows padded]"""

    @property
    def padded_inner(self) -> int:
        return up(self.inner, GROUP)

    @property
    def padded_rows(self) -> int:
        return up(self.rows, LANES)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.weights, self.scales, self.zeros, self.bias) if part is not None)

    def moved(self, keep: Callable[[torch.Tensor], torch.Tensor]) -> Packed:
        """With every tensor replaced by what `keep` makes of it."""
        scales, zeros, bias = (None if part is None else keep(part) for part in (self.scales, self.zeros, self.bias))
        return replace(self, weights=keep(self.weights), scales=scales, zeros=zeros, bias=bias)

    def with_bias(self, bias: torch.Tensor | None) -> Packed:
        """`bias` [rows] in any floating-point type."""
        if bias is None:
            return self
        return replace(self, bias=pad(bias.detach().float()[:, None], 1)[:, 0].contiguous())


def up(n: int, to: int) -> int:
    return -(-n // to) * to


def pad(weight: torch.Tensor, inner: int = GROUP) -> torch.Tensor:
    """With zeros, to whole blocks of rows and to a multiple of `inner`."""
    rows, columns = weight.shape
    if rows % LANES == 0 and columns % inner == 0:
        return weight
    out = weight.new_zeros(up(rows, LANES), up(columns, inner))
    out[:rows, :columns] = weight
    return out


def pack(weight: torch.Tensor, kind: Kind, group: int = GROUP) -> Packed:
    """`weight` [rows, inner] in floating point; integers are rounded to nearest, symmetric, in groups of `group`."""
    rows, inner = weight.shape
    weight = weight.detach()
    if kind in ("int8", "int4"):
        integers, scales = rounded(weight, 8 if kind == "int8" else 4, group)
        return pack_integers(integers, scales, None, 8 if kind == "int8" else 4, group)
    padded = pad(weight).to(torch.float32 if kind == "float32" else torch.bfloat16)
    shape = (-1, LANES, padded.shape[1]) if kind == "float32" else (-1, LANES, padded.shape[1] // 2, 2)
    return Packed(kind, rows, inner, padded.reshape(shape).transpose(1, 2).contiguous())


def rounded(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers int8 [rows, inner] and scales bfloat16 [rows, groups]: the largest weight of a group is ±(2^(bits−1) − 1)."""
    largest, count = 2 ** (bits - 1) - 1, up(weight.shape[1], group) // group
    grouped = pad_columns(weight.float(), group).reshape(-1, count, group)
    scales = (grouped.abs().amax(-1) / largest).bfloat16()
    steps = scales.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    integers = (grouped / steps).round().clamp(-largest, largest).to(torch.int8)
    return integers.flatten(1)[:, : weight.shape[1]], scales


def pad_columns(weight: torch.Tensor, to: int) -> torch.Tensor:
    missing = -weight.shape[1] % to
    return torch.nn.functional.pad(weight, (0, missing)) if missing else weight


def pack_integers(
    integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int | None
) -> Packed:
    """`integers` [rows, inner], signed; `scales` and `zeros` [rows, groups]; 4 bits with zeros: (q − zero)·scale.

    Scales stay float32 where bfloat16 does not hold them. Raises ValueError for groups that are no multiple of 32.
    """
    rows, inner = integers.shape
    groups = scales.shape[1]
    group = checked_group(inner, groups, bits, group, zeros is not None)
    offset = 128 if bits == 8 else 8
    stored = pad((integers.to(torch.int16) + offset).to(torch.uint8)) if inner % GROUP == 0 else pad_with(integers, offset)
    if bits == 8:
        weights = stored.reshape(-1, LANES, stored.shape[1] // 4, 4).transpose(1, 2).contiguous()
    else:
        eights = stored.reshape(-1, LANES, stored.shape[1] // 8, 2, 4)
        weights = (eights[..., 0, :] | eights[..., 1, :] << 4).transpose(1, 2).contiguous()
    return Packed("int8" if bits == 8 else "int4", rows, inner, weights, group, *lay_out_grid(scales, zeros, bits))


def checked_group(inner: int, groups: int, bits: int, group: int | None, has_zeros: bool) -> int:
    """Inputs that share a scale; None is a whole row. Raises ValueError for a grid that the kernels do not multiply."""
    size = group or up(inner, GROUP)
    if bits == 8 and has_zeros:
        raise ValueError("8 bits with zeros")
    if size % GROUP or groups != up(inner, size) // size:
        raise ValueError(f"groups of {size} inputs, {groups} of them in {inner}")
    return size


def lay_out_grid(scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zeros [rows, groups] as they lie beside the weights; bfloat16 where that holds the scales."""
    fits = bool((scales.bfloat16().float() == scales.float()).all())
    dtype = torch.bfloat16 if fits else torch.float32

    def laid_out(part: torch.Tensor) -> torch.Tensor:
        return pad(part.to(dtype), 1).reshape(-1, LANES, part.shape[1]).transpose(1, 2).contiguous()

    return laid_out(scales), None if zeros is None else laid_out(zeros + (128 if bits == 8 else 8))


def pad_with(integers: torch.Tensor, offset: int) -> torch.Tensor:
    """Stored integers with columns of zeros behind them."""
    return pad((pad_columns(integers, GROUP).to(torch.int16) + offset).to(torch.uint8))


def paired(gate: torch.Tensor, up_: torch.Tensor) -> torch.Tensor:
    """[inner, …] twice → 16 rows of the first, 16 of the second, and so on: what SwiGLU multiplies lies side by side."""
    both = [pad_rows(part).reshape(-1, LANES, *part.shape[1:]) for part in (gate, up_)]
    return torch.stack(both, 1).flatten(0, 2)


def pad_rows(part: torch.Tensor) -> torch.Tensor:
    missing = -part.shape[0] % LANES
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part


def dense(packed: Packed) -> torch.Tensor:
    """float32 [rows, inner]: what the packed weights stand for."""
    blocks = packed.weights
    if packed.kind == "int4":
        blocks = torch.stack([blocks & 15, blocks >> 4], 2)  # [block, eight, half, row, four]
        flat = blocks.permute(0, 3, 1, 2, 4)
    elif packed.kind == "float32":
        flat = blocks.transpose(1, 2)
    else:
        flat = blocks.permute(0, 2, 1, 3)
    stored = flat.reshape(packed.padded_rows, packed.padded_inner).float()
    if packed.scales is not None:
        zeros = 128.0 if packed.kind == "int8" else 8.0 if packed.zeros is None else spread(packed.zeros, packed.group)
        stored = (stored - zeros) * spread(packed.scales, packed.group)
    return stored[: packed.rows, : packed.inner]


def spread(part: torch.Tensor, group: int) -> torch.Tensor:
    """Scales, or zeros, [block, group, 16] → float32 [rows, inner], one for each weight."""
    return part.float().transpose(1, 2).flatten(0, 1).repeat_interleave(group, 1)


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """`x` [tokens, inner] float32 as integer weights meet it: int8, a scale for each token's group of 32."""
    grouped = pad_columns(x.float(), GROUP).reshape(len(x), -1, GROUP)
    largest = grouped.abs().amax(-1, keepdim=True)
    # `127 / largest` would be 127 times the reciprocal in torch, which now and then rounds a tie the other way.
    steps = torch.where(largest > 0, torch.tensor(127.0) / largest, 0)
    return torch.flatten((grouped * steps).round() * (largest / 127), 1)[:, : x.shape[1]]


def multiply(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """The kernels' product: [tokens, inner] → float32 [tokens, rows]."""
    inputs = rounded_inputs(x) if packed.kind in ("int8", "int4") else x.float()
    out = inputs @ dense(packed).T
    return out if packed.bias is None else out + packed.bias[: packed.rows]
