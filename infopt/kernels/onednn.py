"""float32 products on a CPU by oneDNN instead of BLAS: the same arithmetic in kernels of its own.

torch's x86 builds multiply float32 by MKL, which uses half of what AMD's processors offer (190 against 420 GFLOP/s on two
cores of an EPYC with AVX-512); oneDNN, which torch ships for other dtypes, does not care who made the processor. No precision
is given up: operands and sums are float32, unlike under `torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


class OneDnn(TorchFunctionMode):
    """While entered, `torch.nn.functional.linear` on float32 CPU tensors goes through oneDNN, where no gradient is asked for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is linear and not kwargs and _takes(*args):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    operands = [x, weight] if bias is None else [x, weight, bias]
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(part.device.type == "cpu" and part.dtype == torch.float32 and part.numel() > 0 for part in operands)
        and not (torch.is_grad_enabled() and any(part.requires_grad for part in operands))
    )
