"""AWQ: weights that meet large activations are scaled up before rounding, where rounding costs them less."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from infopt.layers import grid, passes
from infopt.layers.grid import Grid, ScaleDType
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Modules, Needs, Options, Technique

if TYPE_CHECKING:
    import torch

    from infopt.calibrate.blocks import Block
    from infopt.calibrate.smoothing import Fold
    from infopt.model.bundle import Bundle

#: Shares of a group's range that clipping tries, and |x| below which a channel counts as silent (the paper's code).
CLIPS = tuple(1 - step / 20 for step in range(10))
SILENT = 1e-4


class AwqOptions(Options):
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(default=64, ge=8)
    symmetric: bool = True
    points: int = Field(default=20, ge=1)
    clip: bool = True
    scale_dtype: ScaleDType = "auto"
    ignore: Modules = ("lm_head",)


class Awq(Technique):
    """Scales weights that meet large activations up before rounding, and the activations down, so that rounding costs less.

    Lin et al., AWQ, arXiv 2306.00978. Q(W·diag(s))·(diag(s)⁻¹·x) rounds what is read from channel j about s_j times finer,
    as long as s moves the range of no group. For each input of a block s = mean|x|^α, with the one α for which the
    layers that read it change their outputs least on calibration tokens; diag(s)⁻¹ goes into what makes the input, a norm or
    a linear layer, and costs nothing at run time. Then each group's range is cut where that costs the layer's output less,
    and the weights are rounded to nearest. The cost of an error Δ is tr(Δ·H·Δᵀ) with H = 2·E[x·xᵀ] of all tokens, so no
    token is run twice. Minutes on a small model; the artifact is that of `rtn`, with other norms.

    bits         2, 3, 4 or 8 per weight, default 4.
    group_size   input features that share a scale, ≥ 8, default 64; must divide every layer's inputs. null: per row.
    symmetric    true (default): q·scale. false: (q − zero)·scale, closer at 3 bits and below.
    points       values of α tried for each input, 0, 1/points, … below 1; default 20. 1 tries none: no scaling.
    clip         cut ranges, down to half of them; default true.
    scale_dtype  what scales are stored in: auto (the model's dtype, default), float32, bfloat16, float16.
    ignore       modules that are not rounded, as globs or last parts; default [lm_head]. One that shares its input with
                 layers that are takes part in the scaling, which leaves its output as it was.
    """

    Options = AwqOptions
    needs = Needs(modules=("compressed_tensors",), calibration=True)
    neutral: ClassVar = {"ignore": ["*"]}
    options: AwqOptions

    @property
    def _grid(self) -> Grid:
        o = self.options
        return Grid(o.bits, o.group_size, o.scale_dtype, o.symmetric)

    def check(self, shapes: Shapes, path: str) -> None:
        grid.check_ignore(shapes, self.options.ignore, path)
        grid.check_groups(grid.chosen(shapes, self.options.ignore), self.options.group_size, f"{path}.group_size")

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.calibrate import blocks
        from infopt.layers import packing

        if not packing.linears(bundle, self.options.ignore):
            return bundle
        packed = blocks.walk(bundle, context, self.options.ignore, self._round_block)
        return replace(bundle, packed=packed, save_config=packing.config(self._grid, packing.left_alone(bundle.model, packed)))

    def _round_block(self, block: Block) -> None:
        import torch

        from infopt.calibrate import smoothing
        from infopt.calibrate.hessian import Hessian
        from infopt.calibrate.smoothing import Magnitude
        from infopt.layers import packing

        stages = smoothing.stages(block)
        seen = {stage.names[0]: (Hessian(), Magnitude()) for stage in stages}

        def see(name: str, x: torch.Tensor) -> None:
            for statistic in seen[name]:
                statistic.add(x)

        block.observe(seen, see)
        # Scales of one input do not change what another's weights cost: all are found, then all weights rounded.
        hessians = {}
        for names, fold in stages:
            hessian, magnitude = seen.pop(names[0])
            hessians[names] = moments = hessian.mean()
            if fold:
                weight = torch.cat([block.linears[name].weight.float() for name in names])
                scale = best_scale(weight, moments, magnitude.mean, fold, self._grid, self.options.points)
                fold.apply(block.module, scale)
                moments.div_(scale).div_(scale[:, None])
        for names, moments in hessians.items():
            for name in names:
                weight = block.linears[name].weight
                shrink = best_clip(weight.float(), moments, self._grid) if self.options.clip else 1.0
                scales = packing.fit(weight.float(), self._grid, weight.dtype, shrink)
                block.pack(name, *packing.store(weight, scales, self._grid))

    def reopen(self, bundle: Bundle) -> Bundle:
        from infopt.layers import packing

        packing.open_packed(bundle.model)
        return bundle

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        rounding = grid.predict(self._grid, grid.chosen(shapes, self.options.ignore), shapes, before, machine)
        return passes.add(rounding, before, shapes, self.calibration_tokens, machine, passes=2)


def best_scale(
    weight: torch.Tensor, hessian: torch.Tensor, mean: torch.Tensor, fold: Fold, rule: Grid, points: int
) -> torch.Tensor:
    """s = mean|x|^α with the α in {0, 1/points, …} that costs least once W·s is rounded (AWQ, equations 4 and 5).

    `weight` [out, in] of all layers that read the input; `hessian` 2·E[x·xᵀ], so that the cost E‖(Q(W·s)/s − W)·x‖² is
    half of tr(Δ·H·Δᵀ). float32, [in]; 1 everywhere is α = 0.
    """
    size = fold.tied(mean.clamp(min=SILENT))
    tried = [size ** (point / points) for point in range(points)]
    tried = [scale / (scale.max() * scale.min()).sqrt() for scale in tried]
    costs = [float(cost(rounded(weight * scale, rule) / scale - weight, hessian)) for scale in tried]
    return tried[costs.index(min(costs))]


def best_clip(weight: torch.Tensor, hessian: torch.Tensor, rule: Grid) -> torch.Tensor:
    """[out, groups]: the share of each group's range whose loss costs that group's outputs least (the paper's code)."""
    import torch

    size = rule.group_size or weight.shape[1]
    groups = weight.shape[1] // size
    own = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, weight.shape[1], size)])
    best = torch.ones(len(weight), groups, device=weight.device)
    least = torch.full_like(best, float("inf"))
    for clip in CLIPS:
        error = (rounded(weight, rule, clip) - weight).view(len(weight), groups, size)
        found = torch.einsum("rgi,gij,rgj->rg", error, own, error)
        best, least = torch.where(found < least, clip, best), torch.minimum(found, least)
    return best


def rounded(weight: torch.Tensor, rule: Grid, shrink: torch.Tensor | float = 1.0) -> torch.Tensor:
    from infopt.layers import packing

    return packing.nearest(weight, packing.spread(packing.fit(weight, rule, shrink=shrink), rule, weight.shape[1]), rule)


def cost(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(Δ·H·Δᵀ)"""
    return (error @ hessian).mul_(error).sum()


TECHNIQUE = Awq
