"""Round to nearest: the baseline that every weight quantizer must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from infopt.layers.grid import Grid
from infopt.protocols import Context
from infopt.techniques.base import GridOptions, GridTechnique

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle


class RtnOptions(GridOptions):
    activations: Literal["none", "token", "token_asymmetric"] = "none"


class Rtn(GridTechnique):
    """Rounds each weight to the nearest point of an integer grid; no data, seconds to run.

    One scale per group of input features maps the group's range to the integers (Jacob et al., arXiv 1712.05877; with
    groups, and with activations per token, ZeroQuant, arXiv 2206.01861). The artifact is compressed-tensors
    `pack-quantized`, or `int-quantized` with activations. In memory, and in plain transformers, the weights are the
    rounded values in the model's dtype: quality and stored bytes are those of the format, speed is that of the
    unquantized model.

    bits         2, 3, 4 or 8 per weight, default 4. 8 is near lossless at twice the bytes; 2 rounded is past use.
                 vLLM runs 4 and 8; releases of compressed-tensors differ in how they pack 3 bits.
    group_size   input features that share a scale, ≥ 8, default 64; it must divide every layer's inputs. null: one scale
                 per row. Smaller is more exact and costs 16/group_size more bits per weight with 2-byte scales.
                 vLLM's kernels take 32, 64, 128 or null.
    symmetric    true (default): q·scale. false: (q − zero)·scale, closer at 4 bits and below; plain transformers 5.23
                 reads it only with `CompressedTensorsConfig(dequantize=True)`, vLLM and infopt as it is.
    activations  none (default), or what enters a layer is rounded to int8 too, dynamically per token, so that engines
                 multiply integers (W8A8); needs bits: 8 and group_size: null. token: one scale per token.
                 token_asymmetric: one scale and one zero point per token, so that no number is spent on what a token's
                 features do not reach; on the demo model 0.020 nats instead of 0.036, perplexity 1.015 instead of 1.032.
    scale_dtype  what scales are rounded to and stored in: auto (the model's dtype, the default), float32, bfloat16,
                 float16. A narrower one than the model's saves bytes; transformers' `dequantize=True` then also
                 computes the weights in it.
    ignore       modules left alone: globs over dotted names, or last parts such as `q_proj`; default [lm_head].
    """

    Options = RtnOptions
    options: RtnOptions

    @property
    def _grid(self) -> Grid:
        o = self.options
        return Grid(o.bits, o.group_size, o.scale_dtype, o.symmetric, activations=o.activations)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.layers import rounding

        return rounding.round_layers(bundle, self.options.ignore, self._grid, "rtn", context.progress)


TECHNIQUE = Rtn
