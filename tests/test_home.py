"""Where the weights lie while steps change them: a model larger than the device's memory is made from the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stub_techniques import chosen

from infopt import host, optimize, pipeline
from infopt.artifact import LoadBack
from infopt.measure import memory
from infopt.model import load, reference, shapes
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.protocols import Context
from infopt.settings import LoadOptions
from infopt.techniques.base import Technique
from infopt.techniques.gptq import Gptq

FROM_THE_HOST: list[list[Any]] = [
    [{"gptq": {"group_size": 32}}],
    [{"awq": {"group_size": 32}}],
    ["smoothquant", {"gptq": {"bits": 8, "group_size": None, "activations": "token"}}],
    [{"mixed": {"group_size": 32}}],
    [{"nvfp4": {"activations": "group"}}],
    [{"gptq": {"group_size": 32}}, "kv_cache"],
]
ON_THE_DEVICE: list[list[Any]] = [
    [],
    [{"rtn": {"group_size": 32}}],
    ["nvfp4"],
    ["smoothquant", {"rtn": {"group_size": 32}}],
    [{"gptq": {"group_size": 32}}, "int8_naive"],
]


class Loaded(Exception):  # noqa: N818 - ends the run where the test has seen enough
    pass


@pytest.mark.parametrize(
    ("steps", "home"), [(steps, "cpu") for steps in FROM_THE_HOST] + [(steps, "cuda") for steps in ON_THE_DEVICE]
)
def test_weights_are_loaded_where_every_step_can_do_with_them(
    steps: list[Any], home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[LoadPlan] = []

    def stop(ref: Any, plan: LoadPlan, *more: Any) -> Bundle:
        plans.append(plan)
        raise Loaded

    monkeypatch.setattr(pipeline, "missing_need", lambda needs, device: None)
    monkeypatch.setattr(load, "load", stop)
    own = chosen(*steps, calibration={"samples": 4, "tokens": 64})
    with pytest.raises(Loaded):
        pipeline.build(reference.parse("tiny"), own, "cuda", options=LoadOptions())
    assert [plan.device for plan in plans] == [home]


def test_attention_that_only_the_device_has_keeps_the_model_there() -> None:
    for attention, home in (("auto", "cpu"), ("sdpa", "cpu"), ("flash_attention_2", "cuda")):
        own = chosen({"gptq": {"group_size": 32}}, engine={"attention": attention})
        found = pipeline.build_techniques(own, shapes.shapes(reference.parse("tiny")))
        assert pipeline.home(own, found, "cuda") == home


def test_what_was_made_on_the_host_is_checked_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The steps themselves get the device that was asked for."""
    asked, devices = list[str](), list[str]()
    opened = load.load

    def watched(ref: Any, plan: LoadPlan | None = None, *more: Any) -> Bundle:
        devices.append((plan or LoadPlan()).device)
        return opened(ref, plan, *more)

    def apply(self: Technique, bundle: Bundle, context: Context) -> Bundle:
        asked.append(context.device)
        return bundle

    monkeypatch.setattr(Gptq, "apply", apply)
    monkeypatch.setattr(load, "load", watched)
    monkeypatch.setattr(memory, "reset_peak", lambda device: None)
    monkeypatch.setattr(memory, "peak_bytes", lambda device: None)
    monkeypatch.setattr(host, "device_name", lambda asked: "cuda")
    own = chosen({"gptq": {"group_size": 32}}, calibration={"samples": 4, "tokens": 64})
    checks: tuple[LoadBack, ...] = optimize.optimize("tiny", own, tmp_path / "out", LoadOptions()).load_back
    assert asked == ["cuda"]
    assert devices == ["cpu", "cpu", "cpu"], "loaded, opened by plain transformers, opened by infopt"
    assert all(check.max_abs_logit_difference == 0 for check in checks)
