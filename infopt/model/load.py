"""The only reader of weights: a reference and a plan become an open model, or an error of one line.

A weight that is missing from the files would be left random by transformers, with a line in a log: here it is an error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.errors import InfoptError, InputError, MissingNeedError, first_line
from infopt.model import checkpoint, compressed, demo, gguf_config, gguf_file, gguf_tokenizer, packed_shapes
from infopt.model.bundle import Bundle
from infopt.model.plan import LoadPlan
from infopt.model.quiet import quiet
from infopt.model.reference import ModelReference, adapter_path, local_path
from infopt.protocols import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(reference: ModelReference, plan: LoadPlan | None = None, progress: Progress = lambda line: None) -> Bundle:
    """Opens the model for inference: eval mode, no gradients, tokenizer padding on the left.

    `auto` as dtype is as stored, float32 for a .gguf file. Raises InputError for what cannot be loaded whole,
    MissingNeedError for a library or device that is not here.
    """
    plan = plan or LoadPlan()
    _check_plan(plan)
    path = local_path(reference)
    adapter = adapter_path(reference)
    if adapter is not None and plan.quantization_config is not None:
        raise InputError(
            f"{reference.text}: an adapter merges into plain weights, not into weights that are quantized while they load",
            hint=f"merge first: infopt optimize {reference.text} -r baseline -o DIR, then use DIR",
        )
    with _one_line(reference.text), quiet():
        progress(f"reading {path.name}")
        model, tokenizer, description = _read_gguf(path, plan) if path.is_file() else _read_folder(path, reference, plan)
        if adapter is not None:
            progress(f"merging {adapter.name}")
            model = _merge(model, adapter)
            description = f"{description}, with LoRA adapter {adapter.name} merged"
        _finish(model, tokenizer)
    return Bundle(model, tokenizer, description, plan)


def open_tokenizer(reference: ModelReference) -> PreTrainedTokenizerBase:
    """The tokenizer alone, as `load` would give it; no weight is read. Raises InputError."""
    path = local_path(reference)
    with _one_line(reference.text), quiet():
        if not path.is_file():
            return _folder_tokenizer(path, _shared(reference.trust_remote_code))
        with gguf_file.shared_reader(path) as reader:
            return _gguf_tokenizer(path, reader)


def describe(reference: ModelReference) -> str:
    """What a reference stands for, in words. A .gguf file is opened for its storage types."""
    if reference.kind == "demo":
        return demo.DESCRIPTION
    if reference.kind == "tiny":
        return f"{reference.name}, random weights, seed 0"
    if reference.kind == "hub":
        return f"{reference.name} at {reference.revision}" if reference.revision else reference.name
    assert reference.path is not None
    if reference.kind == "gguf":
        return gguf_file.describe(reference.path, gguf_file.open_reader(reference.path))
    return reference.path.resolve().name


def _check_plan(plan: LoadPlan) -> None:
    if plan.dtype not in DTYPES:
        raise InputError(f"dtype {plan.dtype!r}; allowed: {', '.join(DTYPES)}", hint="e.g. --dtype bfloat16")
    kind = plan.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device {plan.device!r}, which infopt is not tested with; allowed: cpu, cuda", hint="--device cpu")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise MissingNeedError("device 'cuda': this torch sees no CUDA device", hint="--device cpu, or see infopt doctor")


def _from_pretrained(folder: Path, plan: LoadPlan, **named: Any) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    dtype = plan.dtype if plan.dtype == "auto" else getattr(torch, plan.dtype)
    # Without a quantizer transformers places a CPU model by itself, and a device map would make saving it think of offloading.
    placed = plan.device != "cpu" or plan.quantization_config is not None
    options = {
        "dtype": dtype,
        "attn_implementation": plan.attention,
        "quantization_config": plan.quantization_config,
        "device_map": {"": plan.device} if placed else None,
    }
    model, info = auto.from_pretrained(
        folder, output_loading_info=True, **{k: v for k, v in options.items() if v is not None}, **plan.model_kwargs, **named
    )
    _check_complete(info, folder)
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map
    loaded: PreTrainedModel = model
    return loaded


def _check_complete(info: dict[str, Any], where: Path) -> None:
    """Raises InputError when a weight was left random, or a stored one was not used."""
    for key, what in (
        ("missing_keys", "not in the files, so they would be random"),
        ("mismatched_keys", "stored in another shape"),
        ("unexpected_keys", "stored but not part of the model"),
    ):
        names = sorted(str(name) for name in info.get(key) or ())
        if names:
            raise InputError(
                f"{where}: {len(names)} weights are {what}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}",
                hint="config.json and the weights do not belong together, or this transformers does not know the model",
            )
    if info.get("error_msgs"):
        raise InputError(f"{where}: {info['error_msgs'][0]}", hint="copy or download the model again")


def _check_quantized(model: PreTrainedModel) -> None:
    """Raises InputError when the library that was to quantize the model as it loads has found nothing that it knows."""
    import torch

    if all(type(found) is torch.nn.Parameter and type(found.data) is torch.Tensor for found in model.parameters()):
        raise InputError(
            f"{type(model).__name__} has no layers that this step can round: it came out as it was",
            hint="the bf16 recipe",
        )


def _read_folder(path: Path, reference: ModelReference, plan: LoadPlan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    shared = _shared(reference.trust_remote_code or plan.trust_remote_code)
    checkpoint.check_weights(path)
    config = checkpoint.read_config(path)
    packed_shapes.check_packing(path, config)
    stored = None if plan.is_plain else config.get("quantization_config")
    with compressed.room_for_packed_zero_points() if compressed.has_packed_zero_points(stored) else nullcontext():
        model = _from_pretrained(path, plan, use_safetensors=True, **shared)
    if plan.quantization_config is not None:
        _check_quantized(model)
    if compressed.gap(stored, str(model.dtype).removeprefix("torch.")):
        compressed.keep_dtype(model)
    return model, _folder_tokenizer(path, shared), describe(reference)


def _shared(trust: bool) -> dict[str, Any]:
    return {"trust_remote_code": trust, "local_files_only": not trust or bool(os.environ.get("HF_HUB_OFFLINE"))}


def _folder_tokenizer(path: Path, shared: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, padding_side="left", **shared)
    return tokenizer


def _gguf_tokenizer(path: Path, reader: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase | None = gguf_tokenizer.read(gguf_file.values(reader, "tokenizer."))
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    gguf_file.repair_tokenizer(tokenizer, reader)
    return tokenizer


def _read_gguf(path: Path, plan: LoadPlan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    from dataclasses import replace

    from transformers import GgufConfig

    if plan.quantization_config is not None:
        raise InputError(
            f"{path}: weights from a .gguf file cannot be quantized while they load",
            hint=f"dequantize first: infopt optimize {path} -r baseline -o DIR, then use DIR",
        )
    plan = replace(plan, dtype="float32" if plan.dtype == "auto" else plan.dtype, quantization_config=GgufConfig(dequantize=True))
    with gguf_file.shared_reader(path) as reader:
        config = gguf_config.read(path, reader)
        model = _from_pretrained(path.parent, plan, gguf_file=path.name, config=config)
        tokenizer = _gguf_tokenizer(path, reader)
        description = gguf_file.describe(path, reader)
    return model, tokenizer, description


def _merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """W + (alpha/r)·B·A in every adapted layer (LoRA, https://arxiv.org/abs/2106.09685, eq. 3).

    Raises InputError when the adapter's weights are not exactly those its config asks for on this model.
    """
    import peft

    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")  # missing keys are only warned about; they are compared below
        adapted = peft.PeftModel.from_pretrained(model, adapter)
    expected = set(peft.get_peft_model_state_dict(adapted))
    stored = set(checkpoint.read_header(adapter / "adapter_model.safetensors"))
    if expected != stored:
        odd = sorted(expected ^ stored)
        message = f"{adapter}: {len(odd)} adapter weights do not fit this model: {odd[0]}"
        raise InputError(message, hint="give the model that the adapter was trained on")
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return merged


def _finish(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    model.eval()
    model.requires_grad_(False)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """The many exceptions of transformers, tokenizers and peft as one line of infopt's."""
    import torch

    try:
        yield
    except InfoptError:
        raise
    except ImportError as error:
        raise MissingNeedError(f"{where}: {first_line(error)}", hint="infopt doctor") from error
    except torch.OutOfMemoryError as error:
        raise InfoptError(f"{where}: out of device memory while loading", hint="a smaller dtype, or --device cpu") from error
    except Exception as error:  # tokenizers, for one, raises plain Exception
        raise InputError(f"{where}: cannot be loaded: {first_line(error)}", hint="infopt models show says what it is") from error
