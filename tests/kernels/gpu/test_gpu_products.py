"""Every product equals its twin: kinds of weights, groups, tails, extremes, and what is fused with it."""

from __future__ import annotations

import pytest
import torch
from ptx import teach

from infopt.kernels.gpu import norm, ops, products
from infopt.kernels.gpu.choices import Asked, Choice, candidates
from infopt.kernels.gpu.products import Behind, Feed
from infopt.kernels.gpu.weight import Weight, dense, float8, integers, plain
from infopt.kernels.packed import rounded

#: Sums in another order; tensor cores round a little sooner than float32 does.
CLOSE = 2e-5 if torch.cuda.is_available() else 2e-6
KINDS = ["float32", "float8", "int8", "int4", "int4 with zeros", "int4 by rows"]


def weight(kind: str, rows: int, inner: int, bias: bool = False, group: int = 32) -> Weight:
    found, beside = torch.randn(rows, inner), torch.randn(rows) if bias else None
    if kind == "float32":
        return plain(found, beside)
    if kind == "float8":
        return float8(found, beside)
    if kind == "int4 by rows":
        q, scales = rounded(found, 4, inner)
        return integers(q, scales, None, 4, None, beside)
    bits = 8 if "int8" in kind else 4
    q, scales = rounded(found, bits, group)
    zeros = torch.randint(-(1 << bits - 1), 1 << bits - 1, scales.shape, dtype=torch.int8) if "zeros" in kind else None
    return integers(q, scales, zeros, bits, group, beside)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def both(
    choice: Choice, x: torch.Tensor, made: Weight, fused: str, device: str, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A product by `choice` and by its twin; where a norm follows, what that makes of it."""
    made, x = made.to(device), x.to(device)
    outputs = made.rows // (2 if fused in ("silu", "gelu") else 1)
    feed = Feed(x)
    if fused == "norm before":  # in parts of any number
        feed = Feed(x, x.float().square().reshape(len(x), 5, -1).sum(2).T.contiguous(), 1e-5)
    behind = Behind(
        {"silu": 0, "gelu": 1}.get(fused),
        torch.randn(len(x), outputs).to(x) if fused in ("residual", "norm behind") else None,
        (torch.rand(outputs) + 0.5).to(x) if fused == "norm behind" else None,
        1e-5,
        dtype,
    )
    found, follows = ops.multiply(choice, feed, made, behind)
    assert found.is_contiguous()
    assert follows.x.is_contiguous()
    wanted, should_follow = products.twin(feed, made, behind)
    if fused == "norm behind":
        assert off(follows.normed(), should_follow.normed()) < (CLOSE if x.dtype == torch.float32 else 2e-3)
    return found, wanted


SLICES, TILES = Choice("slices", 16, 8, 2, 128, 1, 2, 2), Choice("tiles", 64, 16, 4, 128, 2, 2)
VECTOR = Choice("vector", 4, 2, 1)
WAYS = {"vector": VECTOR, "slices": SLICES, "slices of twos": Choice("slices", 32, 16, 1, 64, 1, 2, 4), "tiles": TILES,
        "library": Choice("library")}  # fmt: skip


@pytest.mark.parametrize("fused", ["alone", "norm before", "silu", "gelu", "residual", "norm behind"])
@pytest.mark.parametrize(("way", "kind"), [(way, kind) for way in WAYS for kind in KINDS if way != "vector" or "float" in kind])
def test_a_product_is_its_twin(way: str, kind: str, fused: str, device: str) -> None:
    torch.manual_seed(0)
    made = weight(kind, 96, 160, bias=fused == "residual")  # neither a whole block of rows nor of inputs
    found, wanted = both(WAYS[way], torch.randn(3, 160), made, fused, device)
    assert off(found, wanted) < CLOSE


@pytest.mark.parametrize("kind", ["int4", "int8", "int4 with zeros"])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_groups(kind: str, group: int, device: str) -> None:
    torch.manual_seed(1)
    made = weight(kind, 64, 512, group=group)
    for choice in (SLICES, TILES):
        found, wanted = both(choice, torch.randn(1, 512), made, "alone", device)
        assert off(found, wanted) < CLOSE


@pytest.mark.parametrize("inner", [16, 100, 129, 576])
def test_inputs_that_fill_no_block(inner: int, device: str) -> None:
    """What stands behind a row's last input counts for nothing, whatever it is."""
    torch.manual_seed(2)
    for kind in ("int4", "int8", "float32"):
        made = weight(kind, 64, inner, group=32)
        for choice in (SLICES, WAYS["slices of twos"], TILES):
            found, wanted = both(choice, torch.randn(2, inner), made, "alone", device)
            assert off(found, wanted) < CLOSE, (kind, choice)


@pytest.mark.parametrize("rows", [1, 8, 16, 64])
@pytest.mark.parametrize("kind", ["int4", "float32"])
def test_all_that_is_tried_is_right(kind: str, rows: int, device: str) -> None:
    """Of a weight whose rows fill no block of 128."""
    torch.manual_seed(7)
    made, x = weight(kind, 160, 512, group=128), torch.randn(rows, 512)
    for choice in candidates(Asked(made, rows, torch.float32)):
        found, wanted = both(choice, x, made, "alone", device)
        assert off(found, wanted) < CLOSE, choice


@pytest.mark.parametrize(("rows", "choice"), [
    (1, Choice("vector", 8, 1, 1)), (5, Choice("vector", 2, 4, 2)), (17, TILES), (11, SLICES), (9, WAYS["slices of twos"]),
])  # fmt: skip
def test_numbers_of_rows_that_fill_no_block(rows: int, choice: Choice, device: str) -> None:
    torch.manual_seed(2)
    for fused in ("alone", "norm before", "norm behind"):
        made = weight("float32" if choice.way == "vector" else "int4", 64, 160)
        found, wanted = both(choice, torch.randn(rows, 160), made, fused, device)
        assert off(found, wanted) < CLOSE


@pytest.mark.parametrize("choice", [SLICES, TILES], ids=["slices", "tiles"])
def test_extremes(choice: Choice, device: str) -> None:
    """All integers there are, activations of very different sizes, and an input whose weights are zero."""
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(4, 8).roll(3, 1)
    q[:, 5] = 0
    made = integers(q, torch.full((4, 4), 0.01), None, 4, 32)
    x = torch.randn(2, 128) * torch.logspace(-4, 2, 128)
    x[:, 5] = 1000.0
    found, wanted = both(choice, x, made, "alone", device)
    assert off(found, wanted) < CLOSE
    zeros = both(choice, torch.zeros(1, 128), made, "alone", device)
    assert torch.equal(*(part.cpu() for part in zeros))
    nothing = Feed(torch.zeros(1, 128, device=device), torch.zeros(1, 1, device=device), 1e-6)
    assert not ops.multiply(choice, nothing, made.to(device))[0].any()  # nor is a norm of nothing anything


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", ["slices", "tiles"])
@pytest.mark.parametrize("kind", ["int4", "int8", "int4 with zeros", "int8 with zeros"])
def test_as_a_gpu_multiplies(kind: str, way: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the assembly that only GPUs have. Integers go into products exactly, float32 as three numbers of bfloat16, and sums
    are float32: all that is lost is the result's rounding."""
    if device == "cpu":
        teach(monkeypatch)
        monkeypatch.setattr(products, "_has_asm", lambda x: True)
    torch.manual_seed(3)
    made, x = weight(kind, 64, 160), torch.randn(2, 160).to(dtype)
    for fused in ("alone", "norm before", "norm behind"):
        found, wanted = both(WAYS[way], x, made, fused, device, torch.float32)
        assert off(found, wanted) < CLOSE
    assert both(WAYS[way], x, made, "alone", device)[0].dtype == dtype


def test_the_same_on_every_run(device: str) -> None:
    torch.manual_seed(4)
    made, x = weight("int4", 64, 512).to(device), torch.randn(3, 512, device=device)
    for choice in (Choice("tiles", 64, 16, 4, 128, 4, 2), Choice("slices", 16, 8, 4, 64, 1, 2, 4)):
        assert torch.equal(*(ops.multiply(choice, Feed(x), made)[0] for _ in range(2)))


def test_float8_with_float8(device: str) -> None:
    """Activations are rounded too: to a scale a row."""
    torch.manual_seed(5)
    made, x = weight("float8", 64, 128).to(device), torch.randn(4, 128, device=device).bfloat16()
    found, _ = ops.multiply(Choice("scaled"), Feed(x), made)
    steps = x.float().abs().amax(1, keepdim=True) / 448
    rounded_x = (x.float() / steps).to(torch.float8_e4m3fn).float() * steps
    assert off(found, rounded_x @ dense(made).T) < 5e-3


def test_a_norm_is_its_twin(device: str) -> None:
    torch.manual_seed(6)
    x, gain, residual = (torch.randn(size, device=device) for size in ((3, 100), (100,), (3, 100)))
    for beside in (None, residual):
        assert off(norm.norm(x, gain, 1e-5, beside), norm.norm_twin(x, gain, 1e-5, beside)) < 1e-6


def test_the_likeliest_is_the_first_of_the_largest(device: str) -> None:
    logits = torch.randn(5, 9001)
    logits[1, 8000] = logits[1].max() + 1
    logits[2, 5] = logits[2, 8999] = 9
    logits[3, 4100] = torch.nan
    logits[4] = -torch.inf
    logits[4, 9000] = 0
    tokens, leads = (part.cpu() for part in norm.likeliest(logits.to(device)))
    wanted, wanted_leads = norm.likeliest_twin(logits)
    usual = [0, 1, 2, 4]
    assert tokens[usual].tolist() == wanted[usual].tolist() == [int(logits[0].argmax()), 8000, 5, 9000]
    assert torch.allclose(leads[usual], wanted_leads[usual])
    assert leads[2] == 0
    assert leads[3].isnan()
    assert wanted_leads[3].isnan()
