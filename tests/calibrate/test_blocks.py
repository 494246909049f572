"""The layer-by-layer runner: what each block sees, in which order, and what an interrupted run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from stub_techniques import CALIBRATION
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from infopt.calibrate import blocks, calls
from infopt.calibrate.blocks import Block
from infopt.calibrate.hessian import Hessian
from infopt.errors import InputError
from infopt.model import load, reference
from infopt.model.bundle import Bundle
from infopt.protocols import Context

KINDS = ("tiny", "tiny-qwen2", "tiny-gemma3")
CONTEXT = Context(calibration_ids=CALIBRATION)
IGNORE = ("lm_head",)


def opened(kind: str = "tiny") -> Bundle:
    return load.load(reference.parse(kind))


def block_inputs(bundle: Bundle) -> list[torch.Tensor]:
    """What each block really gets when the model runs on all of the calibration text, [samples, tokens, hidden]."""
    seen: list[torch.Tensor] = []
    _, found = calls.decoder_blocks(bundle.model)
    hooks = [b.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())) for b in found]
    with torch.no_grad():
        bundle.model(input_ids=torch.tensor(CALIBRATION), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_gets_what_it_gets_in_the_model(kind: str) -> None:
    expected, seen = block_inputs(opened(kind)), []
    blocks.walk(opened(kind), CONTEXT, IGNORE, lambda block: seen.append(torch.cat(block.inputs)))
    assert len(seen) == len(expected)
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_flow_into_the_next_block(kind: str) -> None:
    bundle = opened(kind)
    seen: list[torch.Tensor] = []

    def work(block: Block) -> None:
        seen.append(torch.cat(block.inputs))
        for name, layer in block.linears.items():
            block.pack(name, {}, layer.weight * 0.5)

    blocks.walk(bundle, CONTEXT, IGNORE, work)
    for ours, theirs in zip(seen, block_inputs(bundle), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_are_layers_with_one_input_in_order(kind: str) -> None:
    found: list[list[tuple[str, ...]]] = []
    blocks.walk(opened(kind), CONTEXT, IGNORE, lambda block: found.append(block.stages))
    last = [[tuple(name.rpartition(".")[2] for name in stage) for stage in stages] for stages in found]
    assert all(
        stages == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)] for stages in last
    )


def test_layers_in_turn_see_inputs_from_those_already_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether outputs of finished layers are kept or computed again makes no difference."""

    def inputs_of_down(kept_bytes: int) -> torch.Tensor:
        monkeypatch.setattr(blocks, "KEPT_BYTES", kept_bytes)
        seen: list[torch.Tensor] = []

        def work(block: Block) -> None:
            for stage in block.stages:
                block.observe(stage[:1], lambda name, x: seen.append(x.clone()) if "down_proj" in name else None)
                for name in stage:
                    block.pack(name, {}, block.linears[name].weight * 0.5)

        blocks.walk(opened(), CONTEXT, IGNORE, work)
        return torch.cat(seen)

    bundle = opened()
    for name, layer in bundle.model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head" and "down_proj" not in name:
            layer.weight.data *= 0.5
    expected: list[torch.Tensor] = []
    first = bundle.model.get_submodule("model.layers.0.mlp.down_proj")
    first.register_forward_pre_hook(lambda m, args: expected.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        bundle.model(input_ids=torch.tensor(CALIBRATION), use_cache=False)
    kept, computed = inputs_of_down(1 << 30), inputs_of_down(0)
    assert torch.equal(kept, computed)
    torch.testing.assert_close(kept[: len(expected[0])], expected[0], rtol=1e-5, atol=1e-5)


def test_batches_are_cut_to_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[torch.Tensor] = []
    blocks.walk(opened(), CONTEXT, IGNORE, lambda block: whole.append(torch.cat(block.inputs)))
    monkeypatch.setitem(calls.BATCH_BYTES, "cpu", 64 * 500 * 4 * 3)
    cut: list[int] = []
    parts: list[torch.Tensor] = []

    def work(block: Block) -> None:
        cut.append(len(block.inputs))
        parts.append(torch.cat(block.inputs))

    blocks.walk(opened(), CONTEXT, IGNORE, work)
    assert cut[0] > 1
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Spare(LlamaMLP):
    """A feed-forward with a layer that it does not run, or runs through its weight alone."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.spare = nn.Linear(config.hidden_size, config.hidden_size)


class Twice(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", super().forward(x) + super().forward(-2 * x))


def with_feed_forward(kind: type[LlamaMLP]) -> Bundle:
    bundle = opened()
    for layer in bundle.model.model.layers:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer.mlp = kind(bundle.model.config).requires_grad_(False)
    return bundle


def test_a_layer_that_never_runs_is_refused_by_name_and_changes_nothing() -> None:
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.spare never runs") as caught:
        blocks.walk(with_feed_forward(Spare), CONTEXT, IGNORE, lambda block: [*block.stages] and None)
    assert caught.value.hint == "ignore: [lm_head, spare]"
    bundle, seen = with_feed_forward(Spare), []

    def work(block: Block) -> None:
        with pytest.raises(InputError):
            block.observe(block.linears, lambda name, x: None)
        seen.append(torch.cat(block.inputs))

    expected = block_inputs(bundle)
    blocks.walk(bundle, CONTEXT, IGNORE, work)
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_layers_that_run_twice_are_not_answered_for_by_their_first_output() -> None:
    def work(block: Block) -> None:
        for stage in block.stages:
            block.observe(stage[:1], lambda name, x: None)
            for name in stage:
                block.pack(name, {}, block.linears[name].weight * 0.5)
        seen.append(torch.cat(block.inputs))

    bundle, seen = with_feed_forward(Twice), list[torch.Tensor]()
    blocks.walk(bundle, CONTEXT, IGNORE, work)
    for ours, theirs in zip(seen, block_inputs(bundle), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_model_runs_as_before_afterwards() -> None:
    bundle, ids = opened(), torch.tensor(CALIBRATION[:2])
    with torch.no_grad():
        before = bundle.model(input_ids=ids).logits
        blocks.walk(bundle, CONTEXT, IGNORE, lambda block: block.observe(block.linears, lambda name, x: None))
        assert torch.equal(bundle.model(input_ids=ids).logits, before)
    assert not any("forward" in vars(module) for module in bundle.model.modules())


def test_no_text_and_no_blocks_are_told() -> None:
    with pytest.raises(InputError, match="needs text"):
        blocks.walk(opened(), Context(), IGNORE, lambda block: None)
    with pytest.raises(InputError, match="Linear has no list of decoder blocks"):
        calls.decoder_blocks(nn.Linear(2, 2))


def halve(block: Block) -> None:
    for name, layer in block.linears.items():
        block.pack(name, {"weight_packed": layer.weight.detach().half()}, layer.weight * 0.5)


def test_an_interrupted_walk_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = opened("tiny-gemma3")
    expected = blocks.walk(whole, CONTEXT, IGNORE, halve)
    context = Context(calibration_ids=CALIBRATION, unfinished=tmp_path / "0-halve")
    worked: list[int] = []

    def until(last: int) -> Any:
        def work(block: Block) -> None:
            if block.index == last:
                raise KeyboardInterrupt
            worked.append(block.index)
            halve(block)

        return work

    for last in (1, 2, 99):
        bundle = opened("tiny-gemma3")
        try:
            packed = blocks.walk(bundle, context, IGNORE, until(last))
        except KeyboardInterrupt:
            continue
    assert worked == [0, 1, 2], "no block is done twice"
    left = {path.name for path in context.unfinished.iterdir()}  # type: ignore[union-attr]
    assert left == {f"model.layers.{index}.safetensors" for index in range(3)}, "no inputs that nobody will read"
    assert packed.keys() == expected.keys()
    assert all(torch.equal(packed[name]["weight_packed"], parts["weight_packed"]) for name, parts in expected.items())
    for (name, ours), theirs in zip(bundle.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_half_written_block_does_not_count(tmp_path: Path) -> None:
    context = Context(calibration_ids=CALIBRATION, unfinished=tmp_path / "own")

    def stop(block: Block) -> None:
        halve(block)
        if block.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blocks.walk(opened(), context, IGNORE, stop)
    (tmp_path / "own" / "model.layers.1.part").write_bytes(b"half")
    worked: list[int] = []
    blocks.walk(opened(), context, IGNORE, lambda block: worked.append(block.index))
    assert worked == [1]


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 products here")
def test_forward_passes_may_be_rounded_and_what_methods_add_up_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infopt.kernels.onednn._has_vectors", lambda: True)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(name: str, x: torch.Tensor) -> None:
        h = Hessian()
        h.add(x)
        seen.append((x.clone(), h.mean()))

    blocks.walk(opened(), CONTEXT, IGNORE, lambda block: block.observe([name for name in block.linears if "down" in name], see))
    rounded = [torch.equal(x, x.bfloat16().float()) for x, _ in seen]
    assert not any(rounded), "products of rounded results are none themselves"
    for x, hessian in seen:
        expected = 2 * x.double().T @ x.double() / len(x)
        assert (hessian.double() - expected).norm() < 1e-5 * expected.norm()
    exact = block_inputs(opened())
    drifted: list[torch.Tensor] = []
    blocks.walk(opened(), CONTEXT, IGNORE, lambda block: drifted.append(torch.cat(block.inputs)))
    assert torch.equal(drifted[0], exact[0])
    assert 1e-5 * exact[-1].norm() < (drifted[-1] - exact[-1]).norm() < 1e-2 * exact[-1].norm()


def test_the_hessian_is_that_of_the_squared_error() -> None:
    torch.manual_seed(0)
    x = torch.randn(700, 300)
    hessian = Hessian()
    for part in x.split(128):
        hessian.add(part)
    weight = torch.randn(300, dtype=torch.float64, requires_grad=True)
    error = (x.double() @ weight).square().mean()
    (gradient,) = torch.autograd.grad(error, weight, create_graph=True)
    expected = torch.stack([torch.autograd.grad(g, weight, retain_graph=True)[0] for g in gradient])
    torch.testing.assert_close(hessian.mean().double(), expected, rtol=1e-4, atol=1e-4)
