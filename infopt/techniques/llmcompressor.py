"""llm-compressor's own quantizers, run in an environment of their own: what infopt's are held against."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from infopt.backends.environments import LLMCOMPRESSOR
from infopt.layers import passes
from infopt.layers.grid import Grid
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import GridTechnique, Modules, Needs, Options

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

Method = Literal["gptq", "rtn", "w8a8", "smoothquant", "smoothquant_gptq", "fp8", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"]
INTEGERS: tuple[Method, ...] = ("gptq", "rtn")
CALIBRATED: tuple[Method, ...] = ("gptq", "smoothquant", "smoothquant_gptq", "nvfp4")
#: Options that are not of every method.
READ_BY: dict[str, tuple[Method, ...]] = {
    **dict.fromkeys(("bits", "group_size", "symmetric"), INTEGERS),
    **dict.fromkeys(("act_order", "damping"), ("gptq", "smoothquant_gptq")),
    "smoothing": ("smoothquant", "smoothquant_gptq"),
    "batch_size": CALIBRATED,
}
#: Method → llm-compressor's name of the format, and the same as a grid, where the method fixes it.
PRESETS: dict[str, tuple[str, Grid]] = {
    "w8a8": ("W8A8", Grid(8, activations="token")),
    "smoothquant": ("W8A8", Grid(8, activations="token")),
    "smoothquant_gptq": ("W8A8", Grid(8, activations="token")),
    "fp8": ("FP8_DYNAMIC", Grid(8, kind="fp8", activations="token")),
    "nvfp4": ("NVFP4", Grid(4, 16, kind="nvfp4", activations="group")),
    "nvfp4a16": ("NVFP4A16", Grid(4, 16, kind="nvfp4")),
    "mxfp4": ("MXFP4", Grid(4, 32, kind="mxfp4", activations="group")),
    "mxfp4a16": ("MXFP4A16", Grid(4, 32, kind="mxfp4")),
}


class LlmCompressorOptions(Options):
    method: Method = "gptq"
    bits: Literal[4, 8] = 4
    group_size: int | None = Field(default=64, ge=8)
    symmetric: bool = True
    act_order: bool = True
    damping: float = Field(default=0.01, gt=0, lt=1)
    smoothing: float = Field(default=0.8, ge=0, le=1)
    batch_size: int = Field(default=8, ge=1)
    ignore: Modules = ("lm_head",)

    @model_validator(mode="after")
    def _are_read(self) -> Self:
        for option, methods in READ_BY.items():
            if self.method not in methods and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"method {self.method} does not read {option}, which is of {', '.join(methods)}")
        return self


class LlmCompressor(GridTechnique):
    """Quantizes with llm-compressor, the reference implementation that vLLM's users know.

    GPTQ (Frantar et al., arXiv 2210.17323), SmoothQuant (Xiao et al., arXiv 2211.10438), and rounding to the formats of
    compressed-tensors. It runs out of process in the environment `llmcompressor`, from the model's own files and the
    recipe's calibration tokens; infopt opens what it wrote and stores it unchanged. The model is then in memory twice.

    method      gptq (default) and rtn: integer weights on the grid given below. w8a8: int8 weights per row, int8
                activations per token. smoothquant: the same after SmoothQuant; smoothquant_gptq: and rounded by GPTQ.
                fp8: E4M3 weights per row, activations per token. nvfp4, mxfp4: 4-bit floats, activations too;
                nvfp4a16, mxfp4a16: weights only. Calibration text is for gptq, smoothquant, smoothquant_gptq, nvfp4.
    bits        4 or 8 per weight, default 4; of gptq and rtn.
    group_size  input features that share a scale, ≥ 8, default 64; null: per row. Of gptq and rtn.
    symmetric   true (default): q·scale, false: (q − zero)·scale. Of gptq and rtn.
    act_order   GPTQ rounds the columns that matter most first; scales are fixed beforehand. Default true.
    damping     share of the Hessian's mean diagonal that GPTQ adds to it, 0 … 1, default 0.01.
    smoothing   SmoothQuant's alpha, 0 … 1, default 0.8: how much of the activations' range moves into the weights.
    batch_size  calibration windows that run at once, ≥ 1, default 8. An option that the method does not read is refused.
    ignore      modules left alone: globs over dotted names, or last parts such as `q_proj`; default [lm_head].
    """

    Options = LlmCompressorOptions
    needs = Needs(modules=("compressed_tensors",), calibration=True, environment=LLMCOMPRESSOR)
    options: LlmCompressorOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.needs = replace(self.needs, calibration=self.options.method in CALIBRATED)

    @property
    def _grid(self) -> Grid:
        o = self.options
        return PRESETS[o.method][1] if o.method in PRESETS else Grid(o.bits, o.group_size, symmetric=o.symmetric)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.backends import result, work
        from infopt.layers import packing

        layers = packing.linears(bundle, self.options.ignore)
        if not layers:
            return bundle
        if self.needs.calibration:
            work.require_calibration(context)
        else:
            context = replace(context, calibration_ids=())
        job = self._job(packing.left_alone(bundle.model, layers))
        with work.done(LLMCOMPRESSOR, bundle, context, job) as folder:
            return result.adopt(folder, bundle)

    def _job(self, ignore: list[str]) -> dict[str, Any]:
        """The options in llm-compressor's words."""
        o, rule = self.options, self._grid
        weights = {
            "num_bits": rule.bits, "type": "int", "symmetric": rule.symmetric,
            "strategy": "group" if rule.group_size else "channel", "group_size": rule.group_size,
        }  # fmt: skip
        return {
            "scheme": PRESETS[o.method][0] if o.method in PRESETS else {"targets": ["Linear"], "weights": weights},
            "gptq": self._gptq(),
            "smoothing": o.smoothing if o.method.startswith("smoothquant") else None,
            "batch_size": o.batch_size,
            "ignore": ignore,
        }

    def _gptq(self) -> dict[str, Any] | None:
        o = self.options
        if not o.method.endswith("gptq"):
            return None
        return {"actorder": "static" if o.act_order else None, "dampening_frac": o.damping}

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        there = passes.elsewhere(super().predict(shapes, before, machine), before)
        if not self.needs.calibration:
            return there
        gptq = self.options.method.endswith("gptq")
        return passes.add(there, before, shapes, self.calibration_tokens, machine, passes=2, hessians=gptq)


TECHNIQUE = LlmCompressor
