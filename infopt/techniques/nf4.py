"""4-bit NormalFloat by bitsandbytes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from infopt.errors import RecipeError
from infopt.layers import grid
from infopt.model.plan import LoadPlan
from infopt.protocols import Machine, Prediction, Shapes
from infopt.techniques.base import Needs, Options, Technique

#: Fixed by transformers: weights per scale, and scales per second-level scale.
BLOCK, NESTED_BLOCK = 64, 256
#: Outputs that bitsandbytes' CPU kernel works on at a time.
KERNEL_ROWS = 32
#: Bytes stored per layer beside weights and scales: the 16 levels, a description, and double_quant's 256 levels.
LAYER_BYTES, NESTED_LAYER_BYTES = 160, 1100


class Nf4Options(Options):
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class Nf4(Technique):
    """4-bit weights on the quantiles of a normal distribution, one scale per 64 weights.

    QLoRA (Dettmers et al., arXiv 2305.14314, section 3): trained weights are close to normal, so 16 levels at normal
    quantiles waste none. No data needed. bitsandbytes quantizes while transformers reads the weights, leaves the head
    alone, and dequantizes block by block when a layer runs.

    quant_type     nf4 (default) or fp4, a 4-bit float whose levels fit normal weights less well.
    double_quant   default true: the scales are quantized to 8 bits in blocks of 256, 0.37 bits per weight less.
    compute_dtype  what a layer multiplies in: bfloat16 (default; bitsandbytes' fast CPU kernel needs it), float16, float32.
    """

    Options = Nf4Options
    needs = Needs(modules=("bitsandbytes", "accelerate"))
    packs = True
    options: Nf4Options

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.arithmetic = self.options.compute_dtype

    def check(self, shapes: Shapes, path: str) -> None:
        if self.device == "cpu":
            check_cpu_kernel(shapes.linear, path)

    def plan(self, plan: LoadPlan) -> LoadPlan:
        import transformers

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that downloads kernels
        make: Any = transformers.BitsAndBytesConfig  # untyped
        config = make(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.options.quant_type,
            bnb_4bit_use_double_quant=self.options.double_quant,
            bnb_4bit_compute_dtype=self.options.compute_dtype,
        )
        return replace(plan, quantization_config=config)

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        """Each layer is quantized as it is read."""
        stored = stored_bytes(shapes.linear.values(), shapes, before, self.options.double_quant)
        return grid.predict_load(shapes, stored, before, machine)


def check_cpu_kernel(layers: Mapping[str, tuple[int, int]], path: str) -> None:
    """Refuses layers that bitsandbytes cannot repack for a CPU with bf16 instructions, as it does when they first run.

    Raises RecipeError.
    """
    odd = next((name for name, (out, inner) in layers.items() if out % KERNEL_ROWS or inner % BLOCK), None)
    if odd is None:
        return
    from bitsandbytes import functional

    library: Any = functional  # untyped
    if library.has_avx512bf16():
        raise RecipeError(
            path,
            f"bitsandbytes' kernel for this CPU takes multiples of {KERNEL_ROWS} outputs and {BLOCK} inputs; {odd} has "
            f"{layers[odd][0]} and {layers[odd][1]}",
            hint="rtn with bits: 4, or --device cuda where there is one",
        )


def stored_bytes(layers: Collection[tuple[int, int]], shapes: Shapes, before: Prediction, double_quant: bool) -> int:
    """Of the model `before` with `layers` ([out, in] each) in 4 bits: half a byte a weight, a scale a block, and the levels."""
    scale = 1 + 4 / NESTED_BLOCK if double_quant else 4
    element = before.weights_bytes / shapes.parameters
    weights = sum(out * inner for out, inner in layers)
    stored = before.weights_bytes - round(weights * (element - 0.5 - scale / BLOCK))
    return stored + len(layers) * (LAYER_BYTES + (NESTED_LAYER_BYTES if double_quant else 0))


TECHNIQUE = Nf4
