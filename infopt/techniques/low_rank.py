"""Low rank: each layer becomes a product of two thin matrices, fitted to what it reads."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from infopt.errors import InputError, RecipeError
from infopt.layers import grid, passes
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Modules, Needs, Options, Technique
from infopt.techniques.qlora import nearest_of_rank

if TYPE_CHECKING:
    import torch

    from infopt.calibrate.blocks import Block
    from infopt.model.bundle import Bundle

#: Beside the weights: every layer's rank and what it costs.
FILE = "low_rank.json"
#: What every report says of a model whose weights are products of two matrices.
REMARK = "weights are of a lower rank, stored whole; no shape changed, so neither its size nor its speed is expected to"
#: float32 operations that the eigenvectors of an n × n matrix in float64 are worth, over n³; fitted to measured seconds.
EIGENVECTORS = 40


class LowRankOptions(Options):
    share: float = Field(default=0.9, gt=0, le=1)
    whiten: bool = True
    damping: float = Field(default=0.001, gt=0, lt=1)
    ignore: Modules = ("lm_head",)


class LowRank(Technique):
    """Replaces each weight by the matrix of a lower rank that changes the layer's outputs least on calibration text.

    SVD-LLM (Wang et al., arXiv 2403.07378); ASVD (Yuan et al., arXiv 2312.05821) scales the inputs instead. With the
    moments H = X·Xᵀ = S·Sᵀ (Cholesky) of a layer's inputs, ‖(W − Ŵ)·X‖ is ‖(W − Ŵ)·S‖: of all matrices of rank k, W·S cut
    to its k largest singular values, times S⁻¹, costs least, and what it costs are the others. Layers are done in the order
    in which a block runs them, each on inputs from those already done.

    **An ablation, which tells what a rank costs.** transformers has no layer of two factors, so the artifact holds their
    product: as many bytes as before, and no faster. `low_rank.json` beside it names every layer's rank, and the share
    of its output on the calibration text that is error now.

    share    parameters that the two factors would have over the dense layer's, 0 … 1, default 0.9: a layer's rank is
             share·out·in / (out + in), rounded down, which at 1 is half of a square layer's.
    whiten   true (default), or false: the singular values of W itself, without any text, to compare.
    damping  share of H's mean diagonal that is added to it, 0 … 1, default 0.001; raise it where calibration is short.
    ignore   modules left alone, as globs or last parts; default [lm_head].
    """

    Options = LowRankOptions
    needs = Needs(calibration=True)
    neutral: ClassVar = {"ignore": ["*"]}
    walks = True
    remark = REMARK
    options: LowRankOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        if not self.options.whiten:
            self.needs, self.walks = Needs(), False

    def check(self, shapes: Shapes, path: str) -> None:
        grid.check_ignore(shapes, self.options.ignore, path)
        if self.walks:
            grid.check_inside_blocks(shapes, self.options.ignore, path)
        for name, (out, inner) in grid.chosen(shapes, self.options.ignore).items():
            if rank_of(out, inner, self.options.share) < 1:
                raise RecipeError(
                    f"{path}.share",
                    f"found {self.options.share}, which leaves {name} no rank; allowed: {(out + inner) / (out * inner):.2g} … 1",
                    hint=f"raise share, or add {name.rpartition('.')[2]} to ignore",
                )

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.calibrate import blocks
        from infopt.layers import packing

        layers = packing.linears(bundle, self.options.ignore)
        if not layers:
            return bundle
        errors: dict[str, float] = {}
        if self.options.whiten:
            log = context.unfinished / FILE if context.unfinished else None
            errors = _read(log)

            def work(block: Block) -> None:
                errors.update(self._do_block(block))
                _write(log, errors)

            blocks.walk(bundle, context, self.options.ignore, work)
        else:
            for layer in layers.values():
                b, a = nearest_of_rank(layer.weight.double(), self._rank(layer.weight))
                layer.weight.data = (b @ a).to(layer.weight.dtype)
        found = {
            name: {"rank": self._rank(layer.weight), "of": min(layer.weight.shape), "output_error": errors.get(name)}
            for name, layer in layers.items()
        }
        return replace(bundle, files={**bundle.files, FILE: json.dumps(found, indent=1) + "\n"})

    def _rank(self, weight: torch.Tensor) -> int:
        out, inner = weight.shape
        return rank_of(out, inner, self.options.share)

    def _do_block(self, block: Block) -> dict[str, float]:
        """The error of every layer's output, ‖(W − Ŵ)·X‖ / ‖W·X‖."""
        from infopt.calibrate.hessian import Hessian

        errors = {}
        for names in block.stages:
            hessian = Hessian()
            block.observe(names[:1], lambda name, x, to=hessian: to.add(x))  # type: ignore[misc]
            moments = hessian.mean().double()
            lower = whitening(moments, self.options.damping, names[0])
            for name in names:
                before, dtype = block.linears[name].weight.double(), block.linears[name].weight.dtype
                b, a = nearest_outputs(before, lower, self._rank(before))
                after = (b @ a).to(dtype)
                block.replace(name, after)
                errors[name] = _size(before - after, moments) / max(_size(before, moments), 1e-30)
        return errors

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        layers = grid.chosen(shapes, self.options.ignore).values()
        flops = sum(EIGENVECTORS * min(shape) ** 3 + 4 * shape[0] * shape[1] ** 2 for shape in layers)
        held = 8 * max((3 * out * inner + 3 * inner**2 for out, inner in layers), default=0)
        rate = machine.flops.get("float32")
        step = replace(before, peak_bytes=before.peak_bytes + held, seconds=flops / rate if rate else None)
        if not self.options.whiten:
            return step
        return passes.add(step, before, shapes, self.calibration_tokens, machine)


