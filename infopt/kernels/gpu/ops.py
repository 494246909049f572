"""What a step of a decoder is made of, by kernels or by their twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from infopt.kernels.gpu import attention, norm, products
from infopt.kernels.gpu.attention import Heads, Paged, Where
from infopt.kernels.gpu.choices import Asked, Choice, Table
from infopt.kernels.gpu.products import ALONE, Behind, Feed
from infopt.kernels.gpu.weight import FLOAT8, Weight


class Product(Protocol):
    """As `products.twin`."""

    def __call__(self, feed: Feed, weight: Weight, behind: Behind = ALONE) -> tuple[torch.Tensor, Feed]: ...


class Norm(Protocol):
    """As `norm.norm_twin`."""

    def __call__(
        self, x: torch.Tensor, gain: torch.Tensor, epsilon: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Ops:
    product: Product
    attention: Callable[[torch.Tensor, Paged, Where, Heads], torch.Tensor]
    norm: Norm
    likeliest: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


TWINS = Ops(products.twin, attention.twin, norm.norm_twin, norm.likeliest_twin)


def kernels(table: Table, multiprocessors: int) -> Ops:
    """`table`: which way each product takes."""

    def product(feed: Feed, weight: Weight, behind: Behind = ALONE) -> tuple[torch.Tensor, Feed]:
        asked = Asked(weight, len(feed.x), feed.x.dtype, behind.activation, behind.gain is not None)
        while True:
            choice = table.find(asked)
            try:
                return multiply(choice, feed, weight, behind)
            except Exception as error:  # Triton and the libraries raise of every kind
                table.refuse(choice, error, asked)

    def attend(qkv: torch.Tensor, cache: Paged, where: Where, heads: Heads) -> torch.Tensor:
        splits = splits_of(len(where.lengths) * heads.kv_heads, multiprocessors)
        return attention.attention(qkv, cache, where, heads, splits=splits)

    return Ops(product, attend, norm.norm, norm.likeliest)


def splits_of(programs: int, multiprocessors: int) -> int:
    """Into how many parts, a power of two, positions go: a multiprocessor holds three programs at a time, and two rounds of them
    leave less of it idle at the end than one and a bit do."""
    splits = 1
    while splits < 32 and programs * splits < 6 * multiprocessors:
        splits *= 2
    return splits


def multiply(choice: Choice, feed: Feed, weight: Weight, behind: Behind = ALONE) -> tuple[torch.Tensor, Feed]:
    """`products.twin` the chosen way."""
    if choice.way == "vector":
        return products.by_vector(feed, weight, behind, block=choice.block, rows=choice.rows, warps=choice.warps)
    tile = {"block": choice.block, "rows": choice.rows, "inputs": choice.inputs, "warps": choice.warps, "stages": choice.stages}
    if choice.way == "slices":
        return products.by_slices(feed, weight, behind, ways=choice.ways, **tile)
    if choice.way == "tiles":
        return products.by_tiles(feed, weight, behind, splits=choice.splits, **tile)
    x = feed.x if feed.squares is None else feed.normed().to(feed.x.dtype)
    y = _scaled(x, weight) if choice.way == "scaled" else torch.nn.functional.linear(x, products.widened(weight, x.dtype))
    y = _behind(y[:, : weight.rows], weight, behind).to(behind.dtype or x.dtype).contiguous()
    return y, Feed(y) if behind.gain is None else Feed(norm.norm(y, behind.gain, behind.epsilon))


def _scaled(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """x rounded to float8 with a scale a row, multiplied as float8. `weight` is float8."""
    assert weight.scales is not None
    largest = torch.finfo(FLOAT8).max
    scales = (x.float().abs().amax(1, keepdim=True) / largest).clamp(min=1e-12)
    rounded = (x.float() / scales).clamp(-largest, largest).to(FLOAT8)
    return torch._scaled_mm(
        rounded, weight.data[:, : weight.inner].t(), scale_a=scales, scale_b=weight.scales[None], out_dtype=torch.bfloat16
    )


def _behind(y: torch.Tensor, weight: Weight, behind: Behind) -> torch.Tensor:
    if weight.bias is not None:
        y = y + weight.bias
    if behind.activation is not None:
        y = products.gated(y, behind.activation)
    return y if behind.residual is None else y + behind.residual
