"""FP8 weights, and FP8 activations per token: what current GPUs multiply at twice the rate of bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from infopt.layers.grid import Grid, ScaleDType
from infopt.protocols import Context
from infopt.techniques.base import GridTechnique, Modules, Options

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle


class Fp8Options(Options):
    activations: Literal["none", "token"] = "token"
    scale_dtype: ScaleDType = "auto"
    ignore: Modules = ("lm_head",)


class Fp8(GridTechnique):
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
    options: Fp8Options

    @property
    def _grid(self) -> Grid:
        return Grid(8, None, self.options.scale_dtype, kind="fp8", activations=self.options.activations)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.layers import rounding

        return rounding.round_layers(bundle, self.options.ignore, self._grid, "fp8", context.progress)


TECHNIQUE = Fp8
