"""float32 products on a CPU by oneDNN instead of BLAS: the same arithmetic in kernels of its own.

torch's x86 builds multiply float32 by MKL, which uses half of what AMD's processors offer (190 against 420 GFLOP/s on two
cores of an EPYC with AVX-512); oneDNN, which torch ships for other dtypes, does not care who made the processor. No precision
is given up: operands and sums are float32, unless `rounded` asks for bfloat16 operands, where the processor multiplies those
in tiles (AMX; 400 against 150 GFLOP/s on two cores of a Xeon), or `results` for bfloat16 results too, where it multiplies them
in vectors (AVX512_BF16; twice the speed of float32 on two cores of an EPYC).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from infopt.kernels import build

MATMUL = "matmul"  # of torch.backends.mkldnn, from torch 2.9 on


class OneDnn(TorchFunctionMode):
    """While entered, `torch.nn.functional.linear` on float32 CPU tensors goes through oneDNN, where no gradient is asked for.

    `rounded`: its operands, and attention, may be rounded to bfloat16; sums are float32 still. That moves a product by 2e-3
    of its size, as running the model in bfloat16 would. Calibration does so, forward passes, Hessians and searches alike.
    `results`: finished sums may be rounded as well, which forward passes bear and Hessians do not: theirs must stay positive
    definite. Modes nest, and the innermost decides.
    """

    def __init__(self, *, rounded: bool = False, results: bool = False) -> None:
        super().__init__()
        self._rounded = rounded and _has_tiles()
        self._results = rounded and results and not self._rounded and _has_vectors()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is linear and not kwargs and _takes(*args):
            if self._results:
                x, weight, bias = (*args, None)[:3]
                return _linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16()).float()
            with _rounding() if self._rounded else nullcontext():
                return _linear(*args)
        if self._rounded and func is scaled_dot_product_attention and len(args) >= 3 and _takes(*args[:3]):
            named = {name: _in_bfloat16(value) for name, value in (kwargs or {}).items()}
            return func(*map(_in_bfloat16, args), **named).float()
        return func(*args, **(kwargs or {}))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


@contextmanager
def _rounding() -> Iterator[None]:
    products: Any = getattr(torch.backends.mkldnn, MATMUL)
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def _has_tiles() -> bool:
    """Whether the processor multiplies bfloat16 in tiles, and torch can be told to."""
    return build.usable()[0] == "amx" and hasattr(torch.backends.mkldnn, MATMUL)


def _has_vectors() -> bool:
    """Whether the processor multiplies pairs of bfloat16 in vectors, which torch then uses for tensors that are bfloat16."""
    return "avx512_bf16" in build.features()


def _in_bfloat16(value: Any) -> Any:
    """A float32 tensor in bfloat16; what is finite stays so: a mask's lowest number is not −∞ to a row that has no other."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    rounded = value.bfloat16()
    return rounded.where(rounded.isfinite() | ~value.isfinite(), torch.finfo(torch.bfloat16).min)


def _takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    operands = [x, weight] if bias is None else [x, weight, bias]
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(part.device.type == "cpu" and part.dtype == torch.float32 and part.numel() > 0 for part in operands)
        and not (torch.is_grad_enabled() and any(part.requires_grad for part in operands))
    )
