"""Decoder blocks taken out of a model, in place, so that plain transformers loads what is left."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from infopt.errors import InputError
from infopt.protocols import Shapes

if TYPE_CHECKING:
    from torch import nn

#: Settings of a config whose value names blocks by number, or counts them from an end: which blocks are left would not fit them.
BY_NUMBER = ("num_kv_shared_layers", "mlp_only_layers", "first_k_dense_replace", "num_hidden_layers_mtp")


def drop(model: Any, blocks: nn.ModuleList, dropped: Collection[int]) -> None:
    """Takes the blocks numbered `dropped` out. What a config says of each block, in a list, goes with it.

    Raises InputError for a model whose config names blocks by number.
    """
    config = model.config.get_text_config()
    for name in BY_NUMBER:
        if getattr(config, name, None):
            message = (
                f"{type(model).__name__}: {name}: {getattr(config, name)} names blocks by number, and would not fit what is left"
            )
            raise InputError(message, hint="prune_width")
    count = len(blocks)
    kept = [index for index in range(count) if index not in dropped]
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    left = [blocks[index] for index in kept]
    for name, _ in list(blocks.named_children()):
        delattr(blocks, name)
    blocks.extend(left)
    for number, block in enumerate(left):
        placed: list[Any] = [module for module in block.modules() if hasattr(module, "layer_idx")]
        for module in placed:
            module.layer_idx = number  # the place of its keys and values in a cache


def without(shapes: Shapes, dropped: Collection[int]) -> Shapes:
    """Shapes of the model that is left. Norms and biases count as if all blocks had as many."""
    number = {old: new for new, old in enumerate(index for index in range(shapes.layers) if index not in dropped)}
    linear = {}
    for name, shape in shapes.linear.items():
        found = re.search(r"\.(\d+)\.", name)
        if found is None:
            linear[name] = shape
        elif int(found[1]) in number:
            linear[f"{name[: found.start(1)]}{number[int(found[1])]}{name[found.end(1) :]}"] = shape
    other = shapes.other - len(dropped) * ((shapes.other - shapes.hidden) // shapes.layers)
    return replace(shapes, layers=len(number), linear=linear, other=other)
