"""AutoRound: whether each weight rounds up or down, and each group's range, learned by signed gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from infopt.backends.environments import AUTOROUND
from infopt.layers import grid, passes
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import GridOptions, GridTechnique, Needs

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

#: A training step in forward passes: the pass, its gradients, and the rounding that both go through; measured.
STEP_PASSES = 4.0


class AutoRoundOptions(GridOptions):
    iters: int = Field(default=50, ge=1)
    batch_size: int = Field(default=8, ge=1)


class AutoRound(GridTechnique):
    """Learns a rounding offset in [−½, ½] for every weight, and a shrinking of every group's range, block by block.

    Cheng et al., SignRound, arXiv 2309.05516: v ← v − lr·sign(∂‖block(x) − block̂(x)‖²/∂v), the best step kept. Run by
    auto-round in the environment `autoround`; infopt packs the integers that it found, so the artifact is that of `rtn`.
    A symmetric scale may be negative: the largest magnitude of a group, whatever its sign, falls on the grid's longer side.

    bits         2, 3, 4 or 8 per weight, default 4.
    group_size   input features that share a scale, ≥ 8, default 64; must divide every layer's inputs. null: per row.
    symmetric    true (default): q·scale. false: (q − zero)·scale.
    iters        training steps per block, ≥ 1, default 50; the paper takes 200, at four times the time.
    batch_size   calibration windows per step, ≥ 1, default 8.
    scale_dtype  what scales are stored in: auto (the model's dtype, default), float32, bfloat16, float16.
    ignore       modules left alone: globs over dotted names, or last parts such as `q_proj`; default [lm_head].
    """

    Options = AutoRoundOptions
    needs = Needs(modules=("compressed_tensors",), calibration=True, environment=AUTOROUND)
    options: AutoRoundOptions

    def check(self, shapes: Shapes, path: str) -> None:
        super().check(shapes, path)
        grid.check_inside_blocks(shapes, self.options.ignore, path)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from safetensors.torch import load_file

        from infopt.backends import work
        from infopt.layers import packing
        from infopt.layers.packing import Scales

        layers = packing.linears(bundle, self.options.ignore)
        if not layers:
            return bundle
        work.require_calibration(context)
        dtype = self.options.scale_dtype
        job = {
            **self.options.model_dump(exclude={"ignore"}),
            "scale_dtype": str(bundle.model.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
            "ignore": packing.left_alone(bundle.model, layers),
        }
        with work.done(AUTOROUND, bundle, context, job) as folder:
            rounded = load_file(folder / "rounded.safetensors", device=str(bundle.device))
        packed = {}
        for name, layer in layers.items():
            scales = Scales(rounded[f"{name}.scale"], rounded.get(f"{name}.zero"))
            each = packing.spread(scales, self._grid, layer.in_features)
            q = rounded.pop(f"{name}.q").float()
            weight = (q if each.zero is None else q - each.zero) * each.scale
            packed[name], layer.weight.data = packing.store(weight, scales, self._grid, layer.weight.dtype)
        return packing.finish(bundle, packed, self._grid)

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        there = passes.elsewhere(super().predict(shapes, before, machine), before)
        steps = self.options.iters * self.options.batch_size / max(self.calibration_samples, 1)  # in rounds of all windows
        rounds = 2 + STEP_PASSES * steps
        return passes.add(there, before, shapes, self.calibration_tokens, machine, passes=rounds, hessians=False)


TECHNIQUE = AutoRound
