"""Which way a model is opened, and that it answers as its module did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest_runtime import SHAPES, VOCABULARY
from torch import nn

from infopt.errors import InputError
from infopt.kernels.packed import dense
from infopt.layers import packing
from infopt.layers.grid import Grid
from infopt.runtime import architecture
from infopt.runtime.decoder import Unfit
from infopt.runtime.kernel_linear import KernelLinear
from infopt.runtime.loop import Ask, Loop
from infopt.runtime.native_model import Settings, open_native
from infopt.runtime.steps import Run
from infopt.runtime.swapped_step import SwappedStep
from infopt.runtime.weights import Integers, integers, joined

Make = Callable[..., Any]
IDS = [(11 * i * i + 5 * i) % VOCABULARY for i in range(60)]
FLOAT = Settings(threads=2, weights="float32", head="float32", kv="float32")


def moe() -> Any:
    config = transformers.MixtralConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=VOCABULARY, num_local_experts=4, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def hybrid() -> Any:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("way", ["whole", "swapped"])
def test_it_is_called_like_the_module_it_replaces(make: Make, way: Any) -> None:
    model = make()
    ids = torch.tensor([IDS[:12], IDS[20:32]])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded on the left
    alone = model(input_ids=ids[:1, 4:], use_cache=False).logits[0]
    whole = model(input_ids=ids[1:], use_cache=False).logits[0]
    opened = open_native(model, Settings(2, "float32", "float32", "float32", way))
    found = opened(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert opened.step.name == way
    assert torch.allclose(found[0, 4:], alone, atol=1e-4 * float(alone.std()), rtol=1e-4)
    assert torch.allclose(found[1], whole, atol=1e-4 * float(whole.std()), rtol=1e-4)
    assert (found[0, :4] == 0).all()
    assert opened.dtype == torch.float32


def test_experts_fall_to_swapped_layers_with_the_reason() -> None:
    model = moe()
    wanted = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    opened = open_native(model, FLOAT)
    assert opened.step.name == "swapped"
    assert len(opened.notes) == 2
    assert opened.notes[1].startswith("whole steps do not fit: ")
    found = opened(torch.tensor([IDS])).logits[0]
    assert float((found - wanted).abs().max() / wanted.std()) < 1e-4


def test_a_state_that_cannot_be_cut_back_falls_through_both_ways() -> None:
    with pytest.raises(Unfit, match=r"whole steps do not fit: .*; swapped layers do not fit: .*"):
        open_native(hybrid(), FLOAT)


@pytest.mark.parametrize("name", ["llama", "mistral, window", "gemma3", "phi3, part rotated"])
def test_swapped_layers_cut_fork_and_go_on(make: Make, name: str) -> None:
    model = make(name)
    wanted = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    other = model(input_ids=torch.tensor([[*IDS[:40], *IDS[:10]]]), use_cache=False).logits[0]
    step = SwappedStep(model, threads=2, weights="float32", head="float32")
    sequence = step.open()
    step.run([Run(sequence, IDS[:50])])
    step.cut(sequence, 40)
    fork = step.fork(sequence)
    found = step.run([Run(sequence, IDS[40:], all_logits=True), Run(fork, IDS[:10])])
    assert found.logits is not None
    assert float((found.logits[:20] - wanted[40:]).abs().max() / wanted.std()) < 1e-4
    assert float((found.logits[20] - other[-1]).abs().max() / wanted.std()) < 1e-4
    assert found.tokens[20] == int(other[-1].argmax())
    assert step.length(sequence) == 60


def test_both_ways_give_the_same_text(make: Make) -> None:
    texts = []
    for way in ("whole", "swapped"):
        opened = open_native(make("qwen3"), Settings(2, "float32", "float32", "float32", way))  # type: ignore[arg-type]
        texts.append([answer.ids for answer in Loop(opened.step).run([Ask(tuple(IDS[:20]), 24), Ask(tuple(IDS[:3]), 9)])])
    assert texts[0] == texts[1]


def test_swapped_layers_take_long_texts_back_and_forth(make: Make) -> None:
    """Past the room that a cache has at first, cut back into it, and forked there."""
    model = make("qwen3")
    ids = [(11 * i * i + 5 * i) % VOCABULARY for i in range(320)]
    expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    step = open_native(model, Settings(2, "float32", "float32", "float32", "swapped")).step
    sequence = step.open()
    step.run([Run(sequence, ids[:250])])
    for at in range(250, 300):
        found = step.run([Run(sequence, ids[at : at + 1])]).logits
        assert torch.allclose(found[0], expected[at], atol=2e-4 * float(expected.std()))  # type: ignore[index]
    fork = step.fork(sequence)
    step.cut(sequence, 240)
    for one, start in ((sequence, 240), (fork, 300)):
        found = step.run([Run(one, ids[start:], all_logits=True)]).logits
        assert torch.allclose(found, expected[start:], atol=2e-4 * float(expected.std()))  # type: ignore[arg-type]


def test_a_nan_stops_swapped_layers_too(make: Make) -> None:
    model = make()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    step = SwappedStep(model, threads=2)
    with pytest.raises(InputError, match="not finite"):
        step.run([Run(step.open(), IDS[:3])])


def test_a_swapped_layer_keeps_shape_and_type() -> None:
    layer = nn.Linear(40, 24)
    swapped = KernelLinear(joined([layer], "float32"), _products())
    x = torch.randn(2, 3, 40)
    assert torch.allclose(swapped(x), layer(x), atol=1e-5)
    assert swapped(x.bfloat16()).dtype == torch.bfloat16
    assert swapped(torch.zeros(0, 40)).shape == (0, 24)


def _products() -> Any:
    from infopt.runtime.kernel_linear import Products

    return Products(2)


# Weights


def packed_layer(grid: Grid, rows: int = 48, inner: int = 128) -> tuple[Any, torch.Tensor]:
    """A layer as transformers holds it after it read an artifact, and what it stands for."""
    from types import SimpleNamespace

    torch.manual_seed(0)
    tensors, stands_for = packing.pack(torch.randn(rows, inner), grid)
    scheme = packing.scheme(grid)
    return SimpleNamespace(quantization_scheme=scheme, bias=None, **tensors), stands_for


@pytest.mark.parametrize(
    "grid",
    [Grid(4, 32), Grid(4, 64), Grid(4, None), Grid(8, 32), Grid(8, None), Grid(4, 64, symmetric=False),
     Grid(8, None, activations="token")],
    ids=str,
)  # fmt: skip
def test_stored_integers_are_packed_as_they_are(grid: Grid) -> None:
    layer, stands_for = packed_layer(grid)
    stored = integers(layer)
    assert isinstance(stored, Integers)
    assert stored.bits == grid.bits
    packed = joined([layer, layer], "float32")
    assert packed.kind == f"int{grid.bits}"
    assert torch.allclose(dense(packed), torch.cat([stands_for, stands_for]), atol=1e-6)


def test_other_widths_and_groups_become_floating_point() -> None:
    layer, stands_for = packed_layer(Grid(4, 16))
    packed = joined([layer], "float32")
    assert packed.kind == "float32"
    assert torch.allclose(dense(packed), stands_for, atol=1e-6)


def test_what_holds_no_plain_weight_is_refused(make: Make) -> None:
    class Strange(nn.Module):
        weight = torch.zeros(10, 1, dtype=torch.uint8)
        out_features = 10

    with pytest.raises(Unfit, match="its layers are Strange"):
        joined([Strange()], "auto")


def test_own_types_are_kept() -> None:
    assert joined([nn.Linear(32, 16).bfloat16()], "auto").kind == "bfloat16"
    assert joined([nn.Linear(32, 16).half()], "auto").kind == "float32"
    bias = joined([nn.Linear(32, 16, bias=False), nn.Linear(32, 16)], "int8").bias
    assert bias is not None
    assert (bias[:16] == 0).all()
    assert (bias[16:] != 0).any()


@pytest.mark.parametrize("name", SHAPES)
def test_small_models_are_of_the_same_class(make: Make, name: str) -> None:
    model = make(name)
    before = torch.random.get_rng_state()
    small = architecture.small_copy(model)
    assert type(small) is type(model)
    assert small.config.num_hidden_layers == 2
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("way", ["auto", "swapped"])
def test_a_model_that_fits_no_way_is_left_whole(make: Make, way: Any) -> None:
    model = make("llama", num_hidden_layers=2)
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(Unfit, match="Linear keeps its weights in a way of its own"):
        open_native(model, Settings(2, way=way))
    assert all(parameter.numel() for parameter in model.parameters())
    assert not any(isinstance(module, KernelLinear) for module in model.modules())


def test_a_swapped_head_is_int8_beside_integers(make: Make) -> None:
    opened = open_native(make(), Settings(2, weights="int4", way="swapped"))
    assert [packed.kind for packed in opened.step.packed][-1] == "int8"
    assert {packed.kind for packed in opened.step.packed[:-1]} == {"int4"}


def test_layers_that_do_something_else_stay_as_they_are() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x)

    model = moe()
    router = Router(96, 4, bias=False)
    model.model.layers[0].extra = router
    opened = SwappedStep(model, threads=1)
    assert opened.model.model.layers[0].extra is router
    assert isinstance(opened.model.lm_head, KernelLinear)


@pytest.mark.parametrize("kind", ["PhimoeConfig", "Llama4TextConfig", "OpenAIGPTConfig", "XLNetConfig", "CodeGenConfig"])
def test_odd_classes_run_as_their_modules_do_or_are_refused(kind: str) -> None:
    config = getattr(transformers, kind)()
    small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
             "intermediate_size": 64, "intermediate_size_mlp": 64, "vocab_size": VOCABULARY, "num_local_experts": 2,
             "d_inner": 64, "rotary_dim": 8}  # fmt: skip
    for name, value in small.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    ids = torch.tensor([IDS[:12]])
    wanted = model(input_ids=ids).logits
    try:
        opened = open_native(model, FLOAT)
    except Unfit:  # with both reasons, as other tests see to
        assert model(input_ids=ids).logits.equal(wanted), "it is whole"
        return
    assert torch.allclose(opened(input_ids=ids).logits, wanted, atol=1e-4 * float(wanted.std()), rtol=1e-4)
    assert len(Loop(opened.step).run([Ask(tuple(IDS[:9]), 5)])[0].ids) == 5


def test_room_is_predicted_for_swapped_layers_too(make: Make) -> None:
    settings = Settings(2, "float32", "float32", "float32", "swapped", most_kv_bytes=500_000)
    step = open_native(make(), settings).step
    each = step.kv_bytes(1)
    assert each == 2 * 3 * 2 * 16 * 4
    Loop(step).run([Ask(tuple(IDS[:9]), 3)])
    with pytest.raises(InputError, match=r"keys and values of 2 × 300 tokens take .*; 500 kB are left"):
        Loop(step).run([Ask(tuple(IDS[:9]), 291)] * 2)
