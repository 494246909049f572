"""Bits where they matter: a width per layer, chosen by measured sensitivity under a budget."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from infopt.errors import InputError, RecipeError
from infopt.layers import grid, passes
from infopt.layers.grid import Grid, ScaleDType
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.result import write_atomic
from infopt.techniques.base import GridTechnique, Modules, Needs, Options
from infopt.techniques.gptq import Gptq, GptqOptions, round_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from infopt.calibrate.blocks import Block
    from infopt.calibrate.sensitivity import Probe, Unit
    from infopt.model.bundle import Bundle

Width = Literal[2, 3, 4, 5, 6, 8]
#: Calibration tokens that sensitivities are measured on, and that the method does not see, where there are as many.
PROBE_TOKENS = 512


class MixedOptions(Options):
    average_bits: float | None = Field(default=None, ge=2, le=8)
    max_kld: float | None = Field(default=None, gt=0)
    widths: Annotated[tuple[Width, ...], Field(strict=False, min_length=2)] = (3, 4, 5, 6)
    method: Literal["rtn", "gptq"] = "gptq"
    group_size: int | None = Field(default=64, ge=8)
    symmetric: bool = True
    scale_dtype: ScaleDType = "auto"
    ignore: Modules = ("lm_head",)

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.average_bits is not None and self.max_kld is not None:
            raise ValueError("found average_bits and max_kld; allowed: one of the two")
        if self.max_kld is None and not min(self.widths) <= self.bits <= max(self.widths):
            raise ValueError(f"average_bits {self.bits:g} lies outside widths {min(self.widths)} … {max(self.widths)}")
        return self

    @property
    def bits(self) -> float:
        """What layers have on average, at most."""
        return max(self.widths) if self.max_kld is not None else self.average_bits or 4.0


class Mixed(GridTechnique):
    """Measures what each layer costs at each width, and spends a budget of bytes, or of KLD, where it buys most.

    Layers differ in how much rounding them moves the model's answers (HAWQ, arXiv 1905.03696, by the Hessian's largest
    eigenvalue). Here nothing is modelled: each unit is rounded alone, at each width, by the method itself, and the KLD of the
    final distribution is measured on calibration text that the rounding never sees. KLDs of units are taken to add up; the
    artifact's `sensitivity.json` says what was predicted so and what was then measured, `sensitivity.svg` shows both choices and
    costs. Units are the layers that engines fuse and that read the same input: q, k and v; o; gate and up; down.

    average_bits  the size that every layer at so many bits would have, scales included; default null, which is 4.0
                  where max_kld is not given.
    max_kld       nats that the sum of the units' KLD may reach, at least bytes; default null. Instead of average_bits.
    widths        bits to choose from, of 2, 3, 4, 5, 6 and 8; default [3, 4, 5, 6]. [4, 8] where vLLM is to run it.
    method        how layers are rounded, to measure and in the end: gptq (default), or rtn. Measured by rounding to nearest,
                  the widths would be those that suit rounding: gptq then gains nothing on one width for all.
    group_size    input features that share a scale, ≥ 8, default 64; must divide every layer's inputs. null: per row.
    symmetric     true (default): q·scale. false: (q − zero)·scale.
    scale_dtype   what scales are stored in: auto (the model's dtype, default), float32, bfloat16, float16.
    ignore        modules left alone, as globs or last parts; default [lm_head].
    """

    Options = MixedOptions
    needs = Needs(modules=("compressed_tensors",), calibration=True)
    walks = True
    options: MixedOptions

    @property
    def _grid(self) -> Grid:
        return self._of_width(max(self.options.widths))

    @property
    def _gptq(self) -> Gptq:
        return Gptq(GptqOptions(group_size=self.options.group_size, ignore=self.options.ignore))

    def _of_width(self, bits: int) -> Grid:
        o = self.options
        return Grid(bits, o.group_size, o.scale_dtype, o.symmetric)

    def check(self, shapes: Shapes, path: str) -> None:
        super().check(shapes, path)
        if len(set(self.options.widths)) < len(self.options.widths):
            raise RecipeError(f"{path}.widths", f"found {list(self.options.widths)}, which names a width twice")

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        import torch

        from infopt.calibrate.sensitivity import Probe, allot, predicted
        from infopt.calibrate.sensitivity_plot import plot
        from infopt.layers import packing

        if not packing.linears(bundle, self.options.ignore):
            return bundle
        held_out, rest = self._split(context.calibration_ids)
        context.progress("the model's own answers")
        probe = Probe.of(bundle, held_out, torch.device(context.device))
        context = replace(context, calibration_ids=rest)
        units = self._units(probe, bundle, context)
        allot(units, self._budget(units), self.options.max_kld or 0.0)
        if self.options.max_kld is not None and predicted(units) > self.options.max_kld:
            raise InputError(
                f"max_kld {self.options.max_kld:g} is out of reach: the best widths add up to {predicted(units):.3g}",
                hint="a higher max_kld, or wider widths",
            )
        grids = {layer: self._of_width(unit.bits) for unit in units for layer in unit.layers}
        packed = self._round(bundle, context, grids)
        found = description(units, probe.kld(), len(held_out) * len(held_out[0]))
        files = {**bundle.files, "sensitivity.json": json.dumps(found, indent=1) + "\n", "sensitivity.svg": plot(found)}
        return replace(packing.finish(bundle, packed, grids), files=files)

    def _split(self, samples: tuple[tuple[int, ...], ...]) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Windows to measure on, a quarter at most, and windows for the method."""
        if len(samples) < 2:
            raise InputError(
                f"mixed keeps a part of the calibration text to measure on; found {len(samples)} samples",
                hint="calibration: {samples: 128, tokens: 256}",
            )
        count = max(1, min(PROBE_TOKENS // len(samples[0]), len(samples) // 4))
        return tuple(sample[:PROBE_TOKENS] for sample in samples[:count]), samples[count:]

    def _units(self, probe: Probe, bundle: Bundle, context: Context) -> list[Unit]:
        """Every unit measured at every width; read again where an interrupted run had come so far."""
        from infopt.calibrate import blocks
        from infopt.calibrate.hessian import Hessian
        from infopt.calibrate.sensitivity import Unit

        kept = context.unfinished / "sensitivity.json" if context.unfinished else None
        found: list[list[Unit]] = []
        if kept and kept.is_file():
            read = json.loads(kept.read_text(), object_hook=_widths)
            found = [[Unit(**{**unit, "layers": tuple(unit["layers"])}) for unit in block] for block in read]

        def work(block: Block) -> None:
            if block.index < len(found):
                return
            hessians = {stage[0]: Hessian() for stage in block.stages}
            block.observe(hessians, lambda name, x: hessians[name].add(x))
            found.append([self._measured(probe, block, stage, hessians.pop(stage[0]).mean()) for stage in block.stages])
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(kept, json.dumps([[asdict(unit) for unit in units] for units in found]))

        said = replace(context, unfinished=None, progress=lambda line: context.progress(f"sensitivity, {line}"))
        if len(found) < len(probe.blocks):
            blocks.walk(bundle, said, self.options.ignore, work)
        return [unit for units in found for unit in units]

    def _measured(self, probe: Probe, block: Block, names: tuple[str, ...], hessian: torch.Tensor) -> Unit:
        """A unit at every width; `hessian` [in, in] is that of its inputs."""
        from infopt.calibrate.sensitivity import Unit, measure

        unit, layers = Unit(names, {}, {}), [block.linears[name] for name in names]
        for width in sorted(self.options.widths):
            rule = self._of_width(width)
            unit.kld[width] = measure(probe, block.index, dict(zip(layers, self._rounded(layers, rule, hessian), strict=True)))
            unit.bytes[width] = sum(
                rule.stored_bytes((layer.out_features, layer.in_features), layer.weight.element_size()) for layer in layers
            )
        return unit

    def _rounded(self, layers: list[nn.Linear], rule: Grid, hessian: torch.Tensor) -> Sequence[torch.Tensor]:
        """Weights as the method rounds them, if nothing before them was."""
        import torch

        from infopt.layers import packing

        weight, dtype = torch.cat([layer.weight.float() for layer in layers]), layers[0].weight.dtype
        if self.options.method == "gptq":
            o = self._gptq.options
            dense, _ = round_columns(weight, hessian.clone(), rule, dtype, o.act_order, o.damping, o.clip)
        else:
            dense = packing.rounded(weight, packing.fit(weight, rule, dtype), rule)
        return torch.split(dense.to(dtype), [layer.out_features for layer in layers])

    def _budget(self, units: list[Unit]) -> float:
        """Bytes of all units at `average_bits`, between those of the whole numbers of bits around it."""
        if self.options.max_kld is not None:
            return math.inf
        widths, bits = sorted(self.options.widths), self.options.bits
        wide = next(w for w in widths if w >= bits)
        narrow = max(w for w in widths if w <= bits)
        share = (bits - narrow) / (wide - narrow) if wide > narrow else 0.0
        return sum(unit.bytes[narrow] * (1 - share) + unit.bytes[wide] * share for unit in units)

    def _round(self, bundle: Bundle, context: Context, grids: dict[str, Grid]) -> dict[str, dict[str, torch.Tensor]]:
        from infopt.layers import packing

        if self.options.method == "gptq":
            return self._gptq.round_blocks(bundle, context, grids.__getitem__)
        packed = {}
        for name, rule in grids.items():
            layer = bundle.model.get_submodule(name)
            packed[name], layer.weight.data = packing.pack(layer.weight, rule)  # type: ignore[arg-type]
        return packed

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        layers = grid.chosen(shapes, self.options.ignore)
        bits = self.options.bits
        narrow, wide = (
            grid.predict(self._of_width(b), layers, shapes, before, machine) for b in (math.floor(bits), math.ceil(bits))
        )
        share = bits - math.floor(bits)
        stored = round(narrow.weights_bytes * (1 - share) + wide.weights_bytes * share)
        # On average half of the blocks lie behind the one that was rounded; there are four units in each.
        runs = passes.add(
            replace(wide, weights_bytes=stored), before, shapes, PROBE_TOKENS, machine,
            passes=2 * shapes.layers * len(self.options.widths), hessians=False,
        )  # fmt: skip
        if self.options.method == "rtn":
            return runs
        # Hessians for the sensitivities, and those that gptq gathers block by block.
        return passes.add(runs, before, shapes, 2 * self.calibration_tokens, machine)


def _widths(found: dict[str, Any]) -> dict[Any, Any]:
    """JSON's keys are strings; widths are numbers."""
    return {int(key) if key.isdigit() else key: value for key, value in found.items()}


def description(units: list[Unit], measured_kld: float, tokens: int) -> dict[str, Any]:
    """What `sensitivity.json` holds: KLD in nats on `tokens` calibration tokens that no rounding saw."""
    from infopt.calibrate.sensitivity import predicted

    return {
        "schema_version": 1,
        "tokens": tokens,
        "predicted_kld": predicted(units),
        "measured_kld": measured_kld,
        "bytes": sum(unit.bytes[unit.bits] for unit in units),
        "units": [asdict(unit) for unit in units],
    }


TECHNIQUE = Mixed
