"""FP8 weights, and FP8 activations per token: what current GPUs multiply at twice the rate of bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from infopt.layers import grid
from infopt.layers.grid import Grid, ScaleDType
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Modules, Needs, Options, Technique

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle


class Fp8Options(Options):
    activations: Literal["none", "token"] = "token"
    scale_dtype: ScaleDType = "auto"
    ignore: Modules = ("lm_head",)


class Fp8(Technique):
    """Rounds weights, and what enters each layer, to 8-bit floating point (E4M3); no data, seconds to run.

    Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433. Weights have one scale per output row;
    activations, whose outliers int8 loses, one per token, found while the model runs. Being floating point, E4M3 spends
    its 8 bits where the numbers are: 3 bits of mantissa near zero as at the largest. Int8 is finer for even ranges.

    The artifact is compressed-tensors `float-quantized`, which plain transformers, vLLM and SGLang load; they multiply in
    FP8 where the device can. In infopt and in plain transformers the rounding is exact and the product is in the
    model's dtype: quality is that of FP8, speed that of the unquantized model.

    activations  token (default): one scale per token. none: weights only.
    scale_dtype  what scales are rounded to and stored in: auto (the model's dtype, default), float32, bfloat16, float16.
    ignore       modules left alone: globs over dotted names, or last parts such as `q_proj`; default [lm_head].
    """

    Options = Fp8Options
    needs = Needs(modules=("compressed_tensors",))
    neutral: ClassVar = {"ignore": ["*"]}
    options: Fp8Options

    @property
    def _grid(self) -> Grid:
        return Grid(8, None, self.options.scale_dtype, kind="fp8", activations=self.options.activations)

    def check(self, shapes: Shapes, path: str) -> None:
        grid.check_ignore(shapes, self.options.ignore, path)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.layers import rounding

        return rounding.round_layers(bundle, self.options.ignore, self._grid, "fp8", context.progress)

    def reopen(self, bundle: Bundle) -> Bundle:
        from infopt.layers import packing

        packing.open_packed(bundle.model)
        return bundle

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        return grid.predict(self._grid, grid.chosen(shapes, self.options.ignore), shapes, before, machine)


TECHNIQUE = Fp8
