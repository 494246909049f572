"""MXFP4: 4-bit floating point with a power of two per 32 weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from infopt.layers.grid import Grid
from infopt.protocols import Context
from infopt.techniques.base import GridTechnique, Modules, Options

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle


class Mxfp4Options(Options):
    activations: Literal["none", "group"] = "none"
    ignore: Modules = ("lm_head",)


class Mxfp4(GridTechnique):
    """Rounds weights to E2M1 numbers (0, ½, 1, 1½, 2, 3, 4, 6) times a power of two per 32 inputs; no data.

    Rouhani et al., Microscaling Data Formats for Deep Learning, arXiv 2310.10537: 4.25 bits per weight. A scale that can
    only double is coarse: of equal bits, `rtn` with groups of 64 and `nvfp4` are usually closer. It is for devices that
    multiply it; elsewhere it is emulated, here and in plain transformers, at the speed of the unquantized model.

    The artifact is compressed-tensors `mxfp4-pack-quantized`, which vLLM loads. Plain transformers reads it into bfloat16
    whatever the model's dtype, so make it with `engine: {dtype: bfloat16}`; infopt opens it in any dtype.

    activations  none (default): weights only. group: what enters a layer is rounded to the same numbers, with a power of
                 two per 32 features found while the model runs. Costs much of a small model.
    ignore       modules left alone: globs over dotted names, or last parts such as `q_proj`; default [lm_head].
    """

    Options = Mxfp4Options
    options: Mxfp4Options

    @property
    def _grid(self) -> Grid:
        return Grid(4, 32, kind="mxfp4", activations=self.options.activations)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.layers import rounding

        return rounding.round_layers(bundle, self.options.ignore, self._grid, "mxfp4", context.progress)


TECHNIQUE = Mxfp4
