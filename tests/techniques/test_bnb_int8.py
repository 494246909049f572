"""LLM.int8() through transformers' loader."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.model import load, reference, save
from infopt.model.bundle import Bundle


def test_weights_are_int8_per_row_and_the_head_is_left(
    make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    import bitsandbytes

    model = build(make("bnb_int8")).model
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)]
    assert len(layers) == 14
    assert type(model.lm_head) is torch.nn.Linear
    layer, before = model.model.layers[0].mlp.up_proj, tiny_bundle.model.model.layers[0].mlp.up_proj.weight
    assert layer.weight.dtype == torch.int8
    scale = before.abs().amax(1, keepdim=True) / 127
    assert (layer.weight.data.float() - before / scale).abs().max() <= 0.6  # it rounds to float16 first


def test_the_threshold_reaches_the_layers(make: Callable[..., Any], build: Callable[..., Any]) -> None:
    assert build(make("bnb_int8", threshold=2.5)).model.model.layers[0].mlp.up_proj.state.threshold == 2.5


def test_lower_thresholds_are_more_exact(
    make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    exact = logits(tiny_bundle)
    errors = [(logits(build(make("bnb_int8", threshold=t))) - exact).square().sum() for t in (0.5, 6.0)]
    assert errors[0] < errors[1]


def test_it_does_not_write_a_line_per_product(
    make: Callable[..., Any],
    build: Callable[..., Any],
    logits: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    technique = make("bnb_int8")
    save.save(build(technique), tmp_path / "out")
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    bundle = technique.reopen(load.load(reference.parse(str(tmp_path / "out"))))
    caplog.clear()
    logits(bundle)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]
