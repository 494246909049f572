"""Weights on a grid, stored in a format of compressed-tensors: what transformers, vLLM and SGLang load.

vLLM runs weight-only 4- and 8-bit integers from `pack-quantized` alone; its `int-quantized` and `float-quantized` kernels
also quantize the activations, with one scale per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from infopt.errors import InputError
from infopt.layers import small_floats
from infopt.layers.activation_linear import ActivationLinear
from infopt.layers.grid import Grid, Kind, is_ignored

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from infopt.model.bundle import Bundle

#: Shares of a group's range that are tried as its scale's.
CUTS = tuple(1 - step / 20 for step in range(11))


def linears(bundle: Bundle, ignore: Iterable[str]) -> dict[str, nn.Linear]:
    """The layers to quantize, by dotted name.

    Raises InputError for a model that is quantized already, for one all of whose layers are of a class of their own, which
    transformers may not load packed, and for a mixture of experts: it loads packed layers only where the experts, which are
    no `nn.Linear`, are packed too.
    """
    if bundle.save_config and not bundle.packed:
        raise InputError("the model's KV scales are recorded already", hint="move kv_cache to the end of the recipe")
    if bundle.save_config or bundle.packed or getattr(bundle.model, "hf_quantizer", None) is not None:
        raise InputError("the model's weights are quantized already", hint="keep one quantizing step in the recipe")
    if any(".experts." in name for name, _ in bundle.model.named_parameters()):
        raise InputError("a mixture of experts cannot be packed: its experts are not linear layers", hint="the bf16 recipe")
    patterns = tuple(ignore)
    modules = ((name, module) for name, module in bundle.model.named_modules() if isinstance(module, nn.Linear))
    wanted = {name: module for name, module in modules if not is_ignored(name, patterns)}
    found = {name: module for name, module in wanted.items() if type(module) is nn.Linear}
    if wanted and not found:
        kinds = ", ".join(sorted({type(module).__name__ for module in wanted.values()}))
        raise InputError(
            f"{type(bundle.model).__name__} has no linear layers that can be packed: {kinds}", hint="the bf16 recipe"
        )
    return found


def left_alone(model: nn.Module, packed: Mapping[str, Any]) -> list[str]:
    """Full names of the linear layers that stay as they are; engines match them one by one."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]


class Scales(NamedTuple):
    """How the groups of one [out, in] weight map to the numbers of a grid: weight ≈ (q − zero) · scale.

    `scale` float32 [out, groups], exactly the value that a reload multiplies by; `zero` float32 [out, groups] holds
    integers, None on a symmetric grid. `overall` float32 [1]: nvfp4's scale of the layer, which `scale` is divided by
    already.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    overall: torch.Tensor | None = None

    def columns(self, index: torch.Tensor | slice) -> Scales:
        """Those of some groups."""
        return Scales(self.scale[:, index], None if self.zero is None else self.zero[:, index], self.overall)

    def rows(self, index: slice) -> Scales:
        """Those of some output rows."""
        return Scales(self.scale[index], None if self.zero is None else self.zero[index], self.overall)

    def by_group(self) -> list[Scales]:
        """Each group's by itself, transposed: [1, out]."""
        scales = self.scale.T.contiguous()[:, None]
        zeros = [None] * len(scales) if self.zero is None else self.zero.T.contiguous()[:, None]
        return [Scales(scale, zero, self.overall) for scale, zero in zip(scales, zeros, strict=True)]

    @staticmethod
    def of_groups(each: Sequence[Scales]) -> Scales:
        """What `by_group` took apart."""
        zeros = [part.zero for part in each if part.zero is not None]
        zero = torch.cat(zeros).T.contiguous() if zeros else None
        return Scales(torch.cat([part.scale for part in each]).T.contiguous(), zero, each[0].overall)


def scheme(grid: Grid, targets: Sequence[str] = ("Linear",)) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationScheme

    inputs = None if grid.activations == "none" else _arguments(grid, is_input=True)
    return QuantizationScheme(targets=list(targets), weights=_arguments(grid), input_activations=inputs, format=grid.format)


