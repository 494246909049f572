"""A budget instead of ratios: how deep and how wide a smaller model is, measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from infopt import units
from infopt.errors import InputError, RecipeError
from infopt.layers import frontier, passes
from infopt.layers.frontier import Cut, Space
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Needs, Options, Technique
from infopt.techniques.drop_layers import DropLayers, DropLayersOptions
from infopt.techniques.prune_width import PruneWidth, PruneWidthOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from infopt.calibrate.sensitivity import Probe
    from infopt.model.bundle import Bundle

#: What stays of the parameters where no budget is given.
SHARE = 0.75
#: Candidates that are measured at most.
MOST = 36
#: Calibration tokens that they are measured on: their distributions over the vocabulary are held in memory.
PROBE_TOKENS = 1024
#: Bytes are a float's product: what is missing of a parameter by less than this is no missing parameter.
CLOSE = 1e-6


class ShrinkOptions(Options):
    parameters: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    bytes: str | int | None = None
    tpot_ms: float | None = Field(default=None, gt=0)
    layers: bool = True
    heads: bool = True
    channels: bool = True
    multiple: int = Field(default=32, ge=1)

    @field_validator("bytes")
    @classmethod
    def _is_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            try:
                units.parse_size(value)
            except InputError as error:
                raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        budgets = [name for name in ("parameters", "bytes", "tpot_ms") if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"found {' and '.join(budgets)}; allowed: one budget")
        if not (self.layers or self.heads or self.channels):
            raise ValueError("found layers, heads and channels all false; allowed: one of them true at least")
        return self

    @property
    def budget(self) -> str:
        """The name of the one that is given."""
        return "bytes" if self.bytes is not None else "tpot_ms" if self.tpot_ms is not None else "parameters"


class Shrink(Technique):
    """Fits the model into a budget: the best of all ways to take blocks, heads and MLP channels out, by measured KLD.

    Depth and width are searched together, as in Minitron (Muralidharan et al., arXiv 2407.14679): all combinations of blocks
    gone, KV heads kept and channels kept are counted that just fit the budget, up to 36 of them, evenly chosen, are measured
    without training, and the best one is made by `drop_layers` and `prune_width`. Scores stand in for the search over single
    blocks that Puzzle (arXiv 2411.19146) does: blocks go in the order of the KLD that each costs alone, heads and channels in
    that of what they contribute. KLD is measured on up to 1,024 tokens of calibration text, a quarter of it at most, that
    the scores and the refit of `prune_width` do not see. The artifact's `shrink.json` and `shrink.svg` show all that was
    measured. Train afterwards (`distil`); depth is faster than width of the same bytes where these do not bind.

    parameters  what stays of the model: a share 0 … 1 with a decimal point, or a number of parameters; default null, which is
                0.75 where no other budget is given. Embeddings and head count, and stay.
    bytes       instead: what may be stored, as "300MB" or a number; default null. In the dtype of the model as it is opened:
                a later step that rounds makes it smaller.
    tpot_ms     instead: milliseconds per token of one row when memory binds, weights read ÷ this machine's measured read rate,
                at a short context; default null. Kernels come close to it for large models only, see `mbu` of `infopt bench`.
    layers      true (default): whole blocks may go.
    heads       true (default): KV heads may go, each with its queries, as many in every block.
    channels    true (default): MLP channels may go, as many in every block.
    multiple    channels stay a multiple of it where they are, as kernels and group sizes want. ≥ 1, default 32.
    """

    Options = ShrinkOptions
    needs = Needs(calibration=True)
    walks = True
    options: ShrinkOptions

    # --- The budget -----------------------------------------------------------------------------------------------------

    def check(self, shapes: Shapes, path: str) -> None:
        space, known = self._space(shapes, path), self._known(path)
        if known is not None:
            self._require(space, *known, path)

    def _space(self, shapes: Shapes, path: str) -> Space:
        o = self.options
        try:
            return frontier.space(shapes, path, layers=o.layers, heads=o.heads, channels=o.channels, multiple=o.multiple)
        except RecipeError as error:
            error.hint = "heads: false and channels: false let blocks alone go" if o.layers else error.hint
            raise

    def _known(self, path: str) -> tuple[float, float] | None:
        """Bytes of a parameter and read rate, as far as the budget asks for them; None where only the run knows them."""
        if self.options.budget == "parameters":
            return 1.0, 1.0
        if self.element_bytes is None or (self.options.budget == "tpot_ms" and self.machine is None):
            return None
        return self.element_bytes(), self._rate(path)

    def _rate(self, path: str) -> float:
        """Bytes that this machine reads in a second, measured. Raises RecipeError where a budget needs it and nobody knows."""
        if self.options.budget != "tpot_ms":
            return 1.0
        rate = self.machine().read_bytes_per_s if self.machine else None
        if not rate:
            message = "found tpot_ms, but no read rate was measured on this machine; allowed: parameters or bytes"
            raise RecipeError(
                f"{path}.tpot_ms", message, hint="infopt doctor shows what was measured; bytes: 300MB needs no rate"
            )
        return rate

    def _limit(self, shapes: Shapes, element: float, rate: float) -> int:
        """Parameters of `element` bytes each that fit the budget."""
        o = self.options
        if o.bytes is not None:
            return int(units.parse_size(o.bytes) / element + CLOSE)
        if o.tpot_ms is not None:
            return int(o.tpot_ms / 1000 * rate / element + CLOSE) + _unread(shapes)
        share = SHARE if o.parameters is None else o.parameters
        return int(shapes.parameters * share + CLOSE) if isinstance(share, float) else share

    @property
    def _budget(self) -> Any:
        """As the recipe says it."""
        given = getattr(self.options, self.options.budget)
        return SHARE if given is None else given

    def _require(self, space: Space, element: float, rate: float, path: str) -> int:
        """The parameters that may stay. Raises RecipeError for a budget that nothing can meet, or that the model meets."""
        o, shapes, least = self.options, space.shapes, space.parameters(space.least)
        limit, whole = self._limit(shapes, element, rate), space.shapes.parameters
        if least <= limit < whole:
            return limit
        may = [name for name in ("layers", "heads", "channels") if getattr(o, name)]
        allowed = f"allowed: {least:,}, the smallest that {' and '.join(may)} can make it, … {whole - 1:,}"
        found = f"found {self._budget}, which is {limit:,} parameters"
        if limit >= whole:
            raise RecipeError(f"{path}.{o.budget}", f"{found}, and the model's {whole:,} meet it already; {allowed}")
        smallest = {
            "parameters": str(least),
            "bytes": str(math.ceil(least * element)),
            "tpot_ms": _rounded_up((least - _unread(shapes)) * element / rate * 1000),
        }
        raise RecipeError(f"{path}.{o.budget}", f"{found}; {allowed}", hint=f"{o.budget}: {smallest[o.budget]}")

    def reshape(self, shapes: Shapes) -> Shapes:
        """Those of the largest model on the frontier, as text decides which; unchanged where the budget is unknown."""
        known = self._known("shrink")
        if known is None:
            return shapes
        space = self._space(shapes, "shrink")
        return space.cut(self._likely(space, self._limit(shapes, *known)))

    def _likely(self, space: Space, limit: int) -> Cut:
        return max(space.frontier(limit), key=space.parameters)

    # --- The choice -----------------------------------------------------------------------------------------------------

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        import torch

        from infopt.calibrate import cuts
        from infopt.calibrate.calls import decoder_blocks
        from infopt.calibrate.influence import left_out
        from infopt.calibrate.sensitivity import Probe
        from infopt.layers import narrowing

        if bundle.packed or getattr(bundle.model, "hf_quantizer", None) is not None:
            raise InputError("the model's weights are quantized already", hint="put shrink before the step that quantizes")
        if not context.calibration_ids:
            raise InputError("what goes is chosen on text", hint="calibration: {text: bundled, samples: 128, tokens: 256}")
        space, limit = self._open(bundle)
        if space.whole is not None:  # refuses norms over all heads before the long part
            narrow = replace(space.whole, kv_heads=space.least.kv_heads, mlp=space.least.mlp)
            narrowing.require_fit(bundle.model, decoder_blocks(bundle.model)[1], space.whole, narrow)
        held_out, rest = _split(context.calibration_ids)
        widths = []
        if space.whole is not None:
            said = replace(context, calibration_ids=rest, progress=lambda line: context.progress(f"what contributes, {line}"))
            widths = cuts.worths(bundle, said, space.whole)
        context.progress("the model's own answers")
        probe = Probe.of(bundle, held_out, torch.device(context.device), rounded=True)
        alone = left_out(probe, (), context.progress) if self.options.layers else {}
        space = replace(space, order=sorted(alone, key=alone.__getitem__))
        candidates = frontier.thinned(space.frontier(limit), MOST)
        measured = []
        for number, cut in enumerate(candidates, start=1):
            kld = cuts.kld(probe, set(space.order[: cut.gone]), widths, space.whole, cut.kv_heads, cut.mlp)
            context.progress(f"candidate {number} of {len(candidates)}: {_said(cut, space)}: KLD {units.significant(kld)}")
            measured.append(kld)
        best = min(range(len(measured)), key=measured.__getitem__)
        bundle = self._make(bundle, context, space, candidates[best], held_out, rest)
        found = self._description(probe, space, limit, alone, list(zip(candidates, measured, strict=True)), best)
        drawn = _drawn(list(zip(candidates, measured, strict=True)), _said(candidates[best], space))
        return replace(bundle, files={**bundle.files, "shrink.json": json.dumps(found, indent=1) + "\n", "shrink.svg": drawn})

    def _open(self, bundle: Bundle) -> tuple[Space, int]:
        """What may go of an open model, and the parameters that may stay. Raises RecipeError."""
        from infopt.model import shapes

        found = shapes.opened(bundle.model)
        parameters = list(bundle.model.parameters())
        element = sum(part.nbytes for part in parameters) / sum(part.numel() for part in parameters)
        space = self._space(found, "shrink")
        return space, self._require(space, element, self._rate("shrink"), "shrink")

    def _steps(self, space: Space, cut: Cut) -> tuple[DropLayers | None, PruneWidth | None]:
        """Those that make it."""
        drop, whole = DropLayers(DropLayersOptions(layers=tuple(space.order[: cut.gone]))), space.whole
        if whole is None or (cut.kv_heads, cut.mlp) == (whole.kv_heads, whole.mlp):
            return drop, None
        options = PruneWidthOptions(
            mlp=cut.mlp if cut.mlp < whole.mlp else None,
            kv_heads=cut.kv_heads if cut.kv_heads < whole.kv_heads else None,
            multiple=self.options.multiple,
        )
        return drop if cut.gone else None, PruneWidth(options)

    def _make(
        self, bundle: Bundle, context: Context, space: Space, cut: Cut, held_out: Sequence[Any], rest: Sequence[Any]
    ) -> Bundle:
        drop, prune = self._steps(space, cut)
        context.progress(f"making it: {_said(cut, space)}")
        if drop is not None:
            bundle = drop.apply(bundle, replace(context, calibration_ids=tuple(held_out)))
        return bundle if prune is None else prune.apply(bundle, replace(context, calibration_ids=tuple(rest)))

    def _description(
        self, probe: Probe, space: Space, limit: int, alone: dict[int, float], measured: list[tuple[Cut, float]], best: int
    ) -> dict[str, Any]:
        """What `shrink.json` holds: KLD in nats; of candidates as they were measured, of the model that was made refitted."""
        from infopt.calibrate.cuts import cut_kld

        o, cut = self.options, measured[best][0]
        rows = [_row(space, cut) | {"kld": kld} for cut, kld in measured]
        return {
            "schema_version": 1,
            "budget": {o.budget: self._budget},
            "read_bytes_per_s": self._rate("shrink") if o.budget == "tpot_ms" else None,
            "parameters": limit,
            "tokens": probe.ids.numel(),
            "left_out": alone,
            "candidates": rows,
            "chosen": {**rows[best], "blocks": list(space.order[: cut.gone])},
            "made_kld": cut_kld(probe, set(space.order[: cut.gone])),
        }

    # --- What it costs --------------------------------------------------------------------------------------------------

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        """As if the largest model on the frontier were the one."""
        rate, element = machine.read_bytes_per_s, before.weights_bytes / shapes.parameters
        if self.options.budget == "tpot_ms" and not rate:
            return replace(before, seconds=None)
        space, limit = self._space(shapes, "shrink"), self._limit(shapes, element, rate or 1.0)
        cuts = space.frontier(limit)
        tokens, seconds, peak = self.calibration_tokens, 0.0 if rate else None, before.peak_bytes
        state, now = before, shapes
        for step in filter(None, self._steps(space, self._likely(space, limit))):
            step.calibration_tokens = tokens
            state, now = step.predict(now, state, machine), step.reshape(now)
            seconds = None if seconds is None or state.seconds is None else seconds + state.seconds
            peak = max(peak, state.peak_bytes)
        step_alone = Prediction(state.weights_bytes, peak, seconds)
        # Blocks left out one by one cost half a pass each on average; a candidate costs one of the blocks that it keeps.
        runs = 1 + shapes.layers / 2 + min(MOST, len(cuts))
        measured = passes.add(step_alone, before, shapes, min(PROBE_TOKENS, tokens), machine, passes=runs, hessians=False)
        return passes.add(measured, before, shapes, tokens, machine, passes=1.0, hessians=False)


def _unread(shapes: Shapes) -> int:
    """Parameters that a step of one row does not read: an embedding that is no head too."""
    return 0 if shapes.is_head_tied else shapes.embedding


def _rounded_up(value: float) -> str:
    """To three digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step) * step:.3g}"


