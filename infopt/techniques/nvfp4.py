"""NVFP4: 4-bit floating point with an FP8 scale per 16 weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from infopt.layers import passes
from infopt.layers.grid import Grid
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import GridTechnique, Modules, Needs, Options

if TYPE_CHECKING:
    import torch

    from infopt.calibrate.blocks import Block
    from infopt.model.bundle import Bundle


class Nvfp4Options(Options):
    activations: Literal["none", "group"] = "none"
    ignore: Modules = ("lm_head",)


class Nvfp4(GridTechnique):
    """Rounds weights to E2M1 numbers (0, ½, 1, 1½, 2, 3, 4, 6) times an E4M3 scale per 16 inputs and one float32 scale.

    NVIDIA, Pretraining Large Language Models with NVFP4, arXiv 2509.25149, appendix B: 4.5 bits per weight. It is for
    devices that multiply it; elsewhere it is emulated, here and in plain transformers, at the speed of the unquantized
    model. The float32 scale is shared by the layers of one attention or feed-forward, which engines run as one matrix.

    The artifact is compressed-tensors `nvfp4-pack-quantized`, which vLLM loads. Plain transformers reads it into bfloat16
    whatever the model's dtype, so make it with `engine: {dtype: bfloat16}`; infopt opens it in any dtype.

    activations  none (default): weights only, no data. group: what enters a layer is rounded to the same numbers, with
                 an E4M3 scale per 16 features found while the model runs, and a float32 scale per layer from
                 calibration text. The head then stays as it is.
    ignore       modules left alone: globs over dotted names, or last parts such as `q_proj`; default [lm_head].
    """

    Options = Nvfp4Options
    options: Nvfp4Options

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.needs = Needs(modules=("compressed_tensors",), calibration=self.options.activations == "group")
        self.walks = self.needs.calibration

    @property
    def _grid(self) -> Grid:
        return Grid(4, 16, kind="nvfp4", activations=self.options.activations)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.layers import packing, rounding

        if self.options.activations == "none":
            return rounding.round_layers(bundle, self.options.ignore, self._grid, "nvfp4", context.progress)
        if not packing.linears(bundle, self.options.ignore):
            return bundle
        from infopt.calibrate import blocks

        return packing.finish(bundle, blocks.walk(bundle, context, self.options.ignore, self._round_block), self._grid)

    def _round_block(self, block: Block) -> None:
        """The inputs' largest magnitude sets a layer's float32 input scale, as its largest weight sets that of the weights."""
        from infopt.layers import packing, rounding, small_floats

        largest: dict[str, torch.Tensor] = {}

        def see(name: str, x: torch.Tensor) -> None:
            found = x.abs().amax()
            largest[name] = found.maximum(largest[name]) if name in largest else found

        block.observe(block.linears, see)
        for name, overall in rounding.shared_scales(block.linears).items():
            tensors, dense = packing.pack(block.linears[name].weight, self._grid, overall)
            block.pack(name, {**tensors, "input_global_scale": small_floats.global_scale(largest[name]).cpu()}, dense)

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        rounding = super().predict(shapes, before, machine)
        if self.options.activations == "none":
            return rounding
        return passes.add(rounding, before, shapes, self.calibration_tokens, machine, hessians=False)


TECHNIQUE = Nvfp4
