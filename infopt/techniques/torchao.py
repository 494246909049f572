"""torchao: PyTorch's own quantized linear layers, run from their few bits."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from infopt.errors import InputError
from infopt.layers import grid
from infopt.protocols import Machine, Prediction, Shapes
from infopt.techniques.base import Needs, Options, Technique

if TYPE_CHECKING:
    from infopt.model.plan import LoadPlan

Weights = Literal["int8", "int8_dynamic", "float8", "float8_dynamic"]


class TorchaoOptions(Options):
    config: Weights = "int8"


class Torchao(Technique):
    """Linear layers over 8-bit weights, one scale per output row, multiplied by torchao's kernels; the head stays.

    Or et al., TorchAO, arXiv 2507.16099. transformers quantizes while it reads the weights and writes torchao's own
    tensors, which plain transformers with torchao opens again; vLLM reads them with torchao installed.

    config  int8 (default): int8 weights, activations as they are. int8_dynamic: activations are int8 too, one scale per
            token, and the product is of integers. float8: E4M3 weights, dequantized whenever a layer runs.
            float8_dynamic: E4M3 activations too, multiplied as such, on GPUs of compute capability 8.9 and later.
            A config that does not run on the device at hand is refused, naming those that do.
    """

    Options = TorchaoOptions
    needs = Needs(modules=("torchao",))
    packs = True
    options: TorchaoOptions

    def plan(self, plan: LoadPlan) -> LoadPlan:
        import transformers

        chosen, dtype = self.options.config, "bfloat16" if plan.dtype == "auto" else plan.dtype
        if reason := failure(chosen, plan.device, dtype):
            working = [name for name in get_args(Weights) if not failure(name, plan.device, dtype)]
            raise InputError(
                f"torchao's {chosen} does not run on {plan.device} in {dtype}: {reason}",
                hint=f"config: {' or '.join(working)}" if working else "rtn or int8 instead of torchao",
            )
        make: Any = transformers.TorchAoConfig  # untyped
        return replace(plan, quantization_config=make(library_config(chosen)))

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        """A byte a weight and four a row, and a zero point a row of int8; each layer is quantized as it is read."""
        element = before.weights_bytes / shapes.parameters
        rows = sum(out for out, _ in shapes.linear.values())
        per_row = 5 if self.options.config.startswith("int8") else 4
        stored = before.weights_bytes - round(shapes.linear_parameters * (element - 1)) + per_row * rows
        return grid.predict_load(shapes, stored, before, machine)


def library_config(name: Weights) -> Any:
    from torchao import quantization

    if name == "float8_dynamic":
        return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    kinds = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8_dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        "float8": quantization.Float8WeightOnlyConfig,
    }
    return kinds[name]()


@cache
def failure(name: Weights, device: str, dtype: str) -> str | None:
    """Why this config does not run on `device`, told by running a small layer; None where it runs and is right."""
    import torch
    from torchao.quantization import quantize_

    made = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(64, 64, generator=made).to(device, getattr(torch, dtype)) for _ in range(2))
    layer = torch.nn.Linear(64, 64, bias=False, device=device, dtype=weight.dtype)
    layer.weight.data = weight
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exact = layer(x).float()
            quantize_(layer, library_config(name))
            error = float((layer(x).float() - exact).norm() / exact.norm())
    except Exception as problem:  # asserts, missing libraries, missing kernels
        return str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    return None if error < 0.1 else f"its product is off by {error:.0%}"


TECHNIQUE = Torchao
