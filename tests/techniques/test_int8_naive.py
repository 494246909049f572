"""torch's dynamic int8: applied where it says, and ruinous for a model with outliers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infopt import pipeline, recipe, techniques
from infopt.errors import MissingNeedError
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.protocols import Shapes


def quantized(bundle: Bundle) -> set[str]:
    return {name for name, module in bundle.model.named_modules() if type(module).__module__.startswith("torch.ao.nn.quantized")}


@pytest.mark.parametrize("head", [True, False])
def test_every_linear_layer_and_perhaps_the_head(head: bool, make: Callable[..., Any], build: Callable[..., Any]) -> None:
    names = {name for name in quantized(build(make("int8_naive", head=head))) if "_packed_params" not in name}
    assert len(names) == 14 + head
    assert ("lm_head" in names) is head


def test_weights_have_one_scale_per_tensor(make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    weight = build(make("int8_naive")).model.model.layers[0].mlp.up_proj.weight()
    assert weight.qscheme() == torch.per_tensor_affine
    before = tiny_bundle.model.model.layers[0].mlp.up_proj.weight
    assert (weight.dequantize() - before).abs().max() <= before.abs().max() / 127


def test_runs_in_float32_on_the_cpu_whatever_was_stored(make: Callable[..., Any], tiny_bundle: Bundle) -> None:
    from infopt.protocols import Context

    assert make("int8_naive").plan(LoadPlan(dtype="bfloat16")).dtype == "float32"
    tiny_bundle.model.to(torch.bfloat16)
    bundle = make("int8_naive").apply(tiny_bundle, Context())
    assert bundle.model(torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32
    chosen = recipe.load("int8_naive", techniques.find)
    shapes = Shapes("tiny", 2, 64, 4, 2, 16, 320, 512, {}, None, True, 320 * 64, 64)
    with pytest.raises(MissingNeedError, match=r"steps\[0\]\.int8_naive: runs on the CPU only"):
        pipeline.build_techniques(chosen, shapes, "cuda")
    assert pipeline.build_techniques(chosen, shapes, "cpu")


def test_packed_weights_are_counted(make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    linear = sum(m.weight.numel() for m in tiny_bundle.model.modules() if isinstance(m, torch.nn.Linear))
    kept = tiny_bundle.resident_bytes() - 4 * (linear - 320 * 64)
    held = build(make("int8_naive")).resident_bytes()
    assert linear <= held - kept <= 1.1 * linear


def test_the_demo_model_is_ruined(
    make: Callable[..., Any], build: Callable[..., Any], demo_quality: Callable[[Bundle], float]
) -> None:
    assert demo_quality(build(make("int8_naive"), "demo")) > 2
