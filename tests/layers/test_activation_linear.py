"""Rounded inputs: by hand, in float64, and bit for bit as compressed-tensors rounds them after a reload."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infopt.layers import activation_linear, packing, small_floats
from infopt.layers.activation_linear import ActivationLinear
from infopt.layers.grid import Grid

GRIDS = {
    "int": Grid(8, activations="token"),
    "zero point": Grid(8, activations="token_asymmetric"),
    "fp8": Grid(8, kind="fp8", activations="token"),
    "mxfp4": Grid(4, 32, kind="mxfp4", activations="group"),
    "nvfp4": Grid(4, 16, kind="nvfp4", activations="group"),
}
kinds = pytest.mark.parametrize("kind", GRIDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "zero point":
        return activation_linear.round_tokens_asymmetric(x)
    if kind in ("int", "fp8"):
        return activation_linear.round_tokens(x, kind)  # type: ignore[arg-type]
    return activation_linear.round_groups(x, small_floats.global_scale(x) if kind == "nvfp4" else None)


@kinds
@dtypes
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_it_is_what_compressed_tensors_computes(kind: str, dtype: torch.dtype, seed: int, size: float) -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed)).mul(size)
    x[0, 0], x[1, 2, :32] = 0, 0
    x[0, 1], x[1, 1] = x[0, 1].abs(), -x[1, 1].abs()
    x = x.to(dtype)
    layer = nn.Linear(64, 8)
    layer.quantization_scheme = packing.scheme(GRIDS[kind])
    layer.quantization_status = QuantizationStatus.FROZEN  # type: ignore[assignment]
    if kind == "nvfp4":
        layer.input_global_scale = small_floats.global_scale(x)  # type: ignore[assignment]
    expected = forward_quantize(layer, x, "input", layer.quantization_scheme.input_activations)
    found = rounded(x, kind)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_int8_per_token_by_hand() -> None:
    x = torch.tensor([[[127.5, 1.2, -63.4, 0.4], [0.0, 0.0, 0.0, 0.0]]])
    # The scale is 127.5 / 127.5 = 1, the largest value clips to 127.
    assert rounded(x, "int").tolist() == [[[127.0, 1.0, -63.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]


def test_a_zero_point_per_token_by_hand() -> None:
    x = torch.tensor([[[-10.2, 244.8, 1.2, 0.0], [3.0, 255.0, 254.4, 40.4], [0.0, 0.0, 0.0, 0.0]]])
    # Steps of 1: −128 stands for −10 and 127 for 245; a token without negative numbers has its 0 at −128.
    assert rounded(x, "zero point").tolist() == [[[-10.0, 245.0, 1.0, 0.0], [3.0, 255.0, 254.0, 40.0], [0.0] * 4]]


def test_a_zero_point_spends_no_numbers_on_what_does_not_occur() -> None:
    x = torch.rand(3, 64, generator=torch.Generator().manual_seed(4)) - 0.1
    errors = [float((rounded(x, kind) - x).square().mean()) for kind in ("zero point", "int")]
    assert errors[0] < 0.5 * errors[1]


def test_fp8_per_token_by_hand() -> None:
    x = torch.tensor([[448.0, 17.0, 0.3]])
    assert torch.equal(rounded(x, "fp8"), torch.tensor([[448.0, 16.0, 0.3125]]))


@kinds
def test_it_stays_near_the_input(kind: str) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    error = float((rounded(x, kind) - x).norm() / x.norm())
    assert 0 < error < {"int": 0.01, "zero point": 0.01, "fp8": 0.04, "mxfp4": 0.15, "nvfp4": 0.12}[kind]


def test_tokens_do_not_see_each_other() -> None:
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    loud = x.clone()
    loud[0, 1] *= 1000
    assert torch.equal(rounded(loud, "int")[0, [0, 2, 3]], rounded(x, "int")[0, [0, 2, 3]])


@kinds
def test_the_layer_multiplies_what_it_rounds(kind: str) -> None:
    linear = nn.Linear(64, 8)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2))
    overall = small_floats.global_scale(x) if kind == "nvfp4" else None
    is_symmetric = kind != "zero point"
    layer = ActivationLinear(linear, GRIDS[kind].kind, overall, is_symmetric=is_symmetric)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    expected = rounded(x, kind).double() @ linear.weight.double().T + linear.bias.double()
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert f"inputs rounded to {GRIDS[kind].kind}{'' if is_symmetric else ' with a zero point'}" in repr(layer)


def test_only_named_layers_are_swapped() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    weight = model[1].weight
    packing.activate(model, {"1": {}}, Grid(8))
    assert type(model[1]) is nn.Linear
    packing.activate(model, {"1": {}}, GRIDS["int"])
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1], ActivationLinear)
    assert model[1].weight is weight
