"""A decoder cut to another width, in place, so that plain transformers loads what is left."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from infopt.errors import InputError, first_line
from infopt.layers.width import READERS, WRITERS, Width


class Kept(NamedTuple):
    """What stays of one block, in ascending order: MLP channels, and KV heads with their queries. None: all."""

    channels: torch.Tensor | None
    heads: torch.Tensor | None


def measure(model: Any) -> Width:
    """How wide an open model is, by its config."""
    text = model.config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    return Width(text.intermediate_size, kv_heads, hidden, heads // kv_heads, head_dim)


def require_fit(model: Any, blocks: nn.ModuleList, before: Width, after: Width) -> None:
    """Refuses a model that transformers would build of other sizes than the cut leaves, before anything is cut.

    Such is one with a norm over all heads at once, or whose config does not say the head's size. Raises InputError.
    """
    whole, small = _built(model, before), _built(model, after)
    name = next(name for name, module in model.named_modules() if module is blocks)
    kept = Kept(_first(after.mlp, before.mlp), _first(after.kv_heads, before.kv_heads))
    inside = whole.get_submodule(name)
    assert isinstance(inside, nn.ModuleList)
    for block in inside:
        cut_block(block, before, kept)
    hidden = _first(after.hidden, before.hidden)
    if hidden is not None:
        cut_hidden(whole, inside, hidden)
    cut, wanted = ({name: list(part.shape) for name, part in each.named_parameters()} for each in (whole, small))
    odd = next((name for name in cut if cut[name] != wanted.get(name)), None)
    if odd is not None:
        raise InputError(
            f"{type(model).__name__} cannot be cut to {after.mlp} channels, {after.kv_heads} KV heads and {after.hidden} "
            f"dimensions: {odd} would be {cut[odd]}, and is {wanted.get(odd)} where transformers builds it",
            hint="prune another of mlp, kv_heads and hidden, or drop_layers",
        )


def _first(count: int, there: int) -> torch.Tensor | None:
    return torch.arange(count) if count < there else None


def _built(model: Any, width: Width) -> nn.Module:
    """The model as its config builds it at `width`, without weights. Raises InputError."""
    try:
        # Through its own dictionary, as a saved config.json is read: some classes check how sizes go together.
        config = copy.deepcopy(model.config)
        configure(config, width)
        config = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            made: nn.Module = type(model)(config)
    except Exception as error:  # whatever the model's own code makes of sizes that do not go together
        raise InputError(
            f"{type(model).__name__} does not open with {width.heads} heads of {width.head_dim} at hidden {width.hidden}: "
            f"{first_line(error)}",
            hint="keep another number of kv_heads, or another hidden size",
        ) from error
    return made


def configure(config: Any, width: Width) -> None:
    """Writes `width` into a config. The head's size is said outright: most classes take it for hidden ÷ heads otherwise."""
    text = config.get_text_config()
    text.intermediate_size = width.mlp
    text.hidden_size = width.hidden
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = width.heads, width.kv_heads, width.head_dim


def settle(model: Any, width: Width) -> None:
    """Lets config and modules of a model that was cut say its new sizes, as if it had been loaded."""
    made = dict(_built(model, width).named_modules())
    configure(model.config, width)
    for name, module in model.named_modules():
        for key, value in vars(made[name]).items():
            if type(value) is int and vars(module).get(key) != value:
                setattr(module, key, value)


def channels_of(groups: torch.Tensor, size: int) -> torch.Tensor:
    """Indices of the channels in some groups of `size`: heads of one KV head, or numbers of one head."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


@torch.no_grad()
def cut_block(block: nn.Module, before: Width, kept: Kept) -> None:
    """Takes MLP channels and groups of heads out of a block of width `before`."""
    layers = {name.rpartition(".")[2]: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}
    if kept.channels is not None:
        for part in ("gate_proj", "up_proj"):
            _cut(layers[part], rows=kept.channels)
        _cut(layers["down_proj"], columns=kept.channels)
    if kept.heads is not None:
        narrow = channels_of(kept.heads, before.head_dim)
        wide = channels_of(kept.heads, before.head_dim * before.queries)
        for part, rows in (("q_proj", wide), ("k_proj", narrow), ("v_proj", narrow)):
            _cut(layers[part], rows=rows)
        _cut(layers["o_proj"], columns=wide)


def left(block: nn.Module, before: Width, after: Width) -> Kept:
    """What stays of a block whose o_proj and down_proj have zeros for all that goes: what is not zero, and, where even less is
    left than there is room for, the first of the others, which give nothing either."""
    layers = {name.rpartition(".")[2]: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}

    def nonzero(weight: torch.Tensor, size: int, count: int, there: int) -> torch.Tensor | None:
        used = weight.view(len(weight), -1, size).ne(0).any(2).any(0)
        return None if count == there else used.int().argsort(descending=True, stable=True)[:count].sort().values

    return Kept(
        nonzero(layers["down_proj"].weight, 1, after.mlp, before.mlp),
        nonzero(layers["o_proj"].weight, before.head_dim * before.queries, after.kv_heads, before.kv_heads),
    )


@torch.no_grad()
def cut_hidden(model: Any, blocks: Iterable[nn.Module], hidden: torch.Tensor) -> None:
    """Keeps the dimensions `hidden` of the hidden states: in embeddings, head, norms, and what reads and writes them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {id(part.weight): part.weight for part in (embedding, head) if part is not None}
    for weight in tables.values():
        weight.data = weight.data[:, hidden.to(weight.device)]
    for block in blocks:
        for name, part in block.named_modules():
            if isinstance(part, nn.Linear):
                last = name.rpartition(".")[2]
                _cut(part, rows=hidden if last in WRITERS else None, columns=hidden if last in READERS else None)
    for norm in (norm for parent in (model.base_model, *blocks) for norm in norms(parent).values()):
        norm.weight.data = norm.weight.data[hidden.to(norm.weight.device)]


def norms(module: nn.Module) -> dict[str, Any]:
    """The norms right below a module, by name."""
    children: Sequence[tuple[str, Any]] = list(module.named_children())
    return {name: child for name, child in children if isinstance(getattr(child, "weight", None), nn.Parameter)
            and child.weight.dim() == 1}  # fmt: skip


def _cut(linear: nn.Linear, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
    # In place of the data, so that whoever holds the parameter (a tied head) sees it too.
    if rows is not None:
        rows = rows.to(linear.weight.device)
        linear.weight.data = linear.weight.data[rows]
        if linear.bias is not None:
            linear.bias.data = linear.bias.data[rows]
    if columns is not None:
        linear.weight.data = linear.weight.data[:, columns.to(linear.weight.device)]
    linear.out_features, linear.in_features = linear.weight.shape
