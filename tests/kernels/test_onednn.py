"""float32 products through oneDNN: the same numbers, and nothing else touched."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from infopt.kernels import onednn
from infopt.kernels.onednn import OneDnn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (1, 1, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_float32_ones(shape: tuple[int, ...], bias: bool) -> None:
    layer = torch.nn.Linear(48, 32, bias=bias).requires_grad_(False)
    x = torch.randn(shape)
    exact = linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with patch.object(onednn, "_linear", wraps=onednn._linear) as taken, OneDnn():
        y = layer(x)
    assert taken.call_count == 1
    assert y.shape == exact.shape
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)  # bfloat16 operands would be off by 1e-3


def test_views_are_read_as_they_lie() -> None:
    x, weight = torch.randn(6, 40)[:, ::2], torch.randn(20, 9).T
    with OneDnn():
        y = linear(x, weight)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)),
        (torch.randn(3, 8).bfloat16(), torch.randn(4, 8).bfloat16()),
        (torch.randn(0, 8), torch.randn(4, 8)),
        (torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)),
    ],
    ids=["float64", "bfloat16", "empty", "a gradient is asked for"],
)
def test_everything_else_goes_where_it_went(x: torch.Tensor, weight: torch.Tensor) -> None:
    with patch.object(onednn, "_linear", side_effect=AssertionError), OneDnn():
        y = linear(x, weight)
    torch.testing.assert_close(y, linear(x, weight))
    assert y.requires_grad == weight.requires_grad


def test_outside_nothing_is_intercepted() -> None:
    with OneDnn():
        pass
    with patch.object(onednn, "_linear", side_effect=AssertionError):
        linear(torch.randn(3, 8), torch.randn(4, 8))


@pytest.mark.skipif(not onednn._has_tiles(), reason="this processor has no bfloat16 tiles")
def test_operands_are_rounded_where_that_is_allowed_and_only_there() -> None:
    x, weight = torch.randn(40, 64), torch.randn(32, 64)
    exact, rounded = linear(x.double(), weight.double()), linear(x.bfloat16().double(), weight.bfloat16().double())
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with OneDnn(rounded=True):
        y = linear(x, weight)
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    torch.testing.assert_close(y.double(), rounded, rtol=1e-5, atol=1e-5)
    assert (y - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 products here")
@pytest.mark.parametrize("bias", [True, False])
def test_results_are_rounded_where_that_is_allowed_and_the_innermost_mode_decides(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_has_tiles", lambda: False)
    monkeypatch.setattr(onednn, "_has_vectors", lambda: True)
    layer = torch.nn.Linear(64, 32, bias=bias).requires_grad_(False)
    x = torch.randn(40, 64)
    exact = linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with OneDnn(rounded=True, results=True):
        rounded = layer(x)
        with OneDnn(rounded=True):
            inner = layer(x)
    with OneDnn(results=True):  # nothing was said of operands
        unasked = layer(x)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert 1e-4 * exact.norm() < (rounded - exact).norm() < 1e-2 * exact.norm()
    for found in (inner, unasked):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounded", [True, False])
def test_attention_is_what_it_was(rounded: bool) -> None:
    q, k, v = torch.randn(3, 1, 4, 20, 16)
    mask = torch.zeros(20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    plain = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with OneDnn(rounded=rounded):
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        causal = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert y.dtype == torch.float32
    for found in (y, causal):
        assert (found - plain).norm() < 1e-2 * plain.norm()


@pytest.mark.parametrize("rounded", [True, False])
def test_a_row_that_sees_nothing_is_what_it_was(rounded: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    mask = torch.zeros(5, 5)
    mask[2] = torch.finfo(torch.float32).min
    plain = scaled_dot_product_attention(q, k, v, mask)
    with OneDnn(rounded=rounded):
        y = scaled_dot_product_attention(q, k, v, mask)
        named = scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)
    assert (y - plain).norm() < 1e-2 * plain.norm()
    torch.testing.assert_close(named, plain)
