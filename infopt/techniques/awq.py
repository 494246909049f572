"""AWQ: weights that meet large activations are scaled up before rounding, where rounding costs them less."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from infopt.layers import grid, passes
from infopt.layers.grid import Grid
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import GridOptions, GridTechnique, Needs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from infopt.calibrate.blocks import Block
    from infopt.calibrate.smoothing import Fold
    from infopt.model.bundle import Bundle

#: Shares of a group's range that clipping tries, and the mean |x| up to which a channel is silent (the paper's code).
CUTS = tuple(1 - step / 20 for step in range(10))
SILENT = 1e-4
TINY = 1e-6


class AwqOptions(GridOptions):
    points: int = Field(default=10, ge=1)
    clip: bool = True


class Awq(GridTechnique):
    """Scales weights that meet large activations up before rounding, and the activations down, so that rounding costs less.

    Lin et al., AWQ, arXiv 2306.00978. Q(W·diag(s))·(diag(s)⁻¹·x) rounds what is read from channel j about s_j times finer,
    as long as s moves the range of no group. For each input of a block s is mean|x|^α, or that ÷ w^(1 − α) with w how near a
    column comes to the ranges of its groups, whichever form and α change the outputs of the layers that read it least on
    calibration tokens; diag(s)⁻¹ goes into what makes the input, a norm or a linear layer, and costs nothing at run time.
    Each group's range is cut where that costs the output less. The cost of an error Δ is tr(Δ·H·Δᵀ) with H = 2·E[x·xᵀ] of
    all tokens, so no token is run again. Three things differ from the paper's code, all for less error: s may follow the
    weights too, α is judged with ranges cut, not before, and groups of a row are cut with the others' errors in view, not
    each by itself. Minutes on a small model; the artifact is that of `rtn`, with other norms.

    bits         2, 3, 4 or 8 per weight, default 4.
    group_size   input features that share a scale, ≥ 8, default 64; must divide every layer's inputs. null: per row.
    symmetric    true (default): q·scale. false: (q − zero)·scale, closer at 3 bits and below.
    points       values of α tried for each input in either form, 0, 1/points, … below 1; default 10. 1: no scaling.
    clip         cut ranges, by up to 45 %; default true.
    scale_dtype  what scales are stored in: auto (the model's dtype, default), float32, bfloat16, float16.
    ignore       modules that are not rounded, as globs or last parts; default [lm_head]. One that shares its input with
                 layers that are takes part in the scaling, which leaves its output as it was.
    """

    Options = AwqOptions
    needs = Needs(modules=("compressed_tensors",), calibration=True)
    walks = True
    options: AwqOptions

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.calibrate import blocks
        from infopt.layers import packing

        if not packing.linears(bundle, self.options.ignore):
            return bundle
        return packing.finish(bundle, blocks.walk(bundle, context, self.options.ignore, self._round_block), self._grid)

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
                scale = best_scale(weight, moments, magnitude.mean, fold, self._grid, self.options.points, self.options.clip)
                fold.apply(block.module, scale)
                moments.div_(scale).div_(scale[:, None])
        for names, moments in hessians.items():
            for name in names:
                weight = block.linears[name].weight
                scales = packing.fit(weight, self._grid, shrink=self._shrink(weight.float(), moments))
                block.pack(name, *packing.store(weight, scales, self._grid))

    def _shrink(self, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor | float:
        if not self.options.clip:
            return 1.0
        return refined(best_cut(weight, hessian, self._grid), weight, hessian, self._grid)

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        layers, rate, points = grid.chosen(shapes, self.options.ignore), machine.read_bytes_per_s, self.options.points
        step = grid.predict(self._grid, layers, shapes, before, machine)
        if step.seconds is not None and rate:
            scales = points * min(points, 2)
            tried = scales * len(CUTS[::2]) + 2 * len(CUTS) if self.options.clip else scales
            moved = tried * grid.TRAFFIC_BYTES * sum(out * inner for out, inner in layers.values())
            step = replace(step, seconds=step.seconds + moved / rate)
        return passes.add(step, before, shapes, self.calibration_tokens, machine, passes=2)


def best_scale(
    weight: torch.Tensor, hessian: torch.Tensor, mean: torch.Tensor, fold: Fold, rule: Grid, points: int, clip: bool
) -> torch.Tensor:
    """s, float32 [in], of those tried the one that costs least once W·s is cut and rounded.

    `weight` [out, in] of all layers that read the input; `hessian` 2·E[x·xᵀ], so that the cost E‖(Q(W·s)/s − W)·x‖² is half
    of tr(Δ·H·Δᵀ); `mean` |x| by channel.
    """
    import torch

    best, least = torch.ones_like(mean), float("inf")
    for scale in tried_scales(weight, mean, fold, rule, points):
        scaled = weight * scale
        shrink = best_cut(scaled, hessian, rule, CUTS[::2], scale) if clip else 1.0
        found = cost(to_nearest(scaled, rule, shrink).div_(scale) - weight, hessian)
        if found < least:
            best, least = scale, found
    return best


def tried_scales(weight: torch.Tensor, mean: torch.Tensor, fold: Fold, rule: Grid, points: int) -> Iterator[torch.Tensor]:
    """mean|x|^α for α in {0, 1/points, …} (AWQ, equation 5), then mean|x|^α ÷ w^(1 − α), each around 1.

    One point is no scaling.

    w is how near a column's weights come to the ranges of their groups: those that are near must not be scaled up.
    """
    import torch

    size = fold.tied(torch.where(mean > SILENT, mean, 1.0))  # a tiny s would blow up what makes a silent channel
    groups = weight.abs().view(len(weight), -1, rule.group_size or weight.shape[1])
    near = (groups / groups.amax(-1, keepdim=True).clamp(min=TINY)).mean(0).flatten()
    near = fold.tied(torch.where(near > TINY, near, 1.0))  # nor must a column that nobody reads be blown up
    for spread in (torch.ones_like(near), near)[: min(points, 2)]:
        for point in range(points):
            scale = size ** (point / points) / spread ** (1 - point / points)
            yield scale / (scale.max() * scale.min()).sqrt()


def best_cut(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    rule: Grid,
    cuts: Sequence[float] = CUTS,
    scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """[out, groups]: the share of each group's range that costs that group's part of the output least (the paper's code).

    `hessian` is that of the inputs before they were divided by `scale`.
    """
    import torch

    size = rule.group_size or weight.shape[1]
    groups = weight.shape[1] // size
    own = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, weight.shape[1], size)])
    best = torch.ones(len(weight), groups, device=weight.device)
    least = torch.full_like(best, float("inf"))
    for cut in cuts:
        error = to_nearest(weight, rule, cut).sub_(weight).div_(scale).view(len(weight), groups, size).transpose(0, 1)
        found = torch.bmm(error, own).mul_(error).sum(-1).T
        best, least = torch.where(found < least, cut, best), torch.minimum(found, least)
    return best


def refined(shrink: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor, rule: Grid) -> torch.Tensor:
    """`shrink` [out, groups], each group's chosen once more with what the others' errors do to the output in view."""
    import torch

    size = rule.group_size or weight.shape[1]
    shrink, error = shrink.clone(), to_nearest(weight, rule, shrink).sub_(weight)
    for group in range(shrink.shape[1]):
        part = slice(group * size, (group + 1) * size)
        error[:, part] = 0
        others = (error @ hessian[:, part]).mul_(2)
        own, least = weight[:, part].contiguous(), torch.full_like(shrink[:, group], float("inf"))
        for cut in CUTS:
            tried = to_nearest(own, rule, cut).sub_(own)
            found = (tried @ hessian[part, part]).add_(others).mul_(tried).sum(-1)
            better = found < least
            error[:, part] = torch.where(better[:, None], tried, error[:, part])
            shrink[:, group] = torch.where(better, cut, shrink[:, group])
            least = torch.minimum(found, least)
    return shrink


def to_nearest(weight: torch.Tensor, rule: Grid, shrink: torch.Tensor | float = 1.0) -> torch.Tensor:
    """`weight` float32 [out, in] at the nearest points of a grid whose ranges are `shrink` of the weight's."""
    from infopt.layers import packing

    return packing.rounded(weight, packing.fit(weight, rule, shrink=shrink), rule)


def cost(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(Δ·H·Δᵀ)"""
    from torch.nn.functional import linear

    return float(linear(error, hessian).mul_(error).sum())  # H is symmetric


TECHNIQUE = Awq
