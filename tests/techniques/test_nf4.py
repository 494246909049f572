"""NF4 against the paper's levels, and through transformers' loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infopt.errors import InputError
from infopt.model import save
from infopt.model.bundle import Bundle

#: QLoRA (arXiv 2305.14314), appendix E.
LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def dequantized(bundle: Bundle) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = bundle.model.model.layers[0].mlp.up_proj.weight
    found: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found


def test_weights_take_the_nearest_level_of_their_block(
    make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    before = tiny_bundle.model.model.layers[0].mlp.up_proj.weight.view(-1, 64)
    peak = before.abs().amax(1, keepdim=True)
    nearest = ((before / peak)[..., None] - LEVELS).abs().argmin(-1)
    expected = LEVELS[nearest] * peak
    after = dequantized(build(make("nf4", double_quant=False))).float().view(-1, 64)
    assert torch.isclose(after, expected, rtol=1e-3, atol=1e-6).float().mean() > 0.999


def test_double_quantization_moves_scales_a_little(make: Callable[..., Any], build: Callable[..., Any]) -> None:
    single, double = (dequantized(build(make("nf4", double_quant=flag))) for flag in (False, True))
    assert not torch.equal(single, double)
    assert (single - double).norm() < 0.02 * single.norm()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_options_reach_the_layers_and_the_head_is_left(
    kind: str, compute: str, make: Callable[..., Any], build: Callable[..., Any]
) -> None:
    model = build(make("nf4", quant_type=kind, compute_dtype=compute)).model
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_type == kind
    assert layer.compute_dtype == getattr(torch, compute)
    assert type(model.lm_head) is torch.nn.Linear


def test_nf4_fits_normal_weights_better_than_fp4(
    make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    before = tiny_bundle.model.model.layers[0].mlp.up_proj.weight
    error = {kind: (dequantized(build(make("nf4", quant_type=kind))) - before).square().sum() for kind in ("nf4", "fp4")}
    assert error["nf4"] < error["fp4"]


def test_steps_after_it_that_quantize_are_refused(make: Callable[..., Any], build: Callable[..., Any]) -> None:
    from infopt.protocols import Context

    with pytest.raises(InputError, match="quantized already"):
        make("rtn").apply(build(make("nf4")), Context())


def test_it_saves_with_its_own_format(make: Callable[..., Any], build: Callable[..., Any], tmp_path: Any) -> None:
    import json

    save.save(build(make("nf4")), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["bnb_4bit_quant_type"] == "nf4"
    assert config["bnb_4bit_use_double_quant"] is True
