"""Attention of few new tokens of each sequence over keys and values in pages.

The query heads of a key and value head are rows of one tile, so that no key is read twice; positions are split among programs,
so that one sequence keeps a whole GPU busy, and what they found is put together by a second launch. The new tokens' keys and
values take their rotary turn, are used and are stored in the same launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from infopt.kernels.gpu.norm import normed
from infopt.kernels.gpu.overlap import launch, wait

#: Positions of a page.
PAGE = 64
#: Numbers of queries that a program holds.
MOST_QUERIES = 64 * 128


@dataclass(frozen=True)
class Heads:
    """What of a layer's attention does not change: sizes, norms of heads [head_dim] or None, rotary tables float32
    [positions, rotary_dim], scale of the scores, and how many positions it reaches back (0: all)."""

    heads: int
    kv_heads: int
    head_dim: int
    cos: torch.Tensor
    sin: torch.Tensor
    scale: float
    window: int = 0
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Paged:
    """Keys and values of a layer, [pages, kv_heads, PAGE, head_dim] each."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Where:
    """Of each sequence, int32: its pages [sequences, most], how many positions are cached [sequences], and how many of its new
    tokens count [sequences], the others being there because all have room for as many."""

    tables: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor


def twin(qkv: torch.Tensor, cache: Paged, where: Where, heads: Heads) -> torch.Tensor:
    """`qkv` [sequences · tokens, (heads + 2 kv_heads) · head_dim] → [sequences · tokens, heads · head_dim], of tokens that count.

    The new tokens' keys and values are written behind those that are cached.
    """
    out = qkv.new_zeros(len(qkv), heads.heads * heads.head_dim)
    tokens = len(qkv) // len(where.lengths)
    for row, (length, count) in enumerate(zip(where.lengths.tolist(), where.counts.tolist(), strict=True)):
        part = slice(row * tokens, row * tokens + count)
        out[part] = prompt(qkv[part], cache, where.tables[row], length, heads)
    return out


