"""Int8 weights, one scale per output row, run from int8."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from infopt.layers import grid
from infopt.layers.grid import Grid
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Modules, Needs, Options, Technique

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

#: bfloat16 scales, because the fast product takes its scales in bfloat16: weights are rounded against what is used.
GRID = Grid(bits=8, group_size=None, scale_dtype="bfloat16")


class Int8Options(Options):
    activations: Literal["none", "group"] = "none"
    activation_group: int = Field(default=64, ge=8)
    ignore: Modules = ("lm_head",)


class Int8(Technique):
    """Symmetric int8 weights with one scale per output row, kept as int8 in memory and multiplied from there.

    LLM.int8() (arXiv 2208.07339) and ZeroQuant (arXiv 2206.01861) show that weights survive 8 bits per row while
    activations do not survive one scale per tensor: outlier features need their own scale. Here activations stay in
    floating point, or get one scale per group of features of each token.

    The artifact is compressed-tensors `pack-quantized`, weight-only: plain transformers dequantizes it when it first
    runs, vLLM runs it from int8, infopt puts its int8 layers back. Steps of at most 16 rows (decode) use torch's int8
    product, which rounds activations to bfloat16 (8 bits of mantissa); more rows (prefill) dequantize block by block.

    activations       none (default): int8 weights only. group: activations are rounded to int8 too, dynamically, which
                      is what int8 hardware multiplies; in stock torch it is emulated, so it costs quality and a little
                      speed, and shows what the model would answer on such hardware.
    activation_group  input features of one token that share a scale, ≥ 8, default 64; must divide every layer's inputs.
                      Smaller follows outliers more closely.
    ignore            modules left alone: globs over dotted names, or last parts such as `q_proj`; default [lm_head].

    Reload tolerance: plain transformers runs the same weights without any rounding of activations. Logits move by
    what bfloat16 (activations: none) or int8 per group (activations: group) does to them.
    """

    Options = Int8Options
    needs = Needs(modules=("compressed_tensors",))
    packs = True
    neutral: ClassVar = {"ignore": ["*"]}
    options: Int8Options

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.reload_tolerance = 8.0 if self.group else 0.5

    @property
    def group(self) -> int | None:
        """Input features per activation scale; None: activations are not rounded."""
        return self.options.activation_group if self.options.activations == "group" else None

    def check(self, shapes: Shapes, path: str) -> None:
        grid.check_ignore(shapes, self.options.ignore, path)
        grid.check_groups(grid.chosen(shapes, self.options.ignore), self.group, f"{path}.activation_group")

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.layers import packing
        from infopt.layers.int8_linear import Int8Linear, unpack_bytes

        layers = packing.linears(bundle, self.options.ignore)
        kept = packing.left_alone(bundle.model, layers)
        packed = {}
        for done, (name, layer) in enumerate(layers.items(), 1):
            context.progress(f"int8 {done}/{len(layers)} {name}")
            weight = layer.weight
            packed[name], _ = packing.pack(weight, GRID)
            scale = packed[name]["weight_scale"] = packed[name]["weight_scale"].to(weight.dtype)
            q = unpack_bytes(packed[name]["weight_packed"], tuple(weight.shape)).to(weight.device)
            bias = None if layer.bias is None else layer.bias.data
            bundle.model.set_submodule(name, Int8Linear(q, scale.to(weight.device), bias, self.group))
        if not packed:
            return bundle
        return replace(bundle, packed=packed, save_config=packing.config(GRID, kept))

    def reopen(self, bundle: Bundle) -> Bundle:
        from infopt.layers.int8_linear import swap

        swap(bundle.model, self.group)
        return bundle

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        return grid.predict(replace(GRID, scale_dtype="auto"), grid.chosen(shapes, self.options.ignore), shapes, before, machine)


TECHNIQUE = Int8
