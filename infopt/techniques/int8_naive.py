"""torch's own dynamic int8: fast, and a lesson in why activations need more than one scale."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from infopt.layers import grid
from infopt.layers.grid import Grid
from infopt.model.plan import LoadPlan
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Needs, Options, Technique

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle


class Int8NaiveOptions(Options):
    head: bool = True


class Int8Naive(Technique):
    """`torch.ao.quantization.quantize_dynamic`: int8 weights and activations, one scale per tensor for each.

    One scale per weight matrix and one for all tokens of a step: a few outlier features set the scale and the others
    round to almost nothing (LLM.int8(), arXiv 2208.07339, section 4). It ships so that a quality gate has something
    to catch. CPU only, in float32; the loaded dtype is float32 whatever the recipe says.

    head  whether the output head is quantized too, default true: faster and worse.

    Applied at load: the packed weights have no file format that loads elsewhere.
    """

    Options = Int8NaiveOptions
    needs = Needs(cpu=True)
    arithmetic = "int8"
    at_load = True
    options: Int8NaiveOptions

    def plan(self, plan: LoadPlan) -> LoadPlan:
        return replace(plan, dtype="float32")

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        import torch

        model: Any = bundle.model
        model.float()  # the packed layers take nothing else
        quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic  # untyped
        names = {name for name, module in bundle.model.named_modules() if type(module) is torch.nn.Linear}
        if not self.options.head:
            names.discard(grid.HEAD)
        with warnings.catch_warnings():
            # torch announces that this API moves to torchao and that quantized tensors go; both are this technique's subject.
            warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            quantize_dynamic(bundle.model, names, dtype=torch.qint8, inplace=True)
        return bundle

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        """Stored bytes stay: the step runs after loading, and its packed weights live in memory only."""
        layers = [*shapes.linear.values(), *([shapes.head] if shapes.head and self.options.head else [])]
        packed = sum(Grid(8).stored_bytes(shape, 4) for shape in layers)
        rate = machine.read_bytes_per_s
        seconds = sum(out * inner for out, inner in layers) * grid.TRAFFIC_BYTES / rate if rate else None
        return replace(before, peak_bytes=max(before.peak_bytes, 4 * shapes.parameters + packed), seconds=seconds)


TECHNIQUE = Int8Naive
