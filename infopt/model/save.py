"""The only writer of weights: a folder appears complete, or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.errors import InputError
from infopt.model import atomic, checkpoint
from infopt.model.bundle import Bundle
from infopt.model.quiet import quiet
from infopt.model.reference import content_hash

if TYPE_CHECKING:
    import torch

_OTHER_FILES_BYTES = 32_000_000  # tokenizer, config, cards


@dataclass(frozen=True)
class Saved:
    """`weights_bytes`: the stored tensors; `total_bytes`: every file; `content_hash`: as `reference.content_hash`."""

    weights_bytes: int
    total_bytes: int
    content_hash: str


def save(bundle: Bundle, folder: Path, extra_files: Mapping[str, str] | None = None) -> Saved:
    """Writes model, tokenizer, the bundle's files and `extra_files` (name → text) into `folder`, which must be new or empty.

    Raises InputError for a folder in use or a model without a file format, DiskFullError.
    """
    require_free_target(folder)
    _require_format(bundle)
    quantizer = getattr(bundle.model, "hf_quantizer", None)
    tensors = None if quantizer is not None else _tensors(bundle)  # a quantizer writes its own
    with atomic.new_folder(folder, _bytes(bundle, tensors) + _OTHER_FILES_BYTES) as temporary:
        _write_model(bundle, tensors, temporary)
        bundle.tokenizer.save_pretrained(temporary)
        for name, text in {**bundle.files, **(extra_files or {})}.items():
            (temporary / name).write_text(text, encoding="utf-8")
        return Saved(checkpoint.tensor_bytes(temporary), _folder_bytes(temporary), content_hash(temporary))


def stored_bytes(bundle: Bundle) -> int:
    """Bytes of the tensors that `save` would write now."""
    return _bytes(bundle, None if getattr(bundle.model, "hf_quantizer", None) is not None else _tensors(bundle))


def require_free_target(folder: Path) -> None:
    """Raises InputError unless `folder` may be written: it does not exist, or is empty."""
    atomic.sweep(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not empty", hint="choose a new folder, or remove this one")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: exists and is a file", hint="choose a new folder")


def write_text(path: Path, text: str) -> None:
    """Writes one more file into a folder that is not published yet. Raises DiskFullError."""
    with atomic.writing(path, len(text.encode())):
        path.write_text(text, encoding="utf-8")


def _tensors(bundle: Bundle) -> dict[str, torch.Tensor]:
    """The state dict as it will be stored: of a packed module only its packed tensors and its bias remain."""
    assert not bundle.packed or bundle.save_config is not None, "packed tensors need the save_config that tells how to read them"
    state: dict[str, Any] = dict(bundle.model.state_dict())
    for module, packed in bundle.packed.items():
        for key in [key for key in state if key.startswith(f"{module}.") and key != f"{module}.bias"]:
            del state[key]
        state.update({f"{module}.{name}": tensor for name, tensor in packed.items()})
    return state


def _require_format(bundle: Bundle) -> None:
    """Raises InputError where the weights cannot be stored as they are."""
    quantizer = getattr(bundle.model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        raise InputError(f"{bundle.description}: this quantization has no file format", hint="save the model before this step")
    # bitsandbytes repacks 4-bit weights at the first run on a CPU with bf16 instructions, rounds their scales, and its
    # way back stores those transposed: the saved model would be another one.
    # What a technique packed was kept from before.
    modules = [module for name, module in bundle.model.named_modules() if name.removesuffix(".base_layer") not in bundle.packed]
    states = (getattr(getattr(module, "weight", None), "quant_state", None) for module in modules)
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise InputError(
            f"{bundle.description}: its 4-bit weights were repacked when it first ran on this CPU, which cannot be undone",
            hint="load it again and save it before running it",
        )


def _bytes(bundle: Bundle, tensors: Mapping[str, torch.Tensor] | None) -> int:
    if tensors is None:
        return bundle.resident_bytes()
    every = [*tensors.values(), *bundle.adapter.values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in every}
    return sum(storages.values())


def _write_model(bundle: Bundle, tensors: Mapping[str, torch.Tensor] | None, folder: Path) -> None:
    from safetensors.torch import save_file

    model: Any = bundle.model
    with quiet():
        model.save_pretrained(folder, **({} if tensors is None else {"state_dict": tensors}))
    if bundle.adapter:
        save_file({name: tensor.cpu() for name, tensor in bundle.adapter.items()}, folder / checkpoint.ADAPTER, {"format": "pt"})
    if bundle.save_config is not None:
        path = folder / "config.json"
        config = checkpoint.read_config(folder)
        config["quantization_config"] = bundle.save_config
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
