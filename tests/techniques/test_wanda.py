"""Wanda against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stub_techniques import CALIBRATION

from infopt.model import load, reference
from infopt.protocols import Context

Make = Callable[..., Any]


def test_wanda_is_its_definition_on_the_first_layer(make: Make) -> None:
    bundle = load.load(reference.parse("tiny"))
    before = bundle.model.model.layers[0].self_attn.k_proj.weight.clone()
    seen: list[torch.Tensor] = []
    hook = bundle.model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda layer, x, y: seen.append(x[0][0]))
    for ids in CALIBRATION:
        bundle.model(input_ids=torch.tensor([ids]), use_cache=False)
    hook.remove()
    scores = before.double().abs() * torch.cat(seen).double().norm(dim=0)
    after = (
        make("wanda", sparsity=0.25)
        .apply(bundle, Context(calibration_ids=CALIBRATION))
        .model.model.layers[0]
        .self_attn.k_proj.weight
    )
    count = before.shape[1] // 4
    assert ((after == 0).sum(1) == count).all()
    assert torch.equal(after[after != 0], before[after != 0])
    lowest = scores.sort(dim=1).values[:, count]
    assert (scores[after == 0].view(len(before), count) <= lowest[:, None] * (1 + 1e-2)).all()
