"""SparseGPT: the weights that stay make up for those that go."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from infopt.layers import passes, sparsity
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import PruneOptions, PruneTechnique
from infopt.techniques.gptq import COLUMNS, inverse_factor

if TYPE_CHECKING:
    import torch

    from infopt.calibrate.blocks import Block
    from infopt.model.bundle import Bundle


class SparsegptOptions(PruneOptions):
    damping: float = Field(default=0.01, gt=0, lt=1)


class Sparsegpt(PruneTechnique):
    """Sets weights to zero where that costs least, and moves what each costs into the columns that are still to come.

    Frantar and Alistarh, SparseGPT, arXiv 2301.00774. With H⁻¹ = Uᵀ·U as in `gptq`, zeroing w costs (w / Uᵢᵢ)², which
    says what goes, 128 columns at a time; its error e = w / Uᵢᵢ is taken from the columns behind it, w_j ← w_j − e·Uᵢⱼ.
    Layers are pruned in the order in which a block runs them. Minutes on a small model. Shapes stay, so nothing gets
    faster by it.

    sparsity  share of a layer's weights that becomes zero, 0 … 1, default 0.5.
    pattern   null (default): anywhere in 128 columns. 2:4, 4:8: so many of so many neighbouring inputs stay in every row;
              sparsity must be 0.5.
    damping   share of H's mean diagonal that is added to it, 0 … 1, default 0.01; raise it where calibration is short.
    ignore    modules left alone, as globs or last parts; default [lm_head].

    Of steps that may follow, rtn keeps the zeros; gptq and training fill them.
    """

    Options = SparsegptOptions
    needs = replace(PruneTechnique.needs, calibration=True)
    walks = True
    options: SparsegptOptions

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.calibrate import blocks
        from infopt.layers import packing

        if packing.linears(bundle, self.options.ignore):
            blocks.walk(bundle, context, self.options.ignore, self._prune_block)
        return bundle

    def _prune_block(self, block: Block) -> None:
        from infopt.calibrate.hessian import Hessian

        o = self.options
        for names in block.stages:
            hessian = Hessian()
            block.observe(names[:1], lambda name, x, to=hessian: to.add(x))  # type: ignore[misc]
            moments = hessian.mean()
            for name in names:
                weight = block.linears[name].weight
                pruned = prune_columns(weight.float(), moments.clone(), o.sparsity, o.pattern, o.damping, name)
                block.replace(name, pruned.to(weight.dtype))

    def compared(self, rows: int, inputs: int) -> int:
        return rows * min(inputs, COLUMNS)

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        step = super().predict(shapes, before, machine)
        return passes.add(step, before, shapes, self.calibration_tokens, machine)


def prune_columns(
    weight: torch.Tensor, hessian: torch.Tensor, share: float, pattern: str | None, damping: float, name: str = "the layer"
) -> torch.Tensor:
    """SparseGPT, algorithm 1: `weight` float32 [out, in], `hessian` float32 [in, in] (consumed) → the pruned weight.

    Raises InputError, with the layer's `name`, for a Hessian that no factor can be found of.
    """
    import torch

    silent = hessian.diagonal() == 0
    upper = inverse_factor(hessian, damping, name)
    inner, each = upper.diagonal()[:, None], sparsity.kept_of(pattern)[1] if pattern else COLUMNS
    weight = weight.T.contiguous()  # a column of the weight is a row here
    weight[silent] = 0  # what an input that was never seen is multiplied with
    for start in range(0, len(weight), COLUMNS):
        end = min(start + COLUMNS, len(weight))
        errors = torch.empty_like(weight[start:end])
        stays = torch.empty_like(errors, dtype=torch.bool)
        for i in range(start, end):
            if (i - start) % each == 0:  # what goes is chosen by the weights as corrected so far
                ahead = slice(i, min(i + each, end))
                scores = (weight[ahead] / inner[ahead]).square().T
                stays[ahead.start - start : ahead.stop - start] = sparsity.keep(scores, share, pattern).T
            w, u = weight[i : i + 1], upper[i, i:end]
            errors[i - start : i - start + 1] = error = torch.where(stays[i - start], 0, w) / u[0]
            w *= stays[i - start]
            weight[i + 1 : end].addmm_(u[1:, None], error, alpha=-1)
        weight[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return weight.T.contiguous()


TECHNIQUE = Sparsegpt