def _arguments(grid: Grid, *, is_input: bool = False) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    named: dict[str, Any] = {"num_bits": grid.bits, "type": "int" if grid.kind == "int" else "float"}
    if grid.kind == "mxfp4":
        named |= {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    elif grid.kind == "nvfp4":
        named |= {"strategy": "tensor_group", "group_size": 16}
        named |= {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
    elif is_input:
        named |= {"strategy": "token", "symmetric": grid.activations != "token_asymmetric"}
    else:
        named |= {"strategy": "group", "group_size": grid.group_size} if grid.group_size else {"strategy": "channel"}
        named["symmetric"] = grid.symmetric
    if is_input:
        named["dynamic"] = "local" if grid.kind == "nvfp4" else True
    return QuantizationArgs(**named)


def fit(
    weight: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype | None = None,
    shrink: torch.Tensor | float = 1.0,
    overall: torch.Tensor | None = None,
) -> Scales:
    """The scales that map each group's range, times `shrink` ([out, groups] or a number), to the numbers of `grid`.

    `dtype`: the model's, the weight's when None. A reload casts scales to it, so they are rounded to it first. `overall`:
    nvfp4's scale of the layer, fitted to it when None. Raises InputError for a range that the scales' dtype cannot hold.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.float().view(weight.shape[0], -1, grid.group_size or weight.shape[1])  # [out, groups, group]
    low, high = groups.amin(-1) * shrink, groups.amax(-1) * shrink
    if grid.kind == "mxfp4":
        return Scales(small_floats.power_of_two(torch.maximum(-low, high)))
    if grid.kind == "nvfp4":
        overall = small_floats.global_scale(weight) if overall is None else overall
        return Scales(small_floats.scale_of_16(torch.maximum(-low, high), overall) / overall, None, overall)
    scale, zero = calculate_qparams(low, high, _arguments(grid))
    stored = _stored(scale.to(dtype or weight.dtype), grid)
    if not stored.float().isfinite().all() or not stored.float().gt(0).all():
        raise InputError(f"a weight's scale does not fit {stored.dtype}", hint="set scale_dtype: float32")
    return Scales(stored.float(), None if grid.symmetric else zero.float())


def fit_cut(weight: torch.Tensor, importance: torch.Tensor, grid: Grid, dtype: torch.dtype | None = None) -> Scales:
    """Scales whose ranges are cut where that costs least: in each row and group the cut, of `CUTS`, with the smallest
    Σ_j importance_j·(w_j − q_j)². `weight` float32 [out, in], `importance` [in]."""
    groups = weight.view(len(weight), -1, grid.group_size or weight.shape[1])  # [out, groups, group]
    importance = importance.view(1, *groups.shape[1:])
    best = torch.ones(groups.shape[:2], device=weight.device)
    least = torch.full_like(best, math.inf)
    for cut in CUTS:
        error = rounded(weight, fit(weight, grid, dtype, cut), grid).view_as(groups).sub_(groups)
        cost = error.square_().mul_(importance).sum(-1)
        best, least = torch.where(cost < least, cut, best), torch.minimum(cost, least)
    return fit(weight, grid, dtype, best)


def _stored(scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    return scale if grid.scale_dtype == "auto" else scale.to(getattr(torch, grid.scale_dtype))


def nearest(weight: torch.Tensor, scales: Scales, grid: Grid) -> torch.Tensor:
    """`weight` float32 [out, n] rounded to the grid's points, float32; `scales` broadcast against it ([out, 1] or [out, n])."""
    if grid.kind != "int":
        rounding = small_floats.round_e4m3 if grid.kind == "fp8" else small_floats.round_e2m1
        return rounding(weight.div(scales.scale)).mul_(scales.scale)
    low, high = -(1 << (grid.bits - 1)), (1 << (grid.bits - 1)) - 1
    if scales.zero is None:
        return weight.div(scales.scale).round_().clamp_(low, high).mul_(scales.scale)
    return weight.div(scales.scale).add_(scales.zero).round_().clamp_(low, high).sub_(scales.zero).mul_(scales.scale)


def rounded(weight: torch.Tensor, scales: Scales, grid: Grid) -> torch.Tensor:
    """`weight` float32 [out, in] at the nearest of the points that `scales` ([out, groups]) span, float32."""
    scale, zero, overall = scales
    each = Scales(scale[..., None], None if zero is None else zero[..., None], overall)
    return nearest(weight.view(*scale.shape, -1), each, grid).view_as(weight)


def spread(scales: Scales, grid: Grid, inner: int) -> Scales:
    """[out, groups] → [out, in]: the scale of every weight."""
    size = grid.group_size or inner
    zero = None if scales.zero is None else scales.zero.repeat_interleave(size, 1)
    return Scales(scales.scale.repeat_interleave(size, 1), zero, scales.overall)


@torch.no_grad()
def store(
    weight: torch.Tensor, scales: Scales, grid: Grid, dtype: torch.dtype | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rounds one [out, in] weight to the points that `scales` span.

    Returns the tensors to store (`weight_packed` or `weight`, `weight_scale`, and what else the format has) and the
    dequantized weight, in `dtype` (the model's, the weight's when None), bit for bit as a reload makes it.
    """
    from compressed_tensors.compressors import BaseCompressor

    dtype = dtype or weight.dtype
    rule, codec = scheme(grid), BaseCompressor.get_value_from_registry(grid.format)
    state = {"weight": weight.float(), "weight_scale": scales.scale}
    if scales.zero is not None:
        _require_readable_zeros(scales.zero, grid)
        state["weight_zero_point"] = scales.zero.to(torch.int8)
    if scales.overall is not None:
        state |= {"weight_scale": scales.scale * scales.overall, "weight_global_scale": scales.overall.clone()}
    packed = codec.compress(state, rule)
    if grid.kind in ("int", "fp8"):
        packed["weight_scale"] = scales.scale.to(dtype)
    dense = codec.decompress(packed, rule)["weight"]
    if grid.kind in ("int", "fp8"):
        packed["weight_scale"] = _stored(packed["weight_scale"], grid)
    return {name: tensor.contiguous().cpu() for name, tensor in packed.items()}, dense.to(dtype)


def _require_readable_zeros(zero: torch.Tensor, grid: Grid) -> None:
    """compressed-tensors 0.20 fails to unpack the 4-bit zero points of several groups from a single word a group."""
    if grid.bits == 4 and zero.shape[0] <= 8 and zero.shape[1] > 1:
        raise InputError(
            f"a layer of {zero.shape[0]} outputs cannot have 4-bit zero points, which compressed-tensors would not read back",
            hint="add it to ignore, or set symmetric: true",
        )


def pack(weight: torch.Tensor, grid: Grid, overall: torch.Tensor | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rounds one [out, in] weight to the nearest points of `grid`. Returns what `store` returns."""
    return store(weight, fit(weight, grid, overall=overall), grid)


def finish(bundle: Bundle, packed: dict[str, dict[str, torch.Tensor]], grids: Mapping[str, Grid] | Grid) -> Bundle:
    """The bundle whose layers were rounded in place, with what is stored of them: `packed`, by layer.

    They round their inputs from now on, where their grid says so. `grids`: one for all, or each layer's, of weights alone.
    """
    described = config(grids, left_alone(bundle.model, packed))
    if isinstance(grids, Grid):
        activate(bundle.model, packed, grids)
    return replace(bundle, packed=packed, save_config=described)


def activate(model: nn.Module, packed: Mapping[str, Mapping[str, torch.Tensor]], grid: Grid) -> None:
    """Lets the linear layers `packed` round their inputs as `grid.activations` says; they keep their weights.

    Of what is stored of a layer, nvfp4's calibrated float32 scale of its input, [1], takes part.
    """
    if grid.activations == "none":
        return
    for name, tensors in packed.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        scale = tensors.get("input_global_scale")
        overall = None if scale is None else scale.to(linear.weight.device)
        is_symmetric = grid.activations != "token_asymmetric"
        model.set_submodule(name, ActivationLinear(linear, grid.kind, overall, is_symmetric=is_symmetric))


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
    formats = {str(group.format) for group in groups.values()}
    described = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=ignored,
    )
    return {**described.model_dump(mode="json"), "quant_method": "compressed-tensors"}


def with_kv_cache(config: dict[str, Any] | None, bits: int, strategy: str) -> dict[str, Any]:
    """`config`, or one of unpacked weights, that also says how keys and values are kept: 8 bits E4M3, fewer integers.

    `strategy`: `tensor`, or `attn_head` for a scale per key/value head.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

    kept = QuantizationArgs(num_bits=bits, type="float" if bits == 8 else "int", strategy=strategy, dynamic=False)
    if config is None:
        bare = QuantizationConfig(config_groups={}, format="dense", quantization_status="compressed")
        config = {**bare.model_dump(mode="json"), "quant_method": "compressed-tensors"}
    return {**config, "kv_cache_scheme": kept.model_dump(mode="json")}


def unpacked(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A layer from one that transformers loaded compressed, in `dtype`: no wrapper is left around its forward.

    Plain, or with its inputs rounded where its scheme says so.
    """
    from compressed_tensors.compressors.base import decompress_module
    from compressed_tensors.quantization import QuantizationStatus

    if module.quantization_status == QuantizationStatus.COMPRESSED:
        decompress_module(module)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta").train(module.training)
    linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if isinstance(bias, torch.Tensor):
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    found: Any = module
    inputs = found.quantization_scheme.input_activations
    if inputs is None:
        return linear
    kinds: dict[tuple[str, int, int | None], Kind] = {
        ("int", 8, None): "int", ("float", 8, None): "fp8", ("float", 4, 32): "mxfp4", ("float", 4, 16): "nvfp4",
    }  # fmt: skip
    kind, scale = kinds[inputs.type, inputs.num_bits, inputs.group_size], getattr(module, "input_global_scale", None)
    return ActivationLinear(linear, kind, None if scale is None else scale.data, is_symmetric=inputs.symmetric)


def open_packed(model: nn.Module, make: Callable[[nn.Module], nn.Module] | None = None) -> None:
    """Replaces every layer that transformers loaded as compressed-tensors by `make(layer)`, `unpacked` unless given.

    Without it the first forward decompresses all layers and leaves a wrapper around each.
    """
    dtype = next(model.parameters()).dtype  # the embedding's, which is never packed
    for name, module in list(model.named_modules()):
        if getattr(module, "quantization_scheme", None) is not None and isinstance(module, nn.Linear):
            model.set_submodule(name, make(module) if make else unpacked(module, dtype))
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
        del model.ct_decompress_hook
