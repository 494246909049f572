"""torchao: the layers it makes, their files, and configs that the device at hand cannot run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.errors import InputError
from infopt.model import load, reference, save
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan

pytest.importorskip("torchao")
HERE = pytest.mark.parametrize("config", ["int8", "int8_dynamic", "float8"])


@HERE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_are_torchaos_and_reload(
    config: str, dtype: str, make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = build(make("torchao", config=config), dtype=dtype)
    weight = bundle.model.model.layers[0].mlp.up_proj.weight
    assert type(weight).__module__.startswith("torchao")
    assert type(bundle.model.lm_head.weight) is torch.nn.Parameter
    save.save(bundle, tmp_path / "out")
    plain = load.load(reference.parse(str(tmp_path / "out")), LoadPlan(is_plain=True))
    assert torch.equal(logits(plain), logits(bundle))


def test_int8_is_rounded_to_nearest_per_row(make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle) -> None:
    before = tiny_bundle.model.model.layers[0].mlp.up_proj.weight.detach()
    after = build(make("torchao")).model.model.layers[0].mlp.up_proj.weight.dequantize()
    step = before.abs().amax(1, keepdim=True) / 127
    assert ((after - before).abs() <= 0.51 * step).all()
    assert not torch.equal(after, before)


def test_rounding_activations_costs_more(
    make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    exact = logits(tiny_bundle)
    weights, both = ((logits(build(make("torchao", config=c))) - exact).norm() for c in ("int8", "int8_dynamic"))
    assert weights < both


def test_what_does_not_run_here_is_refused_before_weights_are_read(make: Callable[..., Any]) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        pytest.skip("this device runs every config")
    with pytest.raises(InputError, match=r"^torchao's float8_dynamic does not run on cpu in float32: ") as caught:
        make("torchao", config="float8_dynamic").plan(LoadPlan(dtype="float32"))
    assert caught.value.hint == "config: int8 or int8_dynamic or float8"


def test_a_wrong_product_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao import quantization

    from infopt.techniques import torchao

    def broken(layer: Any, config: Any) -> None:
        layer.weight.data = -layer.weight.data

    monkeypatch.setattr(quantization, "quantize_", broken)
    assert torchao.failure.__wrapped__("int8", "cpu", "float32") == "its product is off by 200%"
