"""llm-compressor's own quantizers, run in an environment of their own: what infopt's are held against."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from infopt.backends.environments import LLMCOMPRESSOR
from infopt.layers import grid, passes, sparsity
from infopt.layers.grid import Grid
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import GridTechnique, Modules, Needs, Options

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

Method = Literal["gptq", "rtn", "w8a8", "smoothquant", "smoothquant_gptq", "fp8", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16",
                 "sparsegpt", "wanda"]  # fmt: skip
INTEGERS: tuple[Method, ...] = ("gptq", "rtn")
PRUNING: tuple[Method, ...] = ("sparsegpt", "wanda")
CALIBRATED: tuple[Method, ...] = ("gptq", "smoothquant", "smoothquant_gptq", "nvfp4", *PRUNING)
#: Options that are not of every method.
READ_BY: dict[str, tuple[Method, ...]] = {
    **dict.fromkeys(("bits", "group_size", "symmetric"), INTEGERS),
    "act_order": ("gptq", "smoothquant_gptq"),
    "damping": ("gptq", "smoothquant_gptq", "sparsegpt"),
    **dict.fromkeys(("sparsity", "pattern"), PRUNING),
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
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    pattern: Literal["2:4", "4:8"] | None = None
    batch_size: int = Field(default=8, ge=1)
    ignore: Modules = ("lm_head",)

    @model_validator(mode="after")
    def _are_read(self) -> Self:
        for option, methods in READ_BY.items():
            if self.method not in methods and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"method {self.method} does not read {option}, which is of {', '.join(methods)}")
        return self


class LlmCompressor(GridTechnique):
    """Quantizes or prunes with llm-compressor, the reference implementation that vLLM's users know.

    GPTQ (Frantar et al., arXiv 2210.17323), SmoothQuant (Xiao et al., arXiv 2211.10438), rounding to the formats of
    compressed-tensors; SparseGPT (arXiv 2301.00774) and Wanda (arXiv 2306.11695). It runs out of process in the
    environment `llmcompressor`, from the model's own files and the recipe's calibration tokens; infopt opens what it
    wrote and stores it unchanged. The model is then in memory twice.

    method      gptq (default) and rtn: integer weights on the grid given below. w8a8: int8 weights per row, int8
                activations per token. smoothquant: the same after SmoothQuant; smoothquant_gptq: and rounded by GPTQ.
                fp8: E4M3 weights per row, activations per token. nvfp4, mxfp4: 4-bit floats, activations too;
                nvfp4a16, mxfp4a16: weights only. sparsegpt, wanda: weights set to zero, none rounded. Calibration text is for
                gptq, smoothquant, smoothquant_gptq, nvfp4, sparsegpt and wanda.
    bits        4 or 8 per weight, default 4; of gptq and rtn.
    group_size  input features that share a scale, ≥ 8, default 64; null: per row. Of gptq and rtn.
    symmetric   true (default): q·scale, false: (q − zero)·scale. Of gptq and rtn.
    act_order   GPTQ rounds the columns that matter most first; scales are fixed beforehand. Default true.
    damping     share of the Hessian's mean diagonal that GPTQ and SparseGPT add to it, 0 … 1, default 0.01.
    smoothing   SmoothQuant's alpha, 0 … 1, default 0.8: how much of the activations' range moves into the weights.
    sparsity    share of weights that pruning sets to zero, 0 … 1, default 0.5.
    pattern     of pruning: null (default), 2:4 or 4:8.
    batch_size  calibration windows that run at once, ≥ 1, default 8. An option that the method does not read is refused.
    ignore      modules left alone: globs over dotted names, or last parts such as `q_proj`; default [lm_head].
    """

    Options = LlmCompressorOptions
    needs = Needs(modules=("compressed_tensors",), calibration=True, environment=LLMCOMPRESSOR)
    options: LlmCompressorOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.needs = replace(self.needs, calibration=self.options.method in CALIBRATED)
        if self._prunes:
            self.packs, self.remark = False, sparsity.REMARK

    @property
    def _prunes(self) -> bool:
        return self.options.method in PRUNING

    def check(self, shapes: Shapes, path: str) -> None:
        o = self.options
        if not self._prunes:
            return super().check(shapes, path)
        grid.check_ignore(shapes, o.ignore, path)
        sparsity.check(shapes, o.sparsity, o.pattern, o.ignore, path, lambda rows, inputs: inputs)

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
            return result.adopt_dense(folder, bundle) if self._prunes else result.adopt(folder, bundle)

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
            "pruning": self._pruning(),
            "smoothing": o.smoothing if o.method.startswith("smoothquant") else None,
            "batch_size": o.batch_size,
            "ignore": ignore,
        }

    def _gptq(self) -> dict[str, Any] | None:
        o = self.options
        if not o.method.endswith("gptq") or self._prunes:
            return None
        return {"actorder": "static" if o.act_order else None, "dampening_frac": o.damping}

    def _pruning(self) -> dict[str, Any] | None:
        o = self.options
        if not self._prunes:
            return None
        more = {"dampening_frac": o.damping} if o.method == "sparsegpt" else {}
        return {"method": o.method, "sparsity": o.sparsity, "mask_structure": o.pattern or "0:0", **more}

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        step = super().predict(shapes, before, machine)
        there = passes.elsewhere(replace(before, seconds=step.seconds) if self._prunes else step, before)
        if not self.needs.calibration:
            return there
        hessians = self.options.method.endswith("gptq")  # of sparsegpt too
        return passes.add(there, before, shapes, self.calibration_tokens, machine, passes=2, hessians=hessians)


TECHNIQUE = LlmCompressor
