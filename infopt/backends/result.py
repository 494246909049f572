"""A folder that a back-end wrote as compressed-tensors, as infopt's open model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from infopt.model import checkpoint, load, reference

if TYPE_CHECKING:
    import torch

    from infopt.model.bundle import Bundle


def adopt(folder: Path, bundle: Bundle) -> Bundle:
    """`bundle` with the model in `folder`: dequantized in memory, stored again tensor by tensor as it was written."""
    from infopt.layers import packing

    opened = load.load(reference.parse(str(folder)), replace(bundle.plan, dtype="auto"))
    packing.open_packed(opened.model)
    del opened.model.hf_quantizer  # the layers are plain again, and `save` writes what is packed
    packed = {name: stored for name, stored in _by_module(folder).items() if "weight_scale" in stored}
    config = checkpoint.read_config(folder)["quantization_config"]
    return replace(bundle, model=opened.model, packed=packed, save_config=config)


def adopt_dense(folder: Path, bundle: Bundle) -> Bundle:
    """`bundle` with the model in `folder`, whose weights are plain ones."""
    return replace(bundle, model=load.load(reference.parse(str(folder)), replace(bundle.plan, dtype="auto")).model)


def _by_module(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Dotted module name → what is stored of its weight: tensors by the last part of their name."""
    from safetensors.torch import load_file

    found: dict[str, dict[str, torch.Tensor]] = {}
    for path in checkpoint.weight_files(folder):
        for key, tensor in load_file(path).items():
            module, _, part = key.rpartition(".")
            if part != "bias":
                found.setdefault(module, {})[part] = tensor
    return found
