"""Where a scale can move between an input and its readers' weights, and that the move changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stub_techniques import CALIBRATION

from infopt.calibrate import blocks, smoothing
from infopt.calibrate.blocks import Block
from infopt.calibrate.smoothing import Fold, Magnitude, Stage
from infopt.model import tiny
from infopt.model.bundle import Bundle
from infopt.protocols import Context

CONTEXT = Context(calibration_ids=CALIBRATION)
QKV, MLP = "q_proj k_proj v_proj", "gate_proj up_proj"
#: Layers that share an input, what may feed it, and that norm's offset.
Expected = list[tuple[str, str | None, int]]
LLAMA: Expected = [
    (QKV, "input_layernorm", 0),
    ("o_proj", "self_attn.v_proj", 0),
    (MLP, "post_attention_layernorm", 0),
    ("down_proj", "mlp.up_proj", 0),
]
GEMMA: Expected = [(QKV, "input_layernorm", 1), LLAMA[1], (MLP, "pre_feedforward_layernorm", 1), LLAMA[3]]
#: transformers' model type → own settings, and what is expected of each block.
ARCHITECTURES: dict[str, tuple[dict[str, Any], Expected]] = {
    "llama": ({}, LLAMA),
    "mistral": ({"sliding_window": 16}, LLAMA),
    "qwen2": ({}, LLAMA),
    "qwen3": ({}, LLAMA),
    "gemma2": ({}, GEMMA),
    "gemma3_text": ({"vocab_size": 1024, "query_pre_attn_scalar": 16}, GEMMA),
    # The experts read the second norm, too, and are no linear layers.
    "mixtral": ({"num_local_experts": 4}, LLAMA[:2]),
    # Norms come after attention and feed-forward: nothing makes their inputs alone.
    "olmo2": ({}, [(QKV, None, 0), LLAMA[1], (MLP, None, 0), LLAMA[3]]),
    # One input for attention and feed-forward; GELU is not linear.
    "phi": ({}, [(f"{QKV} fc1", "input_layernorm", 0), ("dense", "self_attn.v_proj", 0), ("fc2", None, 0)]),
    # ReLU is, for scales above 0.
    "opt": (
        {"ffn_dim": 128, "word_embed_proj_dim": 64},
        [
            (QKV, "self_attn_layer_norm", 0),
            ("out_proj", "self_attn.v_proj", 0),
            ("fc1", "final_layer_norm", 0),
            ("fc2", "fc1", 0),
        ],
    ),
    # One matrix for queries, keys and values, one for both halves of the gate.
    "phi3": (
        {},
        [
            ("qkv_proj", "input_layernorm", 0),
            ("o_proj", None, 0),
            ("gate_up_proj", "post_attention_layernorm", 0),
            ("down_proj", None, 0),
        ],
    ),
}


Found = list[tuple[str, list[Stage]]]


def opened(kind: str, dtype: torch.dtype = torch.float32) -> Bundle:
    """A tiny random model in which no norm's weight is 1 and no bias 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    sizes = {**tiny._SHARED, **ARCHITECTURES[kind][0]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = auto.from_config(AutoConfig.for_model(kind, **sizes, pad_token_id=0), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.data += torch.randn_like(parameter) / 8
    return Bundle(model.to(dtype).eval().requires_grad_(False), tiny.tokenizer(), kind)


def logits(bundle: Bundle) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = bundle.model(input_ids=torch.tensor(CALIBRATION[:2])).logits
    return found


