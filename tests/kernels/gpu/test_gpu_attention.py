"""Attention over pages equals its twin, and the twin equals attention written down plainly."""

from __future__ import annotations

import pytest
import torch
from ptx import teach

from infopt.kernels.gpu.attention import PAGE, Heads, Paged, Where, attention, prompt, twin

SHAPES = {
    "one token": (4, 2, 32, 1, 32, 0, False),
    "several, normed": (6, 2, 64, 3, 64, 0, True),
    "odd head, partly turned, window": (4, 1, 48, 5, 24, 40, True),
    "a head each": (2, 2, 16, 1, 16, 10, False),
    "more queries than a program holds": (8, 1, 128, 9, 128, 0, False),
    "heads as wide as there are": (4, 1, 512, 5, 512, 0, True),
}


def make(
    heads: int, kv_heads: int, dim: int, tokens: int, turning: int, window: int, normed: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, Paged, Where, Heads]:  # fmt: skip
    torch.manual_seed(0)
    rows, pages = 3, 8
    angle = torch.arange(pages * PAGE)[:, None] * torch.rand(turning // 2)[None]
    cos, sin = (part(torch.cat([angle, angle], 1)).contiguous() for part in (torch.cos, torch.sin))
    query_norm, key_norm = (torch.rand(dim) + 0.5 if normed else None for _ in range(2))
    about = Heads(heads, kv_heads, dim, cos, sin, dim**-0.5, window, query_norm, key_norm, 1e-6)
    where = Where(
        torch.randperm(rows * pages).view(rows, pages).int(), torch.tensor([0, 70, 190]).int(),
        torch.tensor([tokens, max(1, tokens - 2), tokens]).int(),
    )  # fmt: skip
    cache = Paged(*(torch.randn(rows * pages, kv_heads, PAGE, dim).to(dtype) for _ in range(2)))
    return torch.randn(rows * tokens, (heads + 2 * kv_heads) * dim).to(dtype), cache, where, about


def moved(cache: Paged, where: Where, about: Heads, device: str) -> tuple[Paged, Where, Heads]:
    from dataclasses import replace

    tensors = {name: part.to(device) for name, part in vars(about).items() if isinstance(part, torch.Tensor)}
    parts = (where.tables, where.lengths, where.counts)
    return (
        Paged(cache.keys.clone().to(device), cache.values.clone().to(device)), Where(*(part.to(device) for part in parts)),
        replace(about, **tensors),
    )  # fmt: skip


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_its_twin(
    name: str, dtype: torch.dtype, splits: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if device == "cpu":
        teach(monkeypatch)
    qkv, cache, where, about = make(*SHAPES[name], dtype)
    wanted_cache = Paged(cache.keys.clone(), cache.values.clone())
    wanted = twin(qkv, wanted_cache, where, about)
    cache, there, heads = moved(cache, where, about, device)
    found = attention(qkv.to(device), cache, there, heads, splits=splits).cpu()
    tokens = len(qkv) // 3
    counted = torch.cat([torch.arange(row * tokens, row * tokens + int(n)) for row, n in enumerate(where.counts)])
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert float((found[counted] - wanted[counted]).float().norm() / wanted[counted].float().norm()) < limit
    for side in ("keys", "values"):  # the new ones are where they belong, and all else is as it was
        assert torch.allclose(getattr(cache, side).cpu(), getattr(wanted_cache, side), atol=limit, rtol=limit)


def test_a_sequence_does_not_see_another(device: str) -> None:
    qkv, cache, where, about = make(*SHAPES["one token"], torch.float32)
    first = attention(qkv.to(device), *moved(cache, where, about, device), splits=4).cpu()
    changed = Paged(cache.keys.clone(), cache.values.clone())
    others = where.tables[1].long()
    changed.keys[others], changed.values[others] = 7.0, torch.nan
    second = attention(qkv.to(device), *moved(changed, where, about, device), splits=4).cpu()
    assert torch.equal(first[[0, 2]], second[[0, 2]])


def test_the_twin_is_attention_written_down() -> None:
    heads, kv_heads, dim, count = 4, 2, 16, 90
    qkv, cache, where, about = make(heads, kv_heads, dim, count, dim, 0, False, torch.float32)
    found = prompt(qkv[:count], cache, where.tables[0], 0, about)
    split = qkv[:count].view(count, heads + 2 * kv_heads, dim)
    half = dim // 2
    turned = torch.cat([-split[..., half:], split[..., :half]], -1) * about.sin[:count, None] + split * about.cos[:count, None]
    for head in range(heads):
        key, value = turned[:, heads + head // 2], split[:, heads + kv_heads + head // 2]
        scores = (turned[:, head] @ key.T * about.scale).masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
        assert torch.allclose(found[:, head * dim : (head + 1) * dim], scores.softmax(-1) @ value, atol=1e-5)


def test_a_prompt_in_two_parts_is_the_prompt() -> None:
    for window in (0, 50):
        qkv, cache, where, about = make(4, 2, 16, 150, 16, window, True, torch.float32)
        whole = prompt(qkv[:150], cache, where.tables[0], 0, about)
        parts = [prompt(qkv[:100], cache, where.tables[1], 0, about), prompt(qkv[100:150], cache, where.tables[1], 100, about)]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
