"""What transformers and compressed-tensors lack to open formats that infopt writes, put right while a model loads.

Both gaps make the plain loader refuse; neither makes it read wrong values.

Zero points. A loader first makes room for every stored tensor. compressed-tensors (0.17 … 0.20) gives a weight the packed
shape then, but its zero points the unpacked one, and transformers from 5.18 on refuses the file for the difference.

4-bit floats. compressed-tensors unpacks them to bfloat16 whatever the model's dtype, and a product of two dtypes fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from infopt.model import packed_shapes

_ZERO_POINTS = (
    "this transformers and compressed-tensors make room for unpacked zero points, and the file holds packed ones; "
    "transformers 5.17 reads it, later ones with quantization_config=CompressedTensorsConfig(dequantize=True)"
)
_FLOATS = (
    "compressed-tensors unpacks 4-bit floats to bfloat16, which a {dtype} model cannot multiply; load it with dtype=bfloat16"
)


def gap(config: Mapping[str, Any] | None, dtype: str) -> str | None:
    """Why plain transformers may refuse a model of `dtype` with this `quantization_config`; None where it must not."""
    if has_packed_zero_points(config):
        return _ZERO_POINTS
    if dtype != "bfloat16" and any(weights["type"] == "float" and weights["num_bits"] == 4 for _, weights in _groups(config)):
        return _FLOATS.format(dtype=dtype)
    return None


def has_packed_zero_points(config: Mapping[str, Any] | None) -> bool:
    return any(form == "pack-quantized" and not weights.get("symmetric", True) for form, weights in _groups(config))


def _groups(config: Mapping[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(format, how weights are quantized) of each group of layers."""
    if config is None or config.get("quant_method") != "compressed-tensors":
        return
    for group in (config.get("config_groups") or {}).values():
        if isinstance(group, dict) and group.get("weights"):
            yield group.get("format") or config.get("format", ""), group["weights"]


@contextmanager
def room_for_packed_zero_points() -> Iterator[None]:
    """While it holds, compressed-tensors makes room for zero points as they are stored."""
    import torch
    from compressed_tensors.compressors import BaseCompressor

    codec, packing = BaseCompressor.get_value_from_registry("pack-quantized"), packed_shapes.installed()
    own, compress = codec.__dict__["compress"], codec.compress

    def with_room(state: Any, scheme: Any) -> Any:
        found = compress(state, scheme)
        zero = found.get("weight_zero_point")
        if zero is not None and zero.is_meta and zero.dtype != torch.int32:
            rows = packed_shapes.words(zero.shape[0], scheme.weights.num_bits, packing)
            found["weight_zero_point"] = torch.empty(rows, zero.shape[1], dtype=torch.int32, device="meta")
        return found

    codec.compress = staticmethod(with_room)
    try:
        yield
    finally:
        codec.compress = own


def keep_dtype(model: Any) -> None:
    """Once the first forward has unpacked the weights, casts them to the model's dtype."""
    dtype = model.dtype

    def cast(module: Any, arguments: Any) -> None:
        handle.remove()
        for layer in module.modules():
            if getattr(layer, "quantization_scheme", None) is not None and hasattr(layer, "weight"):
                layer.weight.data = layer.weight.data.to(dtype)

    handle = model.register_forward_pre_hook(cast)
