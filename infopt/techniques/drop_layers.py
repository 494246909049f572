"""Depth pruning: whole decoder blocks go."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from infopt.errors import InputError, RecipeError
from infopt.layers import depth, passes
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Needs, Options, Technique

if TYPE_CHECKING:
    from infopt.calibrate.sensitivity import Probe
    from infopt.model.bundle import Bundle

#: Calibration tokens that blocks are judged on: their distributions over the vocabulary are held in memory.
PROBE_TOKENS = 1024


class DropLayersOptions(Options):
    count: int = Field(default=1, ge=0)
    by: Literal["greedy", "kld", "influence", "even", "random"] = "greedy"
    layers: Annotated[tuple[int, ...], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"found layers: {list(self.layers)}, which names a block twice")
        for name in ("count", "by") if self.layers is not None else ():
            if self.is_set(name):
                raise ValueError(f"found {name}: {getattr(self, name)} beside layers, which say which blocks go")
        return self


class DropLayers(Technique):
    """Takes whole decoder blocks out: the model gets smaller and faster in proportion, on every engine.

    Blocks change the hidden states little by little, so that some can go (ShortGPT, arXiv 2403.03853). Which ones is decided on
    calibration text, up to 1,024 tokens of it. The artifact's `depth.json` and `depth.svg` say what the loss of each block costs
    and how the KLD grows with every block that is gone. Perplexity and multiple choice hide what is lost in generation: look at
    the behaviour figures of `infopt compare`, and train afterwards (`distil`).

    count   blocks that go, ≥ 0 and fewer than there are, default 1.
    by      greedy (default): the block whose loss costs least KLD, measured, then the next one given that it is gone, and so
            on. kld: those that cost least each by itself. influence: those that turn the hidden states least (ShortGPT).
            even: as many of every part, the first and the last stay; where so many go that training decides. random: drawn by
            the seed, for comparison.
    layers  numbers of the blocks that go, counted from 0, instead of count and by; default null.
    """

    Options = DropLayersOptions
    needs = Needs(calibration=True)
    neutral: ClassVar = {"count": 0}
    walks = True
    options: DropLayersOptions

    def check(self, shapes: Shapes, path: str) -> None:
        o = self.options
        wrong = [index for index in o.layers or () if not 0 <= index < shapes.layers]
        if wrong:
            raise RecipeError(f"{path}.layers", f"found {wrong[0]}; allowed: 0 … {shapes.layers - 1}, the model's blocks")
        if self._count >= shapes.layers:
            place = "count" if o.layers is None else "layers"
            raise RecipeError(
                f"{path}.{place}",
                f"found {self._count} blocks to go; allowed: 0 … {shapes.layers - 1}, the model has {shapes.layers}",
            )

    @property
    def _count(self) -> int:
        return self.options.count if self.options.layers is None else len(self.options.layers)

    def reshape(self, shapes: Shapes) -> Shapes:
        """As if the last blocks went, where it is the text that decides which ones."""
        last = range(shapes.layers - self._count, shapes.layers)
        return depth.without(shapes, last if self.options.layers is None else self.options.layers)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        import torch

        from infopt.calibrate.calls import decoder_blocks
        from infopt.calibrate.curve_plot import Curve, plot
        from infopt.calibrate.influence import block_influence
        from infopt.calibrate.sensitivity import Probe

        if bundle.packed or getattr(bundle.model, "hf_quantizer", None) is not None:
            raise InputError("the model's weights are quantized already", hint="put drop_layers before the step that quantizes")
        if not self._count:
            return bundle
        if not context.calibration_ids:
            raise InputError("blocks are judged on text", hint="calibration: {text: bundled, samples: 128, tokens: 256}")
        _, blocks = decoder_blocks(bundle.model)
        windows = tuple(window[:PROBE_TOKENS] for window in context.calibration_ids)
        judged = windows[: max(1, PROBE_TOKENS // len(windows[0]))]
        probe = Probe.of(bundle, judged, torch.device(context.device), rounded=True)
        gone = self._choose(probe, context)
        found: dict[str, Any] = {
            "schema_version": 1,
            "by": "layers" if self.options.layers is not None else self.options.by,
            "tokens": probe.ids.numel(),
            "influence": block_influence(probe),
            "gone": [{"block": index, "kld": kld} for index, kld in gone],
        }
        del probe
        depth.drop(bundle.model, blocks, {index for index, _ in gone})
        curve = Curve(
            f"by {found['by']}", [(number, kld) for number, (_, kld) in enumerate(gone, start=1)], [str(i) for i, _ in gone]
        )
        drawn = plot("KLD to the whole model, nats, as blocks go", [curve], "blocks gone")
        files = {**bundle.files, "depth.json": json.dumps(found, indent=1) + "\n", "depth.svg": drawn}
        return replace(bundle, files=files)

    def _choose(self, probe: Probe, context: Context) -> list[tuple[int, float]]:
        """The blocks that go, in that order, and the KLD after each."""
        from infopt.calibrate import influence

        o, indices = self.options, range(len(probe.blocks))
        if o.layers is not None:
            return influence.in_order(probe, o.layers, context.progress)
        if o.by == "greedy":
            return influence.greedy(probe, o.count, context.progress)
        if o.by == "random":
            order = random.Random(context.seed).sample(indices, o.count)
        elif o.by == "even":
            order = influence.evenly(len(indices), o.count)
        elif o.by == "kld":
            costs = influence.left_out(probe, (), context.progress)
            order = sorted(indices, key=costs.__getitem__)[: o.count]
        else:
            order = sorted(indices, key=influence.block_influence(probe).__getitem__)[: o.count]
        return influence.in_order(probe, order, context.progress)

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        after = self.reshape(shapes)
        left = before.weights_bytes * after.parameters // shapes.parameters
        rate = machine.read_bytes_per_s
        step = Prediction(left, before.weights_bytes, before.weights_bytes / rate if rate else None)
        # Leaving out each block costs half a pass on average; greedy does so anew for every block that goes.
        rounds = {"greedy": 1 + self._count / 3, "kld": 1}.get(self.options.by, 0) if self.options.layers is None else 0
        tokens = min(PROBE_TOKENS, self.calibration_tokens)
        runs = 1 + rounds * shapes.layers / 2 + self._count
        return passes.add(step, before, shapes, tokens, machine, passes=runs, hessians=False)


TECHNIQUE = DropLayers
