"""Width pruning: MLP channels, heads and hidden dimensions go, and the matrices get smaller."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from infopt.layers import width
from infopt.layers.width import Width
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Needs, Options, Technique

if TYPE_CHECKING:
    from infopt.calibrate.blocks import Block
    from infopt.model.bundle import Bundle

Size = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None
"""A number of them, a share (with a decimal point), or all."""


class PruneWidthOptions(Options):
    mlp: Size = 0.75
    kv_heads: Annotated[int, Field(ge=1)] | None = None
    hidden: Size = None
    multiple: int = Field(default=32, ge=1)
    by: Literal["contribution", "activation"] = "contribution"
    compensate: bool = True
    damping: float = Field(default=0.01, gt=0, lt=1)


class PruneWidth(Technique):
    """Takes MLP channels, whole groups of heads and hidden dimensions out: smaller matrices, faster on every engine.

    What matters least on calibration text goes, as in Minitron (Muralidharan et al., arXiv 2407.14679). Each block keeps channels
    and heads of its own choice, the same number everywhere, since a config has one; a KV head goes with all its queries. The
    hidden dimensions are one choice for the whole model, made and taken out first. A layer that loses inputs is refitted, block
    by block, on text that has gone through the blocks before it as they are now. One step of this costs quality that training
    wins back: look at the behaviour figures of `infopt compare`, and train afterwards (`distil`).

    mlp         MLP channels that stay in every block: a number, a share 0 … 1 with a decimal point, or null (all). Default 0.75.
    kv_heads    KV heads that stay, each with its query heads; null (default): all.
    hidden      hidden dimensions that stay: a number, a share, or null (default): all. Costs the most quality. Not of Gemma's
                kind; and Llama's config asks that heads divide it.
    multiple    mlp and hidden stay multiples of it where they are, as kernels and group sizes want; shares are rounded down to
                it. ≥ 1, default 32.
    by          contribution (default): the norm of what a channel or group of heads adds to the output, ‖W_j‖·‖x_j‖ as in
                structured Wanda and FLAP (arXiv 2312.11983). activation: Minitron's mean norm of what is in it, whatever reads
                it; for hidden of what the norms make. Of hidden, contributions are shares of each layer's output.
    compensate  true (default): the columns that stay take over by least squares what the others gave, W_k + W_r·H_rk·(H_kk + λ)⁻¹
                with H = X·Xᵀ of the layer's inputs. Give it ten tokens and more for each column, or it fits these tokens
                instead of the language. false: they stay as they are.
    damping     λ as a share of H's mean diagonal, 0 … 1, default 0.01; raise it where calibration is short.
    """

    Options = PruneWidthOptions
    needs = Needs(calibration=True)
    neutral: ClassVar = {"mlp": None}
    walks = True
    options: PruneWidthOptions

    def check(self, shapes: Shapes, path: str) -> None:
        before = width.of(shapes, path)
        after = self._after(before, path)
        if after.hidden < before.hidden:
            width.check_hidden(shapes, f"{path}.hidden")
        width.check_config(shapes, before, after, self.options.multiple, path)

    def _after(self, before: Width, path: str) -> Width:
        o = self.options
        return replace(
            before,
            mlp=width.count(o.mlp, before.mlp, o.multiple, f"{path}.mlp"),
            kv_heads=width.count(o.kv_heads, before.kv_heads, 1, f"{path}.kv_heads"),
            hidden=width.count(o.hidden, before.hidden, o.multiple, f"{path}.hidden"),
        )

    def reshape(self, shapes: Shapes) -> Shapes:
        return width.reshape(shapes, self._after(width.of(shapes, "prune_width"), "prune_width"))

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.calibrate import blocks
        from infopt.calibrate.calls import decoder_blocks
        from infopt.layers import narrowing, packing

        packing.linears(bundle, ())  # refuses what is quantized already
        before = narrowing.measure(bundle.model)
        after = self._after(before, "prune_width")
        if after == before:
            return bundle
        _, modules = decoder_blocks(bundle.model)
        narrowing.require_fit(bundle.model, modules, before, after)
        if after.hidden < before.hidden:
            self._narrow_hidden(bundle, context, after.hidden)
        if (after.mlp, after.kv_heads) != (before.mlp, before.kv_heads):
            blocks.walk(bundle, context, (), partial(self._prune_block, before, after))
            for module in modules:
                narrowing.cut_block(module, before, narrowing.left(module, before, after))
        narrowing.settle(bundle.model, after)
        return bundle

    def _narrow_hidden(self, bundle: Bundle, context: Context, count: int) -> None:
        from infopt.calibrate import hidden, importance

        o = self.options
        context.progress("hidden dimensions: what each is worth")
        scores, readings = hidden.scores(bundle, context, o.by)
        context.progress("hidden dimensions: fitting what reads them")
        kept = importance.strongest(scores, count)
        hidden.narrow(bundle, context, kept, readings, compensate=o.compensate, damping=o.damping)

    def _prune_block(self, before: Width, after: Width, block: Block) -> None:
        """Zeros for the columns of o_proj and down_proj that go. Shapes stay until all blocks are done, so that an interrupted
        walk goes on as any other does."""
        import torch

        from infopt.calibrate import importance
        from infopt.layers.narrowing import channels_of

        names = {name.rpartition(".")[2]: name for name in block.linears}
        cuts = [
            (names["o_proj"], before.head_dim * before.queries, after.kv_heads, before.kv_heads),
            (names["down_proj"], 1, after.mlp, before.mlp),
        ]
        cuts = [cut for cut in cuts if cut[2] < cut[3]]
        block.finished.update(block.linears.keys() - {name for name, *_ in cuts})
        for name, size, count, _ in cuts:
            inputs = importance.Inputs(block.inputs[0].shape[1], size)
            block.observe([name], lambda _, x, to=inputs: to.add(x))  # type: ignore[misc]
            moments, weight = inputs.hessian.mean(), block.linears[name].weight
            by_contribution = self.options.by == "contribution"
            scores = importance.contribution(weight.float(), moments, size) if by_contribution else inputs.mean
            kept = channels_of(importance.strongest(scores, count), size)
            if self.options.compensate:
                pruned = importance.narrowed(weight.float(), kept, moments, self.options.damping, name)
            else:
                pruned = torch.zeros_like(weight).index_copy_(1, kept, weight[:, kept])
            block.replace(name, pruned.to(weight.dtype))

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        there = width.of(shapes, "prune_width")
        after = self._after(there, "prune_width")
        return width.predict(shapes, there, after, before, self.calibration_tokens, machine, compensate=self.options.compensate)


TECHNIQUE = PruneWidth
