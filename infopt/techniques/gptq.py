"""GPTQ: round one column at a time, and let the columns that are left make up for the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from infopt.errors import InputError
from infopt.layers import passes
from infopt.layers.grid import Grid
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import GridOptions, GridTechnique, Needs

if TYPE_CHECKING:
    import torch

    from infopt.calibrate.blocks import Block
    from infopt.layers.packing import Scales
    from infopt.model.bundle import Bundle

#: Columns rounded before their error reaches the columns beyond (GPTQ, section 4, step 2).
COLUMNS = 128


class GptqOptions(GridOptions):
    activations: Literal["none", "token"] = "none"
    act_order: bool = True
    clip: bool = True
    damping: float = Field(default=0.01, gt=0, lt=1)
    true_sequential: bool = True


class Gptq(GridTechnique):
    """Rounds a layer's weights column by column and moves each column's error into the columns that are still to come.

    Frantar et al., GPTQ, arXiv 2210.17323. With H = 2·E[x·xᵀ] over calibration tokens and H⁻¹ = Uᵀ·U (Cholesky, upper),
    rounding column i leaves the error e = (wᵢ − ŵᵢ) / Uᵢᵢ, and w_j ← w_j − e·Uᵢⱼ for every j > i is the update of the
    remaining weights that costs least in ‖(W − Ŵ)·X‖². Minutes on a small model; the artifact is that of `rtn`.

    bits             2, 3, 4 or 8 per weight, default 4.
    group_size       input features that share a scale, ≥ 8, default 64; must divide every layer's inputs. null: per row.
    symmetric        true (default): q·scale. false: (q − zero)·scale, closer at 3 bits and below.
    activations      none (default), or token: inputs are rounded to int8 too while the model runs, one scale per token (W8A8).
                     Needs bits: 8 and group_size: null; put smoothquant before it. Weights are fitted to inputs that are
                     not rounded yet, and do not make up for what that rounding costs.
    act_order        round columns in the order of falling H diagonal, so that what matters most has most columns left to
                     make up for it; groups keep their places and their scales are fixed beforehand ("static groups"), so
                     nothing is stored or run differently. Default true. false: a group's scales are fitted when its
                     first column is reached, to the weights as corrected so far.
    clip             cut the outermost weights of a group where the others gain more, by Σ_j H_jj·(w_j − q_j)². Matters most at
                     few bits: default true. false: a group's scale holds its largest weight, as in the paper.
    damping          share of H's mean diagonal that is added to it, 0 … 1, default 0.01; raise it where calibration is short.
    true_sequential  layers of a block that feed one another are done in turn, each on inputs from those already rounded.
                     Default true; false gathers all of a block's inputs in one pass.
    scale_dtype      what scales are stored in: auto (the model's dtype, default), float32, bfloat16, float16.
    ignore           modules left alone, as globs or last parts; default [lm_head].
    """

    Options = GptqOptions
    needs = Needs(modules=("compressed_tensors",), calibration=True)
    walks = True
    options: GptqOptions

    @property
    def _grid(self) -> Grid:
        o = self.options
        return Grid(o.bits, o.group_size, o.scale_dtype, o.symmetric, activations=o.activations)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.layers import packing

        if not packing.linears(bundle, self.options.ignore):
            return bundle
        return packing.finish(bundle, self.round_blocks(bundle, context, lambda name: self._grid), self._grid)

    def round_blocks(
        self, bundle: Bundle, context: Context, grid_of: Callable[[str], Grid]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Rounds every layer to its own grid, in place; layers that read the same input must share one. Returns what to store."""
        from infopt.calibrate import blocks
        from infopt.calibrate.hessian import Hessian

        def work(block: Block) -> None:
            for stages in [[stage] for stage in block.stages] if self.options.true_sequential else [block.stages]:
                # Layers that read the same input share its H, and are rounded as one matrix with all their rows.
                hessians = {stage[0]: Hessian() for stage in stages}
                block.observe(hessians, lambda name, x, to=hessians: to[name].add(x))  # type: ignore[misc]
                for stage in stages:
                    self._round_stage(block, stage, hessians.pop(stage[0]).mean(), grid_of(stage[0]))

        return blocks.walk(bundle, context, self.options.ignore, work)

    def _round_stage(self, block: Block, names: tuple[str, ...], hessian: torch.Tensor, rule: Grid) -> None:
        import torch

        from infopt.layers import packing

        o, layers = self.options, [block.linears[name] for name in names]
        dtype = layers[0].weight.dtype
        weight = torch.cat([layer.weight.float() for layer in layers])
        rounded, scales = round_columns(weight, hessian, rule, dtype, o.act_order, o.damping, o.clip, names[0])
        end = 0
        for name, layer in zip(names, layers, strict=True):
            rows = slice(end, end := end + layer.out_features)
            block.pack(name, *packing.store(rounded[rows], scales.rows(rows), rule, dtype))

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        rounding = super().predict(shapes, before, machine)
        return passes.add(rounding, before, shapes, self.calibration_tokens, machine)


def round_columns(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    rule: Grid,
    dtype: torch.dtype,
    act_order: bool,
    damping: float,
    clip: bool,
    name: str = "the layer",
) -> tuple[torch.Tensor, Scales]:
    """GPTQ, algorithm 1: `weight` float32 [out, in] and `hessian` float32 [in, in] (both consumed) → rounded weight, scales.

    `dtype`: the model's, to which scales are rounded. Raises InputError, with the layer's `name`, for a Hessian that no
    factor can be found of.
    """
    import torch

    from infopt.layers import packing

    if not hessian.isfinite().all():
        hint = "engine: {dtype: bfloat16}, or float32" if dtype == torch.float16 else "the model itself may be damaged"
        raise InputError(f"the inputs of {name} are not all finite", hint=hint)
    inner = weight.shape[1]
    size = rule.group_size or inner
    step = max(COLUMNS // size * size, size) if rule.group_size else COLUMNS  # whole groups

    def ranges(columns: torch.Tensor, seen: torch.Tensor) -> Scales:
        return packing.fit_cut(columns, seen, rule, dtype) if clip else packing.fit(columns, rule, dtype)

    importance = hessian.diagonal().clone()
    each = ranges(weight, importance).by_group()
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(inner, device=weight.device)
    upper = inverse_factor(hessian[order][:, order], damping, name)
    # Transposed, so that what is rounded at a time lies together: a column of the weight is a row here.
    weight, groups = weight[:, order].T.contiguous(), (order // size).tolist()
    rounded = torch.empty_like(weight)
    for start in range(0, inner, step):
        end = min(start + step, inner)
        errors = torch.empty_like(weight[start:end])
        for i in range(start, end):
            if not act_order and rule.group_size and i % size == 0:
                (each[groups[i]],) = ranges(weight[i : i + size].T.contiguous(), importance[i : i + size]).by_group()
            w, u = weight[i : i + 1], upper[i, i:end]
            rounded[i : i + 1] = q = packing.nearest(w, each[groups[i]], rule)
            errors[i - start : i - start + 1] = error = (w - q).div_(u[0])
            weight[i + 1 : end].addmm_(u[1:, None], error, alpha=-1)
        weight[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return rounded[order.argsort()].T.contiguous(), packing.Scales.of_groups(each)


def inverse_factor(hessian: torch.Tensor, damping: float, name: str = "the layer") -> torch.Tensor:
    """U, upper triangular, with H⁻¹ = Uᵀ·U, of the damped `hessian` [in, in], which is consumed.

    Raises InputError, with the layer's `name`, when it is not positive definite even so.
    """
    import torch

    diagonal = hessian.diagonal()
    # An input that calibration never saw has no say in the damping of those it saw; whatever is put in its place will do.
    silent = diagonal == 0
    mean = diagonal.sum() / (~silent).sum().clamp(min=1)
    diagonal[silent] = mean if mean > 0 else 1
    diagonal += damping * mean
    lower, failed = torch.linalg.cholesky_ex(hessian)
    upper: torch.Tensor
    upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or failed_too:
        raise InputError(
            f"the inputs of {name} are too much alike to invert their Hessian", hint="raise damping, or calibrate on more text"
        )
    return upper


TECHNIQUE = Gptq
