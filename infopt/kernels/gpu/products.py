"""Matrix products of few rows with weights of any kind: y = x · Wᵀ, and what stands around it in a decoder.

Three ways (`product_kernels`). `vector` multiplies floating-point weights with one row in ordinary arithmetic; `slices` and
`tiles` multiply on the tensor cores, for few rows and for many; tiles may split the inputs among programs, whose sums a second
launch adds in order. All work in float32 sums and give the same on every run.

An RMSNorm between two products costs no launch: the first leaves its rows multiplied by the norm's gain, and the sums of their
squares; the second divides by their root mean square behind its sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from infopt.kernels.gpu import product_kernels as kernels
from infopt.kernels.gpu.overlap import launch
from infopt.kernels.gpu.weight import Weight, dense


@dataclass(frozen=True)
class Feed:
    """Rows of a product, `x` [rows, inner]. `squares` float32 [parts, rows]: still to be divided by their root mean square, which
    is that of all parts' sum over inner, plus `epsilon` (arXiv 1910.07467)."""

    x: torch.Tensor
    squares: torch.Tensor | None = None
    epsilon: float = 0.0

    def normed(self) -> torch.Tensor:
        """float32 [rows, inner]: what a product multiplies."""
        return self.x.float() if self.squares is None else self.x.float() * self._scale()

    def _scale(self) -> torch.Tensor:
        assert self.squares is not None
        return torch.rsqrt(self.squares.sum(0) / self.x.shape[1] + self.epsilon)[:, None]

    def last(self, count: int) -> Feed:
        """Of its last rows."""
        return replace(self, x=self.x[-count:], squares=None if self.squares is None else self.squares[:, -count:].contiguous())


@dataclass(frozen=True)
class Behind:
    """What stands behind a product. `activation` 0: silu(gate) · up, whose rows take turns in W; 1: the tanh form of GELU.
    `residual` is added last. `gain` [outputs] is that of a norm with `epsilon` that follows. `dtype`: None, x's."""

    activation: int | None = None
    residual: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    epsilon: float = 0.0
    dtype: torch.dtype | None = None


ALONE = Behind()


def twin(feed: Feed, weight: Weight, behind: Behind = ALONE) -> tuple[torch.Tensor, Feed]:
    """[rows, weight.rows], or half of it with an activation; and the same as the next product's feed."""
    y = feed.normed() @ dense(weight).T
    if weight.bias is not None:
        y = y + weight.bias.float()
    if behind.activation is not None:
        y = gated(y, behind.activation)
    if behind.residual is not None:
        y = y + behind.residual.float()
    y = y.to(behind.dtype or feed.x.dtype)
    if behind.gain is None:
        return y, Feed(y)
    fed = (y.float() * behind.gain.float()).to(y.dtype)
    return y, Feed(fed, y.float().square().sum(1)[None], behind.epsilon)


def gated(y: torch.Tensor, activation: int) -> torch.Tensor:
    """Of gate and up, which take turns in `y` [rows, 2 · outputs]: [rows, outputs]."""
    gate, up = y[:, 0::2], y[:, 1::2]
    return up * (torch.nn.functional.silu(gate) if activation == 0 else torch.nn.functional.gelu(gate, approximate="tanh"))


