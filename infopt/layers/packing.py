"""Weights on an integer grid, stored as compressed-tensors `pack-quantized`: what transformers and vLLM load.

vLLM runs weight-only 4- and 8-bit integers from this format alone; its `int-quantized` kernels also quantize the
activations, with one scale per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Scales(NamedTuple):
    """How the groups of one [out, in] weight map to integers: weight ≈ (q − zero) · scale.

    `scale` float32 [out, groups], exactly the value that a reload multiplies by; `zero` float32 [out, groups] holds
    integers, None on a symmetric grid.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def columns(self, index: torch.Tensor | slice) -> Scales:
        """Those of some groups."""
        return Scales(self.scale[:, index], None if self.zero is None else self.zero[:, index])

    def rows(self, index: slice) -> Scales:
        """Those of some output rows."""
        return Scales(self.scale[index], None if self.zero is None else self.zero[index])

    def by_group(self) -> list[Scales]:
        """Each group's by itself, transposed: [1, out]."""
        return [
            Scales(self.scale[:, g][None].contiguous(), None if self.zero is None else self.zero[:, g][None].contiguous())
            for g in range(self.scale.shape[1])
        ]

    @staticmethod
    def of_groups(each: Sequence[Scales]) -> Scales:
        """What `by_group` took apart."""
        zeros = [part.zero for part in each if part.zero is not None]
        return Scales(torch.cat([part.scale for part in each]).T.contiguous(), torch.cat(zeros).T.contiguous() if zeros else None)


def scheme(grid: Grid, targets: Sequence[str] = ("Linear",)) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme(targets=list(targets), weights=_arguments(grid), format=FORMAT)


def _arguments(grid: Grid) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        strategy="group" if grid.group_size else "channel",
        group_size=grid.group_size,
    )


def fit(weight: torch.Tensor, grid: Grid, dtype: torch.dtype | None = None, shrink: torch.Tensor | float = 1.0) -> Scales:
    """The scales that map each group's range, times `shrink` ([out, groups] or a number), to the integers of `grid`.

    `dtype`: the model's, the weight's when None. A reload casts scales to it, so they are rounded to it first. Raises
    InputError for a range that the scales' dtype cannot hold.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.float().view(weight.shape[0], -1, grid.group_size or weight.shape[1])  # [out, groups, group]
    scale, zero = calculate_qparams(groups.amin(-1) * shrink, groups.amax(-1) * shrink, _arguments(grid))
    stored = _stored(scale.to(dtype or weight.dtype), grid)
    if not stored.float().isfinite().all() or not stored.float().gt(0).all():
        raise InputError(f"a weight's scale does not fit {stored.dtype}", hint="set scale_dtype: float32")
    return Scales(stored.float(), None if grid.symmetric else zero.float())


def _stored(scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    return scale if grid.scale_dtype == "auto" else scale.to(getattr(torch, grid.scale_dtype))


def nearest(weight: torch.Tensor, scales: Scales, grid: Grid) -> torch.Tensor:
    """`weight` float32 [out, n] rounded to the grid's points, float32; `scales` broadcast against it ([out, 1] or [out, n])."""
    low, high = -(1 << (grid.bits - 1)), (1 << (grid.bits - 1)) - 1
    if scales.zero is None:
        return weight.div(scales.scale).round_().clamp_(low, high).mul_(scales.scale)
    return weight.div(scales.scale).add_(scales.zero).round_().clamp_(low, high).sub_(scales.zero).mul_(scales.scale)


def spread(scales: Scales, grid: Grid, inner: int) -> Scales:
    """[out, groups] → [out, in]: the scale of every weight."""
    size = grid.group_size or inner
    return Scales(*(None if part is None else part.repeat_interleave(size, 1) for part in scales))  # type: ignore[arg-type]


@torch.no_grad()
def store(
    weight: torch.Tensor, scales: Scales, grid: Grid, dtype: torch.dtype | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rounds one [out, in] weight to the points that `scales` span.

    Returns the tensors to store (`weight_packed`, `weight_scale`, `weight_shape`, and `weight_zero_point` where there is
    one) and the dequantized weight, in `dtype` (the model's, the weight's when None), bit for bit as a reload makes it.
    """
    from compressed_tensors.compressors import BaseCompressor

    dtype = dtype or weight.dtype
    rule, codec = scheme(grid), BaseCompressor.get_value_from_registry(FORMAT)
    state = {"weight": weight.float(), "weight_scale": scales.scale}
    if scales.zero is not None:
        state["weight_zero_point"] = scales.zero.to(torch.int8)
    packed = codec.compress(state, rule)
    dense = codec.decompress({**packed, "weight_scale": scales.scale.to(dtype)}, rule)["weight"]
    packed["weight_scale"] = _stored(scales.scale.to(dtype), grid)
    return {name: tensor.contiguous().cpu() for name, tensor in packed.items()}, dense.to(dtype)


def pack(weight: torch.Tensor, grid: Grid) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rounds one [out, in] weight to the nearest points of `grid`. Returns what `store` returns."""
    return store(weight, fit(weight, grid), grid)


def config(grids: Mapping[str, Grid] | Grid, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of the saved `config.json`.

    `grids`: one for every linear layer, or module names with theirs. `ignored`: full names of the linear layers left alone.
    """
    from compressed_tensors.quantization import QuantizationConfig

    if isinstance(grids, Grid):
        groups = {"group_0": scheme(grids)}
    else:
        names: dict[Grid, list[str]] = {}
        for name, grid in grids.items():
            names.setdefault(grid, []).append(name)
        groups = {f"group_{i}": scheme(grid, targets) for i, (grid, targets) in enumerate(names.items())}
        if len(groups) == 1:
            groups = {"group_0": scheme(next(iter(names)))}
    described = QuantizationConfig(config_groups=groups, format=FORMAT, quantization_status="compressed", ignore=ignored)
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