def _split(samples: tuple[tuple[int, ...], ...]) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Windows to measure on, a quarter at most, and windows for scores and refit; all for both where there is one alone."""
    if len(samples) == 1:
        return (samples[0][:PROBE_TOKENS],), samples
    count = max(1, min(PROBE_TOKENS // len(samples[0]), len(samples) // 4))
    return tuple(sample[:PROBE_TOKENS] for sample in samples[:count]), samples[count:]


def _said(cut: Cut, space: Space) -> str:
    gone = f"{cut.gone} of {space.shapes.layers} blocks gone"
    return gone if space.whole is None else f"{gone}, {cut.kv_heads} KV heads and {cut.mlp} channels kept"


def _row(space: Space, cut: Cut) -> dict[str, Any]:
    counts = asdict(cut) if space.whole is not None else {"gone": cut.gone}
    return {**counts, "parameters": space.parameters(cut)}


def _drawn(measured: list[tuple[Cut, float]], chosen: str) -> str:
    """KLD over blocks gone, a curve for each number of KV heads, labelled with channels; over heads where no block may go."""
    from infopt.calibrate.curve_plot import COLOURS, Curve, plot

    title = f"KLD to the whole model, nats; chosen: {chosen}"
    if not any(cut.gone for cut, _ in measured):
        points = [(cut.kv_heads, kld) for cut, kld in measured]
        return plot(title, [Curve("channels kept", points, [str(cut.mlp) for cut, _ in measured])], "KV heads kept")
    best: dict[int, float] = {}
    for cut, kld in measured:
        best[cut.kv_heads] = min(kld, best.get(cut.kv_heads, math.inf))
    curves = []
    for heads in sorted(sorted(best, key=best.__getitem__)[: len(COLOURS)], reverse=True):
        mine = [(cut, kld) for cut, kld in measured if cut.kv_heads == heads]
        name = f"{heads} KV heads; channels kept" if heads else "blocks alone"
        labels = [str(cut.mlp) if heads else "" for cut, _ in mine]
        curves.append(Curve(name, [(cut.gone, kld) for cut, kld in mine], labels))
    return plot(title, curves, "blocks gone")


TECHNIQUE = Shrink