def _around(feed: Feed, weight: Weight, behind: Behind, programs: int) -> tuple[torch.Tensor, Feed, dict[str, Any]]:
    """The product's room, what it will feed, and what all kernels are told of these. Squares are left by each of `programs`."""
    x, squares, activation = feed.x, feed.squares, behind.activation
    out = x.new_empty(len(x), weight.rows if activation is None else weight.rows // 2, dtype=behind.dtype or x.dtype)
    parts = 0 if squares is None else len(squares)
    made: dict[str, Any] = {
        "squares": squares, "parts": parts, "PARTS": triton.next_power_of_2(max(1, parts)), "epsilon": feed.epsilon,
        "bias": weight.bias, "residual": behind.residual, "gain": behind.gain, "out": out, "fed": None, "left": None,
        "M": len(x), "N": weight.rows, "K": weight.inner, "ACT": -1 if activation is None else activation, **launch(),
    }  # fmt: skip
    if behind.gain is None:
        return out, Feed(out), made
    fed = Feed(torch.empty_like(out), x.new_empty(programs, len(x), dtype=torch.float32), behind.epsilon)
    return out, fed, made | {"fed": fed.x, "left": fed.squares}


def by_vector(
    feed: Feed, weight: Weight, behind: Behind, *, block: int, rows: int, warps: int
) -> tuple[torch.Tensor, Feed]:  # fmt: skip
    """`block` rows of W, which is floating-point, and `rows` of x a program of `warps` warps."""
    inputs, programs = 32 * warps * 16 // weight.data.itemsize, len(weight.data) // block
    out, fed, around = _around(feed, weight, behind, programs)
    kernels.vector[programs, -(-len(feed.x) // rows)](
        feed.x, weight.data, weight.scales, padded=weight.padded_inner, BM=rows, BN=block, BK=inputs,
        EVEN=weight.inner % inputs == 0 and len(feed.x) % rows == 0, num_warps=warps, **around,
    )  # fmt: skip
    return out, fed


def by_slices(
    feed: Feed, weight: Weight, behind: Behind, *, block: int, rows: int, inputs: int, ways: int, warps: int, stages: int
) -> tuple[torch.Tensor, Feed]:
    """`block` rows of W and `rows` of x a program; `ways` times `inputs` inputs at a time, or as many as share scales."""
    programs, step = len(weight.data) // block, weight.step(inputs)
    out, fed, around = _around(feed, weight, behind, programs)
    kernels.slices[programs, -(-len(feed.x) // rows)](
        feed.x, BM=rows, BN=block, WAYS=ways, num_warps=warps, num_stages=stages, **_read(feed.x, weight, step, ways), **around
    )
    return out, fed


def by_tiles(
    feed: Feed, weight: Weight, behind: Behind, *, block: int, rows: int, inputs: int, splits: int, warps: int, stages: int
) -> tuple[torch.Tensor, Feed]:
    """Tiles of `block` rows of W, `rows` of x and `inputs` inputs, or as many as share scales; these in `splits` parts."""
    x, programs, wide = feed.x, len(weight.data) // block, min(256, triton.next_power_of_2(weight.rows))
    out, fed, around = _around(feed, weight, behind, programs if splits == 1 else -(-weight.rows // wide))
    sums = x.new_empty(splits, len(x), weight.rows, dtype=torch.float32) if splits > 1 else None
    kernels.tiles[programs, -(-len(x) // rows), splits](
        x, sums=sums, BM=rows, BN=block, SPLITS=splits, num_warps=warps, num_stages=stages,
        **_read(x, weight, weight.step(inputs)), **around,
    )  # fmt: skip
    if sums is not None:
        kernels.join[-(-weight.rows // wide), len(x)](sums, BN=wide, SPLITS=splits, num_warps=2, **around)
    return out, fed


def _read(x: torch.Tensor, weight: Weight, step: int, ways: int = 1) -> dict[str, Any]:
    """How a weight is gone through, `ways` times `step` elements at a time."""
    row = weight.data.shape[1]
    return {
        "w": weight.data, "scales": weight.scales, "zeros": weight.zeros, "row": row, "STEP": step, "BITS": weight.bits or 0,
        "groups": weight.scales.shape[1] if weight.bits and weight.scales is not None else 0, "GROUP": weight.group,
        "EVEN": row % (step * ways) == 0 and row * weight.fields == weight.inner, "ASM": _has_asm(x),
    }  # fmt: skip


def widened(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """[padded rows, inner] in floating point: the weight itself where it is that."""
    if weight.bits is None:
        data = weight.data[:, : weight.inner].to(dtype)
        return data if weight.scales is None else data * weight.scales[:, None].to(dtype)
    assert weight.scales is not None
    rows, row = weight.data.shape
    out = torch.empty(rows, weight.inner, dtype=dtype, device=weight.data.device)
    kernels.spread[rows // 16, -(-row // 128)](
        weight.data, weight.scales, weight.zeros, out, weight.inner, row, weight.scales.shape[1], BN=16, STEP=128,
        BITS=weight.bits, GROUP=weight.group,
    )  # fmt: skip
    return out


def _has_asm(x: torch.Tensor) -> bool:
    """On the CPU kernels are interpreted."""
    return x.device.type != "cpu"
