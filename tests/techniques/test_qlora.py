"""QLoRA: the start that LoftQ gives, the adapters that training finds, and the merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stub_techniques import CALIBRATION

from infopt.distil.losses import divergence
from infopt.errors import InputError, RecipeError
from infopt.export.source import open_source
from infopt.layers import normal_float
from infopt.layers.student_linear import StudentLinear
from infopt.model import checkpoint, load, reference, save, shapes
from infopt.model.bundle import Bundle
from infopt.protocols import Context
from infopt.settings import LoadOptions
from infopt.techniques.qlora import nearest_of_rank

BESIDE = [("tiny", "bfloat16", "bfloat16"), ("tiny-qwen2", "float32", "bfloat16"), ("tiny-gemma3", "bfloat16", "float32")]
Make = Callable[..., Any]
Build = Callable[..., Any]


@pytest.mark.parametrize(("rows", "inner"), [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_start_is_the_truncated_singular_value_decomposition(rows: int, inner: int, rank: int) -> None:
    matrix = torch.randn(rows, inner, generator=torch.Generator().manual_seed(rank))
    b, a = nearest_of_rank(matrix, rank)
    assert b.shape == (rows, rank)
    assert a.shape == (rank, inner)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close((b @ a).double(), u[:, :rank] * s[:rank] @ v[:rank], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-3, atol=1e-3)


def test_a_matrix_of_zeros_has_a_start_too() -> None:
    b, a = nearest_of_rank(torch.zeros(8, 4), 2)
    assert torch.equal(b @ a, torch.zeros(8, 4))


def test_without_adapters_it_is_nf4(make: Make, build: Build, tiny_bundle: Bundle) -> None:
    from bitsandbytes.functional import dequantize_4bit

    ours = build(make("qlora", init="zero", epochs=0, keep="merged")).model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(ours, normal_float.rounded(tiny_bundle.model.model.layers[0].mlp.up_proj.weight.data, True))
    theirs = build(make("nf4", compute_dtype="float32")).model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(ours, dequantize_4bit(theirs.data, theirs.quant_state).float(), rtol=0.01, atol=1e-4)


def test_each_part_brings_it_closer_to_the_model(make: Make, build: Build, tiny_bundle: Bundle) -> None:
    ids = torch.tensor(CALIBRATION)

    def lost(**options: Any) -> float:
        bundle = build(make("qlora", compute_dtype="float32", **options))
        with torch.inference_mode():
            return divergence(
                bundle.model(input_ids=ids).logits.flatten(0, 1), tiny_bundle.model(input_ids=ids).logits.flatten(0, 1)
            )[0]

    with torch.inference_mode():
        logits = (
            build(make("nf4", compute_dtype="float32")).model(input_ids=ids).logits,
            tiny_bundle.model(input_ids=ids).logits,
        )
    assert lost() < 0.8 * divergence(*(part.flatten(0, 1) for part in logits))[0]
    plain = lost(init="zero", epochs=0)
    start = lost(epochs=0)
    assert start < 0.8 * plain
    assert lost(epochs=6, learning_rate=0.002) < 0.8 * start
    assert lost(init="zero", epochs=6, learning_rate=0.002) < 0.9 * plain
    assert lost(rank=32, epochs=0) < start


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen2", "tiny-gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_is_merged_and_loads_back(
    kind: str, dtype: str, make: Make, build: Build, logits: Any, tmp_path: Path
) -> None:
    original = load.load(reference.parse(kind)).model
    bundle = build(make("qlora", rank=4, keep="merged"), kind, dtype)
    assert type(bundle.model) is type(original)
    assert {name for name, _ in bundle.model.named_modules()} == {name for name, _ in original.named_modules()}
    assert not any(isinstance(module, StudentLinear) for module in bundle.model.modules())
    assert not any(parameter.requires_grad for parameter in bundle.model.parameters())
    changed = {
        name.removesuffix(".weight")
        for name, parameter in bundle.model.named_parameters()
        if not torch.equal(parameter, original.get_parameter(name).to(parameter.dtype))
    }
    assert changed == set(shapes.shapes(reference.parse(kind)).linear)
    save.save(bundle, tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
    again = load.load(reference.parse(str(tmp_path / "out")))
    torch.testing.assert_close(logits(again), logits(bundle), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft uses transformers' old name
@pytest.mark.parametrize(("kind", "dtype", "compute"), BESIDE)
def test_kept_beside_it_is_nf4_with_an_adapter(
    kind: str, dtype: str, compute: str, make: Make, build: Build, logits: Any, tmp_path: Path
) -> None:
    """The 4-bit weights are those of `nf4` to the byte; transformers opens the folder, and peft the adapter over `nf4`."""
    options = {"rank": 4, "compute_dtype": compute}
    bundle = build(make("qlora", **options), kind, dtype)
    save.save(bundle, tmp_path / "out")
    save.save(build(make("nf4", compute_dtype=compute), kind, dtype), tmp_path / "nf4")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "nf4"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    made = logits(bundle)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4").eval()
    over = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4"), tmp_path / "out", autocast_adapter_dtype=False
    )
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for model, by in ((whole, "transformers"), (over, "peft")):
        found = logits(replace(bundle, model=model.eval()))
        torch.testing.assert_close(found, made, rtol=0, atol=1e-5, msg=lambda said, by=by: f"{by}: {said}")
    assert (logits(replace(bundle, model=alone)) - made).abs().max() > 0.05, "the adapter says nothing"
    torch.testing.assert_close(logits(load.load(reference.parse(str(tmp_path / "out")))), made, rtol=0, atol=1e-5)


def test_adapters_count_as_weights(make: Make, build: Build, tmp_path: Path) -> None:
    bundle = build(make("qlora", rank=4))
    logits_before = bundle.model(input_ids=torch.tensor(CALIBRATION[:1])).logits  # it may be saved after it ran
    predicted = save.stored_bytes(bundle)
    saved = save.save(bundle, tmp_path / "out")
    adapter = tmp_path / "out" / "adapter_model.safetensors"
    stored = load_file(adapter)
    assert saved.weights_bytes == predicted == checkpoint.tensor_bytes(tmp_path / "out")
    linear = shapes.shapes(reference.parse("tiny")).linear.values()
    assert sum(tensor.nbytes for tensor in stored.values()) == sum(4 * 2 * (out + inner) for out, inner in linear)
    again = load.load(reference.parse(str(tmp_path / "out")))
    torch.testing.assert_close(again.model(input_ids=torch.tensor(CALIBRATION[:1])).logits, logits_before, rtol=0, atol=1e-5)
    save_file({name: tensor + 1 for name, tensor in stored.items()}, adapter)
    assert reference.content_hash(tmp_path / "out") != saved.content_hash


def test_ignored_layers_stay_as_they_were(make: Make, build: Build, logits: Any, tmp_path: Path) -> None:
    bundle = build(make("qlora", ignore=["lm_head", "down_proj", "model.layers.0.*"]))
    save.save(bundle, tmp_path / "out")
    original = load.load(reference.parse("tiny")).model.state_dict()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    whole = {name for name in stored if name in original and stored[name].dtype == torch.float32}
    assert all(torch.equal(stored[name], original[name]) for name in whole)
    assert {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"} <= whole
    assert "model.layers.1.mlp.up_proj.weight.absmax" in stored
    again = load.load(reference.parse(str(tmp_path / "out")))
    torch.testing.assert_close(logits(again), logits(bundle), rtol=0, atol=1e-5)


def test_what_cannot_follow_an_adapter_kept_beside(make: Make, build: Build, tmp_path: Path) -> None:
    bundle = build(make("qlora", epochs=0))
    for name in ("rtn", "kv_cache"):
        with pytest.raises(InputError):
            make(name).apply(bundle, Context(calibration_ids=CALIBRATION))
    save.save(bundle, tmp_path / "out")
    with pytest.raises(InputError, match="its adapters lie beside its weights"):
        open_source(str(tmp_path / "out"), LoadOptions(), lambda line: None)


def test_random_numbers_are_its_own(make: Make, build: Build) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build(make("qlora", init="zero"))
    assert torch.equal(torch.rand(1), expected)


def test_a_later_step_may_round_the_sum(make: Make, build: Build) -> None:
    bundle = make("rtn", group_size=32).apply(build(make("qlora", epochs=0, keep="merged")), Context())
    assert bundle.packed


def test_refuses_what_cannot_be(make: Make, build: Build, tiny_bundle: Bundle) -> None:
    with pytest.raises(RecipeError, match="found 65; allowed: 1 … 32, the smallest layer's side"):
        make("qlora", rank=65).check(shapes.shapes(reference.parse("tiny")), "steps[0].qlora")
    with pytest.raises(InputError, match="quantized already"):
        make("qlora").apply(build(make("rtn", group_size=32)), Context(calibration_ids=CALIBRATION))
    with pytest.raises(InputError, match="needs text"):
        make("qlora").apply(tiny_bundle, Context())


def test_one_start_needs_no_text(make: Make, tiny_bundle: Bundle) -> None:
    make("qlora", epochs=0).apply(tiny_bundle, Context())
