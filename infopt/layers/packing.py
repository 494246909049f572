"""Weights on an integer grid, stored as compressed-tensors `pack-quantized`: what transformers and vLLM load.

vLLM runs weight-only 4- and 8-bit integers from this format alone; its `int-quantized` kernels also quantize the
activations, with one scale per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from infopt.errors import InputError
from infopt.layers.grid import Grid, is_ignored

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from infopt.model.bundle import Bundle

FORMAT = "pack-quantized"


def linears(bundle: Bundle, ignore: Iterable[str]) -> dict[str, nn.Linear]:
    """The layers to quantize, by dotted name.

    Raises InputError for a model that is quantized already, and for a mixture of experts: transformers loads packed
    layers only where the experts, which are no `nn.Linear`, are packed too.
    """
    if bundle.save_config or bundle.packed or getattr(bundle.model, "hf_quantizer", None) is not None:
        raise InputError("the model's weights are quantized already", hint="keep one quantizing step in the recipe")
    if any(".experts." in name for name, _ in bundle.model.named_parameters()):
        raise InputError("a mixture of experts cannot be packed: its experts are not linear layers", hint="the bf16 recipe")
    modules = dict(bundle.model.named_modules())
    return {name: module for name, module in modules.items() if type(module) is nn.Linear and not is_ignored(name, ignore)}


def left_alone(model: nn.Module, packed: Mapping[str, Any]) -> list[str]:
    """Full names of the linear layers that stay as they are; engines match them one by one."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]


def scheme(grid: Grid) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=_arguments(grid), format=FORMAT)


def _arguments(grid: Grid) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=grid.bits,
        symmetric=True,
        strategy="group" if grid.group_size else "channel",
        group_size=grid.group_size,
    )


@torch.no_grad()
def pack(weight: torch.Tensor, grid: Grid) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rounds one [out, in] weight to the nearest points of `grid`.

    Returns the tensors to store (`weight_packed`, `weight_scale`, `weight_shape`) and
    the dequantized weight, in the weight's dtype, bit for bit as a reload makes it.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    rule, codec = scheme(grid), BaseCompressor.get_value_from_registry(FORMAT)
    full = weight.float()
    groups = full.view(full.shape[0], -1, grid.group_size or full.shape[1])  # [out, groups, group]
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), rule.weights)
    # A reload casts scales to the model's dtype: round to both first, so that weights are rounded against what is used.
    rounded = scale.to(weight.dtype)
    stored = rounded if grid.scale_dtype == "auto" else rounded.to(getattr(torch, grid.scale_dtype))
    if not stored.float().isfinite().all() or not stored.float().gt(0).all():
        raise InputError(f"a weight's scale does not fit {stored.dtype}", hint="set scale_dtype: float32")
    packed = codec.compress({"weight": full, "weight_scale": stored.float()}, rule)
    dense = codec.decompress({**packed, "weight_scale": stored.to(weight.dtype)}, rule)["weight"]
    packed["weight_scale"] = stored
    return {name: tensor.contiguous().cpu() for name, tensor in packed.items()}, dense.to(weight.dtype)


def config(grid: Grid, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of the saved `config.json`. `ignored`: full names of the linear layers left alone."""
    from compressed_tensors.quantization import QuantizationConfig

    described = QuantizationConfig(
        config_groups={"group_0": scheme(grid)}, format=FORMAT, quantization_status="compressed", ignore=ignored
    )
    return {**described.model_dump(mode="json"), "quant_method": "compressed-tensors"}


def unpacked(module: nn.Module) -> nn.Linear:
    """A plain layer from one that transformers loaded packed: no wrapper is left around its forward."""
    from compressed_tensors.compressors.base import decompress_module

    if hasattr(module, "weight_packed"):
        decompress_module(module)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if isinstance(bias, torch.Tensor):
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.train(module.training)


def open_packed(model: nn.Module, make: Callable[[nn.Module], nn.Module] = unpacked) -> None:
    """Replaces every layer that transformers loaded as compressed-tensors by `make(layer)`.

    Without it the first forward decompresses all layers and leaves a wrapper around each.
    """
    for name, module in list(model.named_modules()):
        if getattr(module, "quantization_scheme", None) is not None and isinstance(module, nn.Linear):
            model.set_submodule(name, make(module))
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
        del model.ct_decompress_hook
