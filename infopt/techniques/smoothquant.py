"""SmoothQuant: outliers of activations moved into the weights, so that both fit into 8 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from infopt.layers import grid, passes
from infopt.layers.grid import Grid
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Modules, Needs, Options, Technique

if TYPE_CHECKING:
    import torch

    from infopt.calibrate.blocks import Block
    from infopt.model.bundle import Bundle

#: A channel whose largest magnitude is no more is silent; what a weight column's counts as at least.
SILENT = 1e-5
#: Strengths that `auto` tries, and about how many calibration tokens of each input it tries them on.
STRENGTHS = tuple(step / 20 for step in range(4, 21))
TOKENS = 512


class SmoothquantOptions(Options):
    strength: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    ignore: Modules = ("lm_head",)


class Smoothquant(Technique):
    """Divides each channel of a layer's input by a scale, multiplies the weight column that reads it; rounds nothing itself.

    Xiao et al., SmoothQuant, arXiv 2211.10438. With s_j = max|x_j|^α / max|w_j|^(1−α), over calibration tokens and over
    all layers that read the input, (X·diag(s)⁻¹)·(diag(s)·Wᵀ) is the product it was, and neither factor has outliers as
    large as X had. The division goes into what makes the input, a norm or a linear layer, and costs nothing at run time;
    an input whose maker cannot take it keeps its outliers. Logits change by float rounding only: put the step before
    one that rounds, rtn with bits: 8 and activations: token, or gptq.

    strength     α, 0 … 1: how much of the outliers the weights take over; the paper's is 0.5. auto (default): for each
                 input the α, or no scale at all, that costs least in its layers' outputs once weights are rounded to
                 8 bits per row and the input to 8 bits per token.
    ignore       modules left alone, as globs or last parts; default [lm_head]. An input is scaled for all its readers or
                 for none: none where every reader is ignored.
    """

    Options = SmoothquantOptions
    needs = Needs(modules=("compressed_tensors",), calibration=True)
    neutral: ClassVar = {"ignore": ["*"]}
    walks = True
    options: SmoothquantOptions

    def check(self, shapes: Shapes, path: str) -> None:
        grid.check_ignore(shapes, self.options.ignore, path)
        grid.check_inside_blocks(shapes, self.options.ignore, path)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.calibrate import blocks
        from infopt.layers import packing

        if packing.linears(bundle, self.options.ignore):
            blocks.walk(bundle, context, self.options.ignore, self._smooth_block)
        return bundle

    def _smooth_block(self, block: Block) -> None:
        import torch

        from infopt.calibrate import smoothing

        stages = [stage for stage in smoothing.stages(block) if stage.fold]
        sizes = {stage.names[0]: smoothing.Magnitude() for stage in stages}
        samples: dict[str, list[torch.Tensor]] = {name: [] for name in sizes}
        drawn, share = torch.Generator().manual_seed(block.index), TOKENS / sum(x[..., 0].numel() for x in block.inputs)

        def see(name: str, x: torch.Tensor) -> None:
            sizes[name].add(x)
            samples[name].append(x[(torch.rand(len(x), generator=drawn) < share).to(x.device)].float())

        block.observe(sizes, see)
        for names, fold in stages:
            assert fold is not None
            weight = torch.cat([block.linears[name].weight.float() for name in names])
            largest = sizes[names[0]].largest
            if self.options.strength == "auto":
                tried = [fold.tied(scale(largest, weight, strength)) for strength in STRENGTHS]
                best = cheapest(weight, torch.cat(samples[names[0]]), [torch.ones_like(largest), *tried])
            else:
                best = fold.tied(scale(largest, weight, self.options.strength))
            fold.apply(block.module, best)

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        rate, tried = machine.read_bytes_per_s, len(STRENGTHS) + 1 if self.options.strength == "auto" else 0
        seconds = shapes.linear_parameters * grid.TRAFFIC_BYTES * (1 + tried) / rate if rate else None
        step = replace(before, seconds=seconds)
        return passes.add(step, before, shapes, self.calibration_tokens, machine, passes=2, hessians=False)


def scale(largest: torch.Tensor, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """s_j = max|x_j|^α / max|w_j|^(1−α) (SmoothQuant, equation 4). `largest` max|x| [in], `weight` [out, in] → [in].

    1 for a silent channel: a tiny s would make the norm's weight for it overflow half precision.
    """
    import torch

    found = largest**strength / weight.abs().amax(0).clamp(min=SILENT) ** (1 - strength)
    return torch.where(largest > SILENT, found, 1.0)


def cheapest(weight: torch.Tensor, x: torch.Tensor, scales: list[torch.Tensor]) -> torch.Tensor:
    """Of `scales` ([in] each) the one with the least ‖Q(x/s)·Q(W·s)ᵀ − x·Wᵀ‖, Q to int8 per token of x [tokens, in] and row."""
    from torch.nn.functional import linear

    from infopt.layers import packing
    from infopt.layers.activation_linear import round_tokens

    exact = linear(x, weight)
    costs = []
    for s in scales:
        scaled = weight * s
        rounded = packing.nearest(scaled, packing.fit(scaled, Grid(8)), Grid(8))
        costs.append(float((linear(round_tokens(x / s, "int"), rounded) - exact).square().sum()))
    return scales[costs.index(min(costs))]


TECHNIQUE = Smoothquant