def prompt(qkv: torch.Tensor, cache: Paged, table: torch.Tensor, length: int, heads: Heads) -> torch.Tensor:
    """The same for one sequence with any number of new tokens: by torch's attention."""
    count = len(qkv)
    position = torch.arange(length, length + count, device=qkv.device)
    split = qkv.view(count, -1, heads.head_dim)
    query, key, value = split.split([heads.heads, heads.kv_heads, heads.kv_heads], 1)
    dtype = cache.keys.dtype
    query = turned(query, heads.query_norm, heads, position).to(dtype).transpose(0, 1)
    key, value = turned(key, heads.key_norm, heads, position).to(dtype), value.to(dtype)
    page, slot = table[position // PAGE].long(), position % PAGE
    cache.keys[page, :, slot], cache.values[page, :, slot] = key, value
    is_plain = length == 0 and (heads.window == 0 or count <= heads.window)
    if is_plain:
        keys, values, mask = key.transpose(0, 1), value.transpose(0, 1), None
    else:
        pages, total = table[: -(-(length + count) // PAGE)].long(), length + count
        keys, values = (part[pages].transpose(0, 1).flatten(1, 2)[:, :total] for part in (cache.keys, cache.values))
        behind = position[:, None] - torch.arange(total, device=qkv.device)
        mask = (behind >= 0) & ((behind < heads.window) if heads.window else True)
    found = torch.nn.functional.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=is_plain, scale=heads.scale,
        enable_gqa=heads.group > 1,
    )  # fmt: skip
    return found[0].transpose(0, 1).reshape(count, -1).to(qkv.dtype)


def turned(x: torch.Tensor, gain: torch.Tensor | None, heads: Heads, position: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, heads, head_dim]: normed where there is a gain, then turned by its position (arXiv 2104.09864)."""
    wide = x.float() if gain is None else normed(x, gain, heads.epsilon)
    cos, sin = heads.cos[position][:, None], heads.sin[position][:, None]
    turning, rest = wide[..., : cos.shape[-1]], wide[..., cos.shape[-1] :]
    first, second = turning.chunk(2, -1)
    return torch.cat([turning * cos + torch.cat([-second, first], -1) * sin, rest], -1)


@triton.jit
def _turned(x, cos, sin, gain, position, inside, D: tl.constexpr, BD: tl.constexpr, TURNING: tl.constexpr, NORM: tl.constexpr,
            epsilon):  # fmt: skip
    """Heads at pointers `x` [n, 1], normed and turned by `position` [n]: float32 [n, BD]."""
    d = tl.arange(0, BD)[None, :]
    HALF: tl.constexpr = TURNING // 2
    other = tl.where(d < HALF, d + HALF, tl.where(d < TURNING, d - HALF, d))
    mask = inside[:, None] & (d < D)
    own = tl.load(x + d, mask=mask, other=0).to(tl.float32)
    across = tl.load(x + other, mask=mask, other=0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(own * own, 1) / D + epsilon)[:, None]
        own *= scale * tl.load(gain + d, mask=d < D, other=0).to(tl.float32)
        across *= scale * tl.load(gain + other, mask=d < D, other=0).to(tl.float32)
    at = position[:, None] * TURNING + d
    turns = inside[:, None] & (d < TURNING)
    c = tl.load(cos + at, mask=turns, other=1.0)
    s = tl.load(sin + at, mask=turns, other=0.0)
    return own * c + tl.where(d < HALF, -across, across) * s


@triton.jit
def _attend(query, key, value, allowed, best, total, found, scale, EXACT: tl.constexpr):
    """One tile of positions more: `query` [BM, BD], `key` and `value` [n, BD], `allowed` [BM, n]; sums scaled by 2^−best."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee" if EXACT else "tf32") * scale
    scores = tl.where(allowed, scores, float("-inf"))
    new = tl.maximum(best, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - safe[:, None])
    fading = tl.exp2(best - safe)
    total = total * fading + tl.sum(weights, 1)
    found = found * fading[:, None]
    found = tl.dot(weights.to(value.dtype), value, found, input_precision="ieee" if EXACT else "tf32")
    return new, total, found


@triton.jit
def attend(qkv, keys, values, tables, lengths, counts, cos, sin, query_norm, key_norm, out, parts, bests, totals, pages, scale,
           epsilon, T: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
           BT: tl.constexpr, TURNING: tl.constexpr, QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr, WINDOW: tl.constexpr,
           TILES: tl.constexpr, SPLITS: tl.constexpr, PAGE: tl.constexpr, EXACT: tl.constexpr,
           OVERLAP: tl.constexpr):  # fmt: skip
    """Program (sequence and BM of its queries, key and value head, split). The last split has the new tokens, too."""
    wait(OVERLAP)
    r, tile, h, split = tl.program_id(0) // TILES, tl.program_id(0) % TILES, tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // KV
    WIDTH: tl.constexpr = (H + 2 * KV) * D
    length, fresh_tokens = tl.load(lengths + r), tl.load(counts + r)
    i = tile * BM + tl.arange(0, BM)
    token, d = i // G, tl.arange(0, BD)
    asks = i < T * G
    at = qkv + ((r * T + token) * WIDTH + (h * G + i % G) * D)[:, None]
    query = _turned(at, cos, sin, query_norm, length + token, asks, D, BD, TURNING, QUERY_NORM, epsilon).to(keys.dtype.element_ty)
    best, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    found = tl.zeros([BM, BD], tl.float32)
    first = tl.maximum(length - WINDOW + 1, 0) // PAGE if WINDOW > 0 else 0
    count = tl.cdiv(length, PAGE) - first
    each = tl.cdiv(count, SPLITS)
    slot = tl.arange(0, PAGE)
    for index in range(first + split * each, first + tl.minimum((split + 1) * each, count)):
        page = tl.load(tables + r * pages + index).to(tl.int64)
        position = index * PAGE + slot
        place = ((page * KV + h) * PAGE + slot[:, None]) * D + d[None, :]
        cached = (position[:, None] < length) & (d[None, :] < D)
        key = tl.load(keys + place, mask=cached, other=0.0)
        value = tl.load(values + place, mask=cached, other=0.0)
        allowed = asks[:, None] & (position[None, :] < length)
        if WINDOW > 0:
            allowed = allowed & (position[None, :] > length + token[:, None] - WINDOW)
        best, total, found = _attend(query, key, value, allowed, best, total, found, scale, EXACT)
    if split == SPLITS - 1:
        t = tl.arange(0, BT)
        new = t < fresh_tokens
        fresh = qkv + ((r * T + t) * WIDTH + (H + h) * D)[:, None]
        new_key = _turned(fresh, cos, sin, key_norm, length + t, new, D, BD, TURNING, KEY_NORM, epsilon).to(keys.dtype.element_ty)
        stored = new[:, None] & (d[None, :] < D)
        new_value = tl.load(fresh + KV * D + d[None, :], mask=stored, other=0.0).to(keys.dtype.element_ty)
        own = tl.load(tables + r * pages + (length + t) // PAGE, mask=new, other=0).to(tl.int64)
        to = ((own * KV + h) * PAGE + (length + t) % PAGE)[:, None] * D + d[None, :]
        if tile == 0:
            tl.store(keys + to, new_key, mask=stored)
            tl.store(values + to, new_value, mask=stored)
        behind = token[:, None] - t[None, :]
        seen = asks[:, None] & new[None, :] & (behind >= 0)
        if WINDOW > 0:
            seen = seen & (behind < WINDOW)
        best, total, found = _attend(query, new_key, new_value, seen, best, total, found, scale, EXACT)
    if SPLITS == 1:
        answer = ((r * T + token) * H + h * G + i % G)[:, None] * D + d[None, :]
        found = found / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + answer, found.to(out.dtype.element_ty), mask=asks[:, None] & (d[None, :] < D))
    else:
        row = ((r * KV + h) * SPLITS + split) * (TILES * BM) + i
        tl.store(parts + row[:, None] * BD + d[None, :], found)
        tl.store(bests + row, best)
        tl.store(totals + row, total)


@triton.jit
def gather(parts, bests, totals, out, T: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
           BM: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """What the splits found of one query head of one token, program (sequence, key and value head, row of the tile)."""
    wait(OVERLAP)
    r, h, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // KV
    d = tl.arange(0, BD)
    row = ((r * KV + h) * SPLITS + tl.arange(0, SPLITS)) * (TILES * BM) + i
    best = tl.load(bests + row)
    share = tl.exp2(best - tl.max(best, 0))
    total = tl.sum(share * tl.load(totals + row), 0)
    found = tl.sum(share[:, None] * tl.load(parts + row[:, None] * BD + d[None, :]), 0) / total
    to = ((r * T + i // G) * H + h * G + i % G) * D + d
    tl.store(out + to, found.to(out.dtype.element_ty), mask=d < D)


def attention(qkv: torch.Tensor, cache: Paged, where: Where, heads: Heads, *, splits: int) -> torch.Tensor:
    """As `twin`, with positions in `splits` parts, a power of two."""
    rows = len(where.lengths)
    tokens = len(qkv) // rows
    wide, queries = triton.next_power_of_2(heads.head_dim), tokens * heads.group
    tile = max(16, min(triton.next_power_of_2(queries), MOST_QUERIES // wide))
    tiles = -(-queries // tile)
    # Registers: heads of 128 numbers that are normed, or 64 rows of them, do not fit into four warps.
    is_large = wide * tile >= MOST_QUERIES or (heads.query_norm is not None and wide >= 128)
    out = qkv.new_empty(len(qkv), heads.heads * heads.head_dim)
    shape = rows, heads.kv_heads, splits, tiles * tile
    parts, bests, totals = (
        (torch.empty(size, device=qkv.device) for size in ((*shape, wide), shape, shape)) if splits > 1 else (None, None, None)
    )
    sizes: dict[str, Any] = {
        "T": tokens, "H": heads.heads, "KV": heads.kv_heads, "D": heads.head_dim, "BD": wide, "BM": tile,
        "TILES": tiles, "SPLITS": splits, **launch(),
    }  # fmt: skip
    attend[(rows * tiles, heads.kv_heads, splits)](
        qkv, cache.keys, cache.values, where.tables, where.lengths, where.counts, heads.cos, heads.sin, heads.query_norm,
        heads.key_norm, out, parts, bests, totals, where.tables.shape[1], heads.scale * 1.4426950408889634, heads.epsilon,
        BT=max(16, triton.next_power_of_2(tokens)), TURNING=heads.cos.shape[1], QUERY_NORM=heads.query_norm is not None,
        KEY_NORM=heads.key_norm is not None, WINDOW=heads.window, PAGE=PAGE, EXACT=cache.keys.dtype == torch.float32,
        num_warps=8 if is_large else 4, num_stages=2, **sizes,
    )  # fmt: skip
    if splits > 1:
        gather[(rows, heads.kv_heads, tokens * heads.group)](parts, bests, totals, out, num_warps=1, **sizes)
    return out