def scale_everything(found: Found | None = None, ignore: tuple[str, ...] = ("lm_head",)) -> Any:
    """Work for `walk`: moves a random scale wherever one can go."""
    drawn = torch.Generator().manual_seed(1)

    def work(block: Block) -> None:
        stages = smoothing.stages(block)
        if found is not None:
            found.append((block.name, stages))
        for _, fold in stages:
            if fold:
                fold.apply(block.module, fold.tied(torch.rand(len(fold.source), generator=drawn) * 4 + 0.1))

    return lambda bundle: blocks.walk(bundle, CONTEXT, ignore, work)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_scale_that_can_move_is_found_and_changes_no_logit(kind: str) -> None:
    bundle, found = opened(kind), Found()
    before = logits(bundle)
    weights = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    scale_everything(found)(bundle)
    for _, stages in found:
        assert [
            (" ".join(name.rpartition(".")[2] for name in names), fold and fold.feeder, int(fold.offset) if fold else 0)
            for names, fold in stages
        ] == ARCHITECTURES[kind][1]
    torch.testing.assert_close(logits(bundle), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    changed = {name for name, value in bundle.model.state_dict().items() if not torch.equal(value, weights[name])}
    for block, stages in found:
        for _, fold in stages:
            assert not fold or {f"{block}.{name}.weight" for name in (fold.feeder, *fold.readers)} <= changed


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_in_bfloat16_the_same_scales_move(kind: str) -> None:
    bundle, found = opened(kind, torch.bfloat16), Found()
    before = logits(bundle).float()
    scale_everything(found)(bundle)
    assert all(fold for _, stages in found for _, fold in stages)
    assert float((logits(bundle).float() - before).norm() / before.norm()) < 0.03


def test_looking_changes_nothing() -> None:
    bundle = opened("gemma3_text")
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    seen: list[torch.Tensor] = []

    def work(block: Block) -> None:
        seen.append(torch.cat(block.inputs))
        smoothing.stages(block)
        torch.testing.assert_close(torch.cat(block.inputs), seen[-1], rtol=0, atol=0)

    blocks.walk(bundle, CONTEXT, ("lm_head",), work)
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())
    assert not any(module._forward_hooks for module in bundle.model.modules())


def test_attention_that_needs_half_precision_is_tried_out_in_another_way() -> None:
    bundle, found = opened("llama"), Found()

    def work(block: Block) -> None:
        bundle.model.config._attn_implementation = "flash_attention_2"
        found.append((block.name, smoothing.stages(block)))
        assert bundle.model.config._attn_implementation == "flash_attention_2"

    with pytest.raises(ImportError):  # there is no such kernel here, so the walk itself cannot go on
        blocks.walk(bundle, CONTEXT, ("lm_head",), work)
    assert len(found) == 1


def test_layers_left_alone_take_part_where_they_read_the_same_input() -> None:
    bundle, found = opened("llama"), Found()
    before = logits(bundle)
    scale_everything(found, ("k_proj", "down_proj", "lm_head"))(bundle)
    names = [[name.rpartition(".")[2] for name in stage.names] for stage in found[0][1]]
    assert names == [["q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"]]
    assert found[0][1][0].fold is not None
    assert found[0][1][0].fold.readers[1] == "self_attn.k_proj"
    torch.testing.assert_close(logits(bundle), before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_heads_that_share_a_value_share_its_scale() -> None:
    found: Found = []
    scale_everything(found)(opened("llama"))
    fold = found[0][1][1].fold
    assert fold is not None
    assert fold.source.view(4, 16).tolist() == [list(range(16)), list(range(16)), list(range(16, 32)), list(range(16, 32))]
    tied = fold.tied(torch.arange(1.0, 65.0)).view(4, 16)
    assert torch.equal(tied[0], tied[1])
    torch.testing.assert_close(tied[2], (torch.arange(33.0, 49.0) * torch.arange(49.0, 65.0)).sqrt())
    alone = Fold("norm", (), torch.arange(64)).tied(torch.arange(1.0, 65.0))
    torch.testing.assert_close(alone, torch.arange(1.0, 65.0))


def test_magnitudes_are_those_of_all_tokens() -> None:
    torch.manual_seed(0)
    x, seen = torch.randn(100, 7), Magnitude()
    for part in x.split(33):
        seen.add(part)
    torch.testing.assert_close(seen.mean, x.abs().mean(0))
    assert torch.equal(seen.largest, x.abs().amax(0))
