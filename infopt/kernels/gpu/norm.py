"""RMSNorm of a row in one launch, with what is added behind it, and the likeliest of a row of logits in two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from infopt.kernels.gpu.overlap import launch, wait

#: Logits that a program of `largest` looks at.
BLOCK = 4096


def normed(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`x` [..., inner] divided by its root mean square, times `gain` [inner]: float32 (arXiv 1910.07467)."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * gain.float()


def norm_twin(x: torch.Tensor, gain: torch.Tensor, epsilon: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [rows, inner] normed, plus `residual`; x's dtype."""
    found = normed(x, gain, epsilon)
    return (found if residual is None else found + residual.float()).to(x.dtype)


@triton.jit
def rms_norm(x, gain, residual, out, K, epsilon, BK: tl.constexpr, RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr):
    wait(OVERLAP)
    k = tl.arange(0, BK)
    at = tl.program_id(0) * K + k
    row = tl.load(x + at, mask=k < K, other=0).to(tl.float32)
    y = row * tl.rsqrt(tl.sum(row * row, 0) / K + epsilon) * tl.load(gain + k, mask=k < K, other=0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + at, mask=k < K, other=0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=k < K)


def norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """As `norm_twin`."""
    out, wide = torch.empty_like(x), triton.next_power_of_2(x.shape[1])
    warps = min(8, max(1, wide // 512))
    rms_norm[(x.shape[0],)](
        x, gain, residual, out, x.shape[1], epsilon, BK=wide, RESIDUAL=residual is not None, num_warps=warps, **launch()
    )
    return out


def likeliest_twin(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `logits` [rows, vocabulary]: the largest's index, int32 [rows], the first of equals, and by how much it leads the next.

    The lead is NaN where a logit is.
    """
    best = logits.float().topk(2).values
    lead = torch.where(logits.isnan().any(-1), torch.nan, best[:, 0] - best[:, 1])
    return logits.argmax(-1).int(), lead


@triton.jit
def largest(logits, bests, seconds, places, V, blocks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Of each block: its largest, the next, and where the first is; the next is NaN where anything is."""
    wait(OVERLAP)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(logits + tl.program_id(0).to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    is_bad = tl.sum((row != row).to(tl.int32), 0) > 0
    best = tl.max(row, 0)
    place = tl.min(tl.where(row == best, v, V), 0)
    second = tl.max(tl.where(v == place, float("-inf"), row), 0)
    at = tl.program_id(0) * blocks + tl.program_id(1)
    tl.store(bests + at, best)
    tl.store(seconds + at, tl.where(is_bad, float("nan"), second))
    tl.store(places + at, place)


@triton.jit
def largest_of_blocks(bests, seconds, places, tokens, leads, blocks, V, WIDE: tl.constexpr, OVERLAP: tl.constexpr):
    wait(OVERLAP)
    b = tl.arange(0, WIDE)
    at = tl.program_id(0) * blocks + b
    best = tl.load(bests + at, mask=b < blocks, other=float("-inf"))
    second = tl.load(seconds + at, mask=b < blocks, other=float("-inf"))
    is_bad = tl.sum((second != second).to(tl.int32), 0) > 0
    top = tl.max(best, 0)
    winner = tl.min(tl.where(best == top, b, WIDE), 0)  # blocks lie in order, so that the first of equals is the lowest token
    place = tl.min(tl.where(b == winner, tl.load(places + at, mask=b < blocks, other=V), V), 0)
    rest = tl.max(tl.where(b == winner, second, best), 0)
    tl.store(tokens + tl.program_id(0), tl.minimum(place, V - 1))
    tl.store(leads + tl.program_id(0), tl.where(is_bad, float("nan"), top - rest))


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `likeliest_twin`, of float32."""
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    bests, seconds = (logits.new_empty(rows, blocks) for _ in range(2))
    places = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    tokens, leads = torch.empty(rows, dtype=torch.int32, device=logits.device), logits.new_empty(rows)
    largest[(rows, blocks)](logits, bests, seconds, places, vocabulary, blocks, BLOCK=BLOCK, num_warps=8, **launch())
    wide = triton.next_power_of_2(blocks)
    largest_of_blocks[(rows,)](bests, seconds, places, tokens, leads, blocks, vocabulary, WIDE=wide, num_warps=1, **launch())
    return tokens, leads
