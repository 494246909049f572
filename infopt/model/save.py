"""The only writer of weights: a folder appears complete, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.errors import InputError
from infopt.model import checkpoint
from infopt.model.atomic import new_folder
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


ExtraFiles = Mapping[str, str] | Callable[[Saved], Mapping[str, str]]


def save(bundle: Bundle, folder: Path, extra_files: ExtraFiles | None = None) -> Saved:
    """Writes model, tokenizer and `extra_files` (name → text, or a function of what was saved, which then does not
    count them) into `folder`, which must not exist or be empty.

    Raises InputError for a folder in use or a model without a file format, DiskFullError.
    """
    check_target(folder)
    tensors = _tensors(bundle)
    with new_folder(folder, _bytes(tensors) + _OTHER_FILES_BYTES) as temporary:
        _write_model(bundle, tensors, temporary)
        bundle.tokenizer.save_pretrained(temporary)
        saved = Saved(checkpoint.tensor_bytes(temporary), _folder_bytes(temporary), content_hash(temporary))
        texts = extra_files(saved) if callable(extra_files) else extra_files or {}
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        saved = Saved(saved.weights_bytes, _folder_bytes(temporary), saved.content_hash)
    return saved


def check_target(folder: Path) -> None:
    """Raises InputError unless `folder` may be written: it does not exist, or is empty."""
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not empty", hint="choose a new folder, or remove this one")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: exists and is a file", hint="choose a new folder")


def _tensors(bundle: Bundle) -> dict[str, torch.Tensor]:
    """The state dict as it will be stored: of a packed module only its packed tensors and its bias remain."""
    assert bool(bundle.packed) == (bundle.save_config is not None), "packed tensors and save_config go together"
    state: dict[str, Any] = dict(bundle.model.state_dict())
    for module, packed in bundle.packed.items():
        for key in [key for key in state if key.startswith(f"{module}.") and key != f"{module}.bias"]:
            del state[key]
        state.update({f"{module}.{name}": tensor for name, tensor in packed.items()})
    return state


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    return sum(storages.values())


def _write_model(bundle: Bundle, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    model: Any = bundle.model
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        raise InputError(f"{bundle.description}: this quantization has no file format", hint="save the model before this step")
    with quiet():
        model.save_pretrained(folder, **({"state_dict": tensors} if quantizer is None else {}))
    if bundle.save_config is not None:
        path = folder / "config.json"
        config = checkpoint.read_config(folder)
        config["quantization_config"] = bundle.save_config
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
