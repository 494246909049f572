"""Wanda: weights are pruned by what they are multiplied with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from infopt.layers import passes, sparsity
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import PruneOptions, PruneTechnique

if TYPE_CHECKING:
    import torch

    from infopt.calibrate.blocks import Block
    from infopt.model.bundle import Bundle


class Wanda(PruneTechnique):
    """Sets the weights to zero that matter least to their row's output: smallest |weight| × norm of the input it meets.

    Sun et al., A Simple and Effective Pruning Approach, arXiv 2306.11695. The score of a weight is |W_ij|·‖X_j‖₂ over
    calibration tokens, compared within a row; what stays is not changed. Layers are pruned in the order in which a block
    runs them, each by inputs from those already pruned. Shapes stay, so nothing gets faster by it.

    sparsity  share of every row that becomes zero, 0 … 1, default 0.5.
    pattern   null (default): anywhere in a row. 2:4, 4:8: so many of so many neighbouring inputs stay; sparsity must be 0.5.
    ignore    modules left alone, as globs or last parts; default [lm_head].

    Of steps that may follow, rtn keeps the zeros; gptq and training fill them.
    """

    Options = PruneOptions
    needs = replace(PruneTechnique.needs, calibration=True)
    walks = True

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.calibrate import blocks
        from infopt.layers import packing

        if packing.linears(bundle, self.options.ignore):
            blocks.walk(bundle, context, self.options.ignore, self._prune_block)
        return bundle

    def _prune_block(self, block: Block) -> None:
        for names in block.stages:
            squares: list[torch.Tensor] = []
            block.observe(names[:1], lambda name, x, to=squares: to.append(x.float().square().sum(0)))  # type: ignore[misc]
            norms = sum(squares[1:], squares[0]).sqrt()
            for name in names:
                weight = block.linears[name].weight
                scores = weight.abs().float() * norms
                block.replace(name, weight * sparsity.keep(scores, self.options.sparsity, self.options.pattern, by_row=True))

    def compared(self, rows: int, inputs: int) -> int:
        return inputs

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        step = super().predict(shapes, before, machine)
        return passes.add(step, before, shapes, self.calibration_tokens, machine, hessians=False)


TECHNIQUE = Wanda