def rank_of(out: int, inner: int, share: float) -> int:
    """The largest rank whose factors [out, rank] and [rank, inner] have at most `share` of the parameters of [out, inner]."""
    return int(share * out * inner / (out + inner))


def whitening(moments: torch.Tensor, damping: float, name: str = "the layer") -> torch.Tensor:
    """S, lower triangular, with S·Sᵀ = H + damping · its mean diagonal, for `moments` H float64 [in, in].

    Raises InputError, with the layer's `name`, for moments that are not finite, or that no factor can be found of.
    """
    import torch

    if not moments.isfinite().all():
        raise InputError(f"the inputs of {name} are not all finite", hint="engine: {dtype: bfloat16}, or float32")
    diagonal = moments.diagonal()
    mean = float(diagonal.sum() / (diagonal > 0).sum().clamp(min=1))
    # Inputs that never were anything but zero leave S without an inverse, unless something stands in their place.
    added = torch.eye(len(moments), dtype=moments.dtype, device=moments.device) * (damping * mean or 1.0)
    lower: torch.Tensor
    lower, failed = torch.linalg.cholesky_ex(moments + added)
    if failed:
        raise InputError(
            f"the inputs of {name} are too much alike to factor their moments", hint="raise damping, or calibrate on more text"
        )
    return lower


def nearest_outputs(weight: torch.Tensor, lower: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B [out, rank], A [rank, in]): of all Ŵ = B·A of that rank the one with the least ‖(W − Ŵ)·S‖ (SVD-LLM, section 3.1).

    `weight` W float64 [out, in], `lower` S float64 [in, in], lower triangular.
    """
    import torch

    b, a = nearest_of_rank(weight @ lower, rank)
    unwhitened: torch.Tensor = torch.linalg.solve_triangular(lower, a, upper=False, left=False)
    return b, unwhitened


def _size(weight: torch.Tensor, moments: torch.Tensor) -> float:
    """‖W·X‖, up to a factor that all W share."""
    return math.sqrt(max(0.0, float((weight @ moments * weight).sum())))


def _read(log: Path | None) -> dict[str, float]:
    """The errors of the blocks that an interrupted run has finished."""
    found: dict[str, float] = json.loads(log.read_text(encoding="utf-8")) if log and log.is_file() else {}
    return found


def _write(log: Path | None, errors: dict[str, float]) -> None:
    from infopt.model import atomic

    if log:
        with atomic.new_file(log) as temporary:
            temporary.write_text(json.dumps(errors), encoding="utf-8")


TECHNIQUE = LowRank
