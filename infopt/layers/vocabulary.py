"""A model's rows per token: input embedding and output head, and the token ids that its configs name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from infopt.errors import InputError

#: Settings of generation that hold ids in lists of their own kind.
_LISTS = ("bad_words_ids", "begin_suppress_tokens", "force_words_ids", "sequence_bias", "suppress_tokens")


def tables(model: Any) -> tuple[nn.Embedding, nn.Linear]:
    """The input embedding and the output head. Raises InputError where rows cannot be taken out of these two alone."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError("the model's weights are quantized already", hint="put this step first")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        found = f"{type(embedding).__name__} and {type(head).__name__}"
        raise InputError(f"{type(model).__name__} reads and says tokens by {found}; allowed: Embedding and Linear")
    rows = embedding.num_embeddings
    others = [name for name, part in model.named_modules() if isinstance(part, nn.Embedding) and part is not embedding]
    more = [name for name in others if model.get_submodule(name).num_embeddings == rows]
    config = model.config.get_text_config()
    if more or getattr(config, "vocab_size_per_layer_input", None) or head.weight.shape[0] != rows:
        raise InputError(f"{type(model).__name__} has more tables of tokens than its embedding and head: {more or 'by layer'}")
    return embedding, head


def named_ids(model: Any) -> set[int]:
    """The token ids that the model's configs name. Raises InputError for settings that list ids in a way not known here."""
    generation = model.generation_config
    listed = [key for key in _LISTS if getattr(generation, key, None)]
    if listed:
        raise InputError(f"generation_config.{listed[0]} lists token ids", hint="take it out of generation_config.json")
    return {index for config, key in _places(model) for index in _ids(getattr(config, key))}


def keep_rows(model: Any, kept: Sequence[int]) -> None:
    """Leaves the rows `kept` of both tables, in that order, and renumbers the ids that the configs name.

    An id that names no row any more becomes None: no token had it.
    """
    embedding, head = tables(model)
    rows, index = embedding.num_embeddings, torch.tensor(kept, device=embedding.weight.device)
    is_tied = head.weight is embedding.weight
    embedding.weight = _rows(embedding.weight, index)
    head.weight = embedding.weight if is_tied else _rows(head.weight, index)
    if head.bias is not None:
        head.bias = _rows(head.bias, index)
    embedding.num_embeddings = head.out_features = len(kept)
    new = {old: number for number, old in enumerate(kept)}
    for config, key in _places(model):
        setattr(config, key, _renumbered(getattr(config, key), new))
    if embedding.padding_idx is not None:
        embedding.padding_idx = new.get(embedding.padding_idx)
    for part in (model.config, model.config.get_text_config(), *model.modules()):
        if getattr(part, "vocab_size", None) == rows:
            part.vocab_size = len(kept)
        if part is not embedding and getattr(part, "padding_idx", None) is not None and hasattr(part, "vocab_size"):
            part.padding_idx = new.get(part.padding_idx)


def _rows(weight: torch.Tensor, index: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach()[index.to(weight.device)].clone(), requires_grad=weight.requires_grad)


def _places(model: Any) -> Iterator[tuple[Any, str]]:
    """Every setting that names a token: (config, key)."""
    configs = {id(each): each for each in (model.config, model.config.get_text_config(), model.generation_config)}
    for config in configs.values():
        for key in list(vars(config)) if config is not None else ():
            if key.endswith("_token_id") and getattr(config, key) is not None:
                yield config, key


def _ids(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _renumbered(value: int | Sequence[int], new: Mapping[int, int]) -> int | list[int] | None:
    if isinstance(value, int):
        return new.get(value)
    return [new[old] for old in value if old in new] or None
