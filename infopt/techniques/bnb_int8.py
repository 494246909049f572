"""LLM.int8() by bitsandbytes."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from infopt.layers import grid
from infopt.model.plan import LoadPlan
from infopt.protocols import Machine, Prediction, Shapes
from infopt.techniques.base import Needs, Options, Technique

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle


class BnbInt8Options(Options):
    threshold: float = Field(default=6.0, ge=0)


class BnbInt8(Technique):
    """Int8 weights per row and int8 activations per token, with outlier features kept in floating point.

    LLM.int8() (Dettmers et al., arXiv 2208.07339): features whose magnitude exceeds a threshold are multiplied in
    floating point, the others in int8 with one scale per token and one per output row. Saves memory; it was made for
    training and is seldom faster. bitsandbytes quantizes while transformers reads the weights, and leaves the head alone.

    threshold  activation magnitude above which a feature counts as an outlier, ≥ 0, default 6.0. Lower keeps more
               features exact and is slower; 0 switches the decomposition off.
    """

    Options = BnbInt8Options
    needs = Needs(modules=("bitsandbytes", "accelerate"))
    packs = True
    arithmetic = "int8"
    options: BnbInt8Options

    def plan(self, plan: LoadPlan) -> LoadPlan:
        import transformers

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports a cast at every product
        make: Any = transformers.BitsAndBytesConfig  # untyped
        return replace(plan, quantization_config=make(load_in_8bit=True, llm_int8_threshold=self.options.threshold))

    def reopen(self, bundle: Bundle) -> Bundle:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return bundle

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        """One byte a weight and a float32 scale a row; each layer is quantized as it is read."""
        element = before.weights_bytes / shapes.parameters
        stored = before.weights_bytes - round(shapes.linear_parameters * (element - 1))
        stored += sum(4 * out for out, _ in shapes.linear.values())
        return grid.predict_load(shapes, stored, before, machine)


TECHNIQUE = BnbInt8
