"""Weight-only int8, int4 and float8 by optimum-quanto."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from infopt.layers import grid
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Modules, Needs, Options, Technique

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle


class QuantoOptions(Options):
    weights: Literal["int8", "int4", "float8"] = "int8"
    ignore: Modules = ("lm_head",)


class Quanto(Technique):
    """Linear layers over weights in 8-bit integers, 4-bit integers or 8-bit floats; activations stay as they are.

    int8 and float8 have one scale per output row, int4 one scale and zero point per group of 128 weights of a row,
    or fewer where 128 does not divide. The weights are dequantized whenever a layer runs, so this saves memory, not
    time. Rounding is to nearest (Jacob et al., arXiv 1712.05877); the library is in maintenance mode.

    weights  int8 (default), int4 (needs a C++ compiler: its unpacking compiles at first use, minutes on a small
             machine, and is kept inside the library's folder), or float8 (e4m3).
    ignore   modules left alone: globs over dotted names, or last parts such as `q_proj`; default [lm_head].

    Applied at load: plain transformers reads quanto's own files only with the same library and version.
    """

    Options = QuantoOptions
    needs = Needs(modules=("optimum.quanto",), compiler=True)
    neutral: ClassVar = {"ignore": ["*"]}
    at_load = True
    options: QuantoOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.needs = replace(Quanto.needs, compiler=self.options.weights == "int4")

    def check(self, shapes: Shapes, path: str) -> None:
        grid.check_ignore(shapes, self.options.ignore, path)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        import torch
        from optimum import quanto

        from infopt.layers.quanto_extension import ready

        if self.options.weights == "int4":
            ready(bundle.device, context.progress)
        chosen = [
            name
            for name, module in bundle.model.named_modules()
            if type(module) is torch.nn.Linear and not grid.is_ignored(name, self.options.ignore)
        ]
        if chosen:
            quanto.quantize(bundle.model, weights=quanto.qtypes[f"q{self.options.weights}"], include=chosen)
            quanto.freeze(bundle.model)
            for name in chosen:
                _leave_inference_mode(bundle.model.get_submodule(name))
        return bundle

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        """Stored bytes stay: the step runs after loading."""
        layers = grid.chosen(shapes, self.options.ignore).values()
        weights = sum(out * inner for out, inner in layers)
        rate = machine.read_bytes_per_s
        return replace(
            before, peak_bytes=before.peak_bytes + 2 * weights, seconds=weights * grid.TRAFFIC_BYTES / rate if rate else None
        )


def _leave_inference_mode(layer: Any) -> None:
    """int4 weights are transposed as a tensor subclass, which torch refuses in inference mode."""
    import torch

    forward = layer.forward

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            y: torch.Tensor = forward(x)
        return y

    layer.forward = run


TECHNIQUE = Quanto
