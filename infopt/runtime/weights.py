"""Layers' weights for the kernels: as they are, or, where they are stored as integers, from those integers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from infopt.kernels import packing
from infopt.kernels.packed import GROUP, Kind, Packed, pack, pack_integers, paired
from infopt.layers.packing import unpacked
from infopt.runtime.decoder import Unfit

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Wanted = Literal["auto", "float32", "bfloat16", "int8", "int4", "float8"]


@dataclass(frozen=True)
class Integers:
    """(q − zero)·scale: q int8 [rows, inner], signed; scale and zero [rows, groups]."""

    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group: int | None

    @property
    def grid(self) -> tuple[int, int | None, bool]:
        return self.bits, self.group, self.zeros is not None


def joined(modules: Iterable[nn.Module], wanted: Wanted, *, in_pairs: bool = False) -> Packed:
    """Layers that read the same input as one matrix; `in_pairs`: gate and up (or one layer with both) side by side.

    Integers stay what they are. Floating-point weights become what is `wanted`; auto is their own type.
    """
    layers, put = list(modules), _in_pairs if in_pairs else torch.cat

    def halves(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(parts[0].chunk(2)) if in_pairs and len(parts) == 1 else parts

    stored = [integers(layer) for layer in layers]
    known = [each for each in stored if each is not None]
    if len(known) == len(layers) and len({each.grid for each in known}) == 1 and _fits(known[0]):
        first = known[0]
        zeros = None if first.zeros is None else put([each.zeros for each in known if each.zeros is not None])
        q, scales = halves([each.q for each in known]), put([each.scales for each in known])
        if packing.takes(q):
            packed = packing.pack_integers(q, scales, zeros, first.bits, first.group, in_pairs=in_pairs)
        else:
            packed = pack_integers(put(q), scales, zeros, first.bits, first.group)
    else:
        weights = halves([layer_weight(layer) for layer in layers])
        kind = kind_of(weights[0], wanted)
        packed = packing.pack(weights, kind, in_pairs=in_pairs) if packing.takes(weights) else pack(put(weights), kind, GROUP)
    if all(getattr(layer, "bias", None) is None for layer in layers):
        return packed
    return packed.with_bias(put([_bias(layer) for layer in layers])[:, 0])


def _bias(layer: Any) -> torch.Tensor:
    """float32 [rows, 1], zeros where there is none."""
    found = getattr(layer, "bias", None)
    return torch.zeros(_rows(layer), 1) if found is None else found.detach().float()[:, None]


def kind_of(weight: torch.Tensor, wanted: Wanted) -> Kind:
    """How a floating-point weight is kept. float16 becomes float32: bfloat16 would round it."""
    assert wanted != "float8", "refused where a model is opened: CPUs do not multiply it"
    if wanted != "auto":
        return wanted
    return "bfloat16" if weight.dtype == torch.bfloat16 else "float32"


def integers(layer: Any) -> Integers | None:
    """What a layer stores as integers; None for floating-point weights, and for grids that the kernels do not multiply."""
    scheme = getattr(layer, "quantization_scheme", None)
    if scheme is not None and scheme.weights is not None:
        return _compressed(layer, scheme.weights)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dtype == torch.int8 and hasattr(layer, "weight_scale"):
        return Integers(weight, layer.weight_scale, None, 8, None)
    return None


def _compressed(layer: Any, scheme: Any) -> Integers | None:
    """A layer that transformers loaded as compressed-tensors and that was not decompressed yet."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    is_ordered = getattr(layer, "weight_g_idx", None) is None
    if scheme.type != "int" or scheme.num_bits not in (4, 8) or not is_ordered:
        return None
    packed, plain = getattr(layer, "weight_packed", None), getattr(layer, "weight", None)
    if packed is None:  # int-quantized: a byte each
        if not isinstance(plain, torch.Tensor) or plain.dtype != torch.int8 or not scheme.symmetric:
            return None
        group = scheme.group_size if scheme.group_size and scheme.group_size > 0 else None
        return Integers(plain.detach(), layer.weight_scale.detach(), None, 8, group)
    shape = torch.Size(int(n) for n in layer.weight_shape)
    q = unpack_from_int32(packed.detach(), scheme.num_bits, shape)
    zeros = None
    if not scheme.symmetric:
        stored = layer.weight_zero_point.detach()
        zeros = unpack_from_int32(stored, scheme.num_bits, torch.Size((shape[0], layer.weight_scale.shape[1])), packed_dim=0)
    group = scheme.group_size if scheme.group_size and scheme.group_size > 0 else None
    return Integers(q, layer.weight_scale.detach(), zeros, scheme.num_bits, group)


def _fits(stored: Integers) -> bool:
    group, inner = stored.group, stored.q.shape[1]
    return (group is None or (group % GROUP == 0 and inner % group == 0)) and not (stored.bits == 8 and stored.zeros is not None)


def head_kind(head: Wanted, weights: Wanted, packed: Iterable[Packed]) -> Wanted:
    """What the output head becomes: auto is int8 where the layers before it were packed as integers."""
    if head != "auto":
        return head
    return "int8" if any(each.scales is not None for each in packed) else weights


def require(layer: Any) -> None:
    """Raises Unfit for a layer whose weights `joined` cannot read, before any is touched."""
    if getattr(layer, "quantization_scheme", None) is not None or integers(layer) is not None:
        return
    weight = getattr(layer, "weight", None)
    # Subclasses of tensors (quanto's, torchao's, bitsandbytes') hold their numbers in ways of their own.
    if not isinstance(weight, torch.Tensor) or type(weight.data) is not torch.Tensor or weight.dtype not in FLOATING:
        raise Unfit(f"{type(layer).__name__} keeps its weights in a way of its own")
    if weight.dim() != 2:
        raise Unfit(f"the weights of {type(layer).__name__} are no matrix")


def layer_weight(layer: Any) -> torch.Tensor:
    """Floating point [rows, inner]. Raises Unfit for a layer that holds something else."""
    stored = integers(layer)
    if stored is not None:
        spread = stored.q.shape[1] // stored.scales.shape[1]
        q = stored.q.float() - (0 if stored.zeros is None else stored.zeros.float().repeat_interleave(spread, 1))
        return q * stored.scales.float().repeat_interleave(spread, 1)
    if getattr(layer, "quantization_scheme", None) is not None:
        return unpacked(layer, torch.float32).weight.detach()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATING or weight.dim() != 2:
        raise Unfit(f"its layers are {type(layer).__name__}")
    return weight.detach()


def release(layers: Iterable[nn.Module]) -> None:
    """Gives back the memory of layers that are packed: a model is never held twice."""
    for layer in layers:
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            tensor.data = tensor.data.new_empty(0)


def _in_pairs(parts: list[torch.Tensor]) -> torch.Tensor:
    gate, up = parts if len(parts) == 2 else parts[0].chunk(2)
    return paired(gate, up)


def _rows(layer: Any) -> int:
    return int(getattr(layer, "out_features", None) or layer.weight.shape[0])
