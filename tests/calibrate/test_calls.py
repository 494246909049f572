"""How other families call their blocks, what is refused, and what is on the device at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from stub_techniques import CALIBRATION
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from infopt.calibrate import blocks, calls, sensitivity
from infopt.calibrate.sensitivity import Probe
from infopt.errors import InputError
from infopt.model import tiny
from infopt.model.bundle import Bundle
from infopt.protocols import Context

CONTEXT = Context(calibration_ids=CALIBRATION[:5])
CPU = torch.device("cpu")
HYBRID = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
#: transformers' model type → own settings. Blocks get arguments by position, or answer with tuples of one or two, or both.
CALLED_OTHERWISE: dict[str, dict[str, Any]] = {
    "xglm": {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "bamba": {**HYBRID, "attn_layer_indices": [1]},
    "falcon_h1": {**HYBRID, "mamba_d_ssm": 64, "mamba_d_head": 8, "head_dim": 16},
    "modernbert-decoder": {},
}
ANSWERS_DEPEND_ON_TEXT: dict[str, dict[str, Any]] = {
    "gemma4_text": {"vocab_size_per_layer_input": 1024, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0},
    "zamba2": {
        "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1],
    },
}  # fmt: skip


def opened(kind: str, own: dict[str, Any]) -> Bundle:
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**tiny._SHARED, "vocab_size": 1024, "pad_token_id": 0, **own})
        return Bundle(auto.from_config(config, dtype=torch.float32).eval().requires_grad_(False), tiny.tokenizer(), kind)


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("kind", CALLED_OTHERWISE)
def test_blocks_that_are_called_otherwise_get_what_they_get_in_the_model(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "rows_at_once", lambda *given: rows)
    bundle, expected, seen = opened(kind, CALLED_OTHERWISE[kind]), list[torch.Tensor](), list[torch.Tensor]()
    ids = torch.tensor(CONTEXT.calibration_ids)
    hooks = [
        block.register_forward_pre_hook(lambda module, given: expected.append(given[0].clone()))
        for block in calls.decoder_blocks(bundle.model)[1]
    ]
    with torch.no_grad():
        before = bundle.model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    blocks.walk(bundle, CONTEXT, ("lm_head",), lambda block: seen.append(torch.cat(block.inputs)))
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    probe = Probe.of(bundle, CONTEXT.calibration_ids[:rows], CPU)
    torch.testing.assert_close(probe.tail(probe.inputs[-1]), before[:rows].flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ANSWERS_DEPEND_ON_TEXT)
def test_arguments_that_depend_on_the_text_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match=r"does not run block by block: what block 0 is called with depends") as told:
        blocks.walk(opened(kind, ANSWERS_DEPEND_ON_TEXT[kind]), CONTEXT, (), lambda block: None)
    assert told.value.hint == "a method that needs no calibration: rtn"


def test_what_a_runner_would_get_wrong_is_one_line() -> None:
    bundle = opened("llama", {})
    first = bundle.model.model.layers[0]
    own = first.forward
    first.forward = lambda hidden, **named: own(hidden, named["nothing"])
    with pytest.raises(InputError, match="LlamaForCausalLM does not run block by block: 'nothing'"):
        blocks.walk(bundle, CONTEXT, (), lambda block: None)
    assert first.forward is not own, "a forward of its own is put back"
    del first.forward
    bundle.model.base_model.forward = lambda **named: None
    with pytest.raises(InputError, match="2 blocks are not called"):
        blocks.walk(bundle, CONTEXT, (), lambda block: None)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of weights on `cuda`, after each change. It is the host with a counter."""
    found, there = [0], dict[int, int]()

    def count(tensors: Any, device: torch.device) -> None:
        for tensor in tensors:
            there[id(tensor)] = tensor.nbytes if device.type == "cuda" else 0
        found.append(sum(there.values()))

    def to(module: nn.Module, device: torch.device) -> nn.Module:
        count(calls.tensors(module), device)
        return module

    @contextmanager
    def lent(tensors: list[torch.Tensor], device: torch.device) -> Iterator[None]:
        fresh = [tensor for tensor in tensors if not there.get(id(tensor))]
        count(fresh, device)
        yield
        count(fresh, CPU)

    move = torch.Tensor.to
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(calls, "lent", lent)
    monkeypatch.setattr(sensitivity, "lent", lent)
    cuda = (torch.device("cuda"),)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *given, **named: x if given == cuda else move(x, *given, **named))
    return found


def test_one_block_is_on_the_device_at_a_time(held: list[int]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**tiny._SHARED)).requires_grad_(False)
    _, found = calls.decoder_blocks(model)
    block, others = (sum(tensor.nbytes for tensor in part) for part in (calls.tensors(found[0]), calls.beside(model, found)))
    bundle, seen = Bundle(model, tiny.tokenizer(), "tiny"), list[int]()
    blocks.walk(bundle, Context(device="cuda", calibration_ids=CALIBRATION), (), lambda _: seen.append(held[-1]))
    assert seen == [block, block]
    assert max(held) == others > block, "embeddings, while blocks are stood in for"
    assert held[-1] == 0
    probe = Probe.of(bundle, CALIBRATION[:2], torch.device("cuda"))
    with probe.block(1):
        assert held[-1] == block
    assert probe.kld(1) == pytest.approx(0, abs=1e-6)
    assert max(held) == others
    assert held[-1] == 0


def test_what_is_lent_comes_back_as_it_was() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.data_ptr()
    with calls.lent(calls.tensors(layer), CPU):
        layer.weight.data = torch.zeros(2, 2)
    assert layer.weight.data_ptr() == before
