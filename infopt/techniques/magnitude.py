"""Magnitude pruning: the smallest weights of each layer become zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infopt.layers import sparsity
from infopt.protocols import Context
from infopt.techniques.base import PruneOptions, PruneTechnique

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle


class Magnitude(PruneTechnique):
    """Sets the weights of smallest magnitude to zero, an equal share of every layer; no calibration text is read.

    Han et al., Learning both Weights and Connections, arXiv 1506.02626, without the training that follows there. Shapes
    stay, so nothing gets faster by it: an experiment on quality, and what `wanda` and `sparsegpt` are held against.

    sparsity  share of a layer's weights that becomes zero, 0 … 1, default 0.5.
    pattern   null (default): anywhere in a layer. 2:4, 4:8: so many of so many neighbouring inputs stay in every row, which
              leaves half; sparsity must be 0.5.
    ignore    modules left alone, as globs or last parts; default [lm_head].

    Of steps that may follow, rtn keeps the zeros; gptq and training fill them.
    """

    Options = PruneOptions

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        import torch

        from infopt.layers import packing

        for layer in packing.linears(bundle, self.options.ignore).values():
            with torch.no_grad():
                scores = layer.weight.abs().float()
                layer.weight.mul_(sparsity.keep(scores, self.options.sparsity, self.options.pattern))
        return bundle


TECHNIQUE = Magnitude
