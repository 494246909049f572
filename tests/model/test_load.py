from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from infopt.errors import InfoptError, InputError, MissingNeedError
from infopt.model import checkpoint, load, reference, save, shapes, tiny
from infopt.model.plan import LoadPlan

IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_loaded_model_is_the_made_one(kind: str) -> None:
    bundle = load.load(reference.parse(kind))
    assert torch.equal(bundle.model(IDS).logits, tiny.make(kind)[0](IDS).logits)
    assert not bundle.model.training
    assert not any(p.requires_grad for p in bundle.model.parameters())
    assert bundle.tokenizer.padding_side == "left"
    assert bundle.description == f"{kind}, random weights, seed 0"


def test_left_padding_does_not_change_the_answer(tiny_bundle: Any) -> None:
    tokenizer, model = tiny_bundle.tokenizer, tiny_bundle.model
    batch = tokenizer(["hello world", "hi"], return_tensors="pt", padding=True)
    both = model.generate(**batch, max_new_tokens=6, do_sample=False)
    alone = model.generate(**tokenizer(["hi"], return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert both[1, -6:].tolist() == alone[0, -6:].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_and_attention_are_honoured(tiny_folder: Path, dtype: str) -> None:
    bundle = load.load(reference.parse(str(tiny_folder)), LoadPlan(dtype=dtype, attention="eager"))
    assert {p.dtype for p in bundle.model.parameters()} == {getattr(torch, dtype)}
    assert bundle.model.config._attn_implementation == "eager"
    assert bundle.description == tiny_folder.name


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (LoadPlan(dtype="int8"), "dtype 'int8'; allowed: auto, float32"),
        (LoadPlan(device="mps"), "device 'mps', which infopt is not tested with"),
        (LoadPlan(attention="flash9"), "cannot be loaded: .*flash9"),
    ],
)
def test_impossible_plans_are_refused(tiny_folder: Path, plan: LoadPlan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load.load(reference.parse(str(tiny_folder)), plan)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_is_one_line(tiny_folder: Path) -> None:
    with pytest.raises(MissingNeedError, match="sees no CUDA device"):
        load.load(reference.parse(str(tiny_folder)), LoadPlan(device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same_model(tiny_folder: Path) -> None:
    bundle = load.load(reference.parse(str(tiny_folder)), LoadPlan(device="cuda"))
    assert bundle.device.type == "cuda"
    torch.testing.assert_close(bundle.model(IDS.cuda()).logits.cpu(), tiny.make()[0](IDS).logits, rtol=1e-3, atol=1e-3)


def test_a_missing_weight_is_an_error_not_random(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are not in the files.*layers\.1\.mlp\.up_proj\.weight"):
        load.load(reference.parse(str(copy)))
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": lost[:1]}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"another shape|mismatch|size"):
        load.load(reference.parse(str(copy)))
    save_file(
        {**tensors, "model.layers.1.mlp.up_proj.weight": lost, "odd": lost.clone()}, copy / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match="stored but not part of the model: odd"):
        load.load(reference.parse(str(copy)))


def test_a_folder_without_or_with_a_broken_tokenizer_is_one_line(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match="cannot be loaded"):
        load.load(reference.parse(str(copy)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load.load(reference.parse(str(copy)))


def test_an_unknown_model_type_is_one_line(copy: Path) -> None:
    config = checkpoint.read_config(copy)
    for changes in ({"model_type": "nonesuch"}, {"hidden_size": "many"}, {"num_attention_heads": 0}, {"model_type": "t5"}):
        (copy / "config.json").write_text(json.dumps({**config, **changes}))
        ref = reference.parse(str(copy))
        with pytest.raises(InputError, match=r"does not read|does not open|not tested"):
            shapes.shapes(ref)
        with pytest.raises(InputError, match=r"cannot be loaded|weights are"):
            load.load(ref)


def test_a_models_own_code_does_not_run_unasked(copy: Path) -> None:
    config = {
        **checkpoint.read_config(copy),
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.M"},
    }
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nraise SystemExit('ran')\n")
    with pytest.raises(InputError):
        load.load(reference.parse(str(copy)))
    with pytest.raises(InputError):
        shapes.shapes(reference.parse(str(copy)))
    assert not (copy / "ran").exists()


def test_a_tokenizer_without_padding_pads_with_its_end_token(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**generation, "pad_token_id": None}))
    bundle = load.load(reference.parse(str(copy)))
    assert bundle.tokenizer.pad_token_id == bundle.tokenizer.eos_token_id == 2
    assert bundle.model.generation_config.pad_token_id == 2


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ImportError("needs `pip install x`\nmore"), MissingNeedError, "needs `pip install x`$"),
        (torch.OutOfMemoryError("CUDA"), InfoptError, "out of device memory while loading"),
        (RuntimeError(), InputError, "cannot be loaded: RuntimeError"),
    ],
)
def test_what_libraries_raise_is_one_line(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[InfoptError], message: str
) -> None:
    import transformers

    def fail(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(kind, match=message) as caught:
        load.load(reference.parse(str(tiny_folder)))
    assert type(caught.value) is kind


def test_transformers_talks_again_afterwards(tiny_folder: Path) -> None:
    from transformers.utils import logging

    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load.load(reference.parse(str(tiny_folder)))
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def test_loading_says_nothing(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    load.load(reference.parse(str(tiny_folder)), progress=lines.append)
    assert capfd.readouterr() == ("", "")
    assert lines == [f"reading {tiny_folder.name}"]


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter with random A and B, rank 4, alpha 8."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for an attribute that is about to go
        model = peft.get_peft_model(tiny.make()[0], config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_adds_scaled_b_times_a(tiny_folder: Path, adapter: Path) -> None:
    ref = reference.parse(f"{tiny_folder}+{adapter}")
    bundle, base = load.load(ref), tiny.make()[0]
    stored = load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for name, parameter in base.named_parameters():
        module = name.removesuffix(".weight")
        expected = parameter
        if module.endswith(("q_proj", "up_proj")):
            a, b = (stored[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
            expected = parameter + 8 / 4 * b @ a
            changed += 1
        torch.testing.assert_close(bundle.model.get_parameter(name), expected, rtol=1e-6, atol=1e-6)
    assert changed == 4
    assert bundle.description == f"{tiny_folder.name}, with LoRA adapter adapter merged"
    assert reference.fingerprint(ref) != reference.fingerprint(reference.parse(str(tiny_folder)))
    assert type(bundle.model).__name__ == "LlamaForCausalLM"


def test_a_merged_model_saves_as_a_plain_one(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    bundle = load.load(reference.parse(f"{tiny_folder}+{adapter}"))
    save.save(bundle, tmp_path / "merged")
    again = load.load(reference.parse(str(tmp_path / "merged")))
    assert torch.equal(again.model(IDS).logits, bundle.model(IDS).logits)


def test_an_adapter_that_does_not_fit_is_refused(tiny_folder: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    stored = load_file(path)
    ref = reference.parse(f"{tiny_folder}+{adapter}")
    lost = stored.pop(sorted(stored)[0])
    save_file(stored, path)
    with pytest.raises(InputError, match="1 adapter weights do not fit this model"):
        load.load(ref)
    stored["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = lost
    save_file(stored, path)
    with pytest.raises(InputError, match="2 adapter weights do not fit this model"):
        load.load(ref)


def test_an_adapter_does_not_go_with_quantizing_while_loading(tiny_folder: Path, adapter: Path) -> None:
    with pytest.raises(InputError, match="an adapter merges into plain weights"):
        load.load(reference.parse(f"{tiny_folder}+{adapter}"), LoadPlan(quantization_config=object()))
