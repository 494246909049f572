"""A linear layer whose input is rounded to few bits while it runs, as the hardware that multiplies such numbers does.

The product itself is computed in the model's dtype, from weights that are rounded already: this shows what the model
answers on such hardware, at the speed of the unquantized model. The rounding is compressed-tensors' own, operation by
operation and in the input's dtype, so that plain transformers computes the same logits from the saved file.
"""

from __future__ import annotations

import torch
from torch import nn

from infopt.layers import small_floats
from infopt.layers.grid import Kind


def round_tokens(x: torch.Tensor, kind: Kind) -> torch.Tensor:
    """`x` [..., features] with one scale per token, rounded to symmetric int8 or to E4M3; as floats of x's dtype.

    The scale is the token's largest magnitude ÷ 127.5, or ÷ 448.
    """
    half_range = 127.5 if kind == "int" else small_floats.E4M3_MAX
    scale = x.abs().amax(-1, keepdim=True) / half_range
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    scaled = x / scale
    rounded = scaled.clamp_(-128, 127).round_() if kind == "int" else small_floats.round_e4m3(scaled)
    return rounded.mul_(scale)


def round_tokens_asymmetric(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., features] with one scale and one zero point per token, rounded to int8; as floats of x's dtype.

    −128 … 127 span the token's range, widened to hold 0, which is a point of the grid: one-sided inputs lose no half of it.
    """
    low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    zero = (-128 - low / scale).clamp_(-128, 127).round_()
    return (x / scale).add_(zero).clamp_(-128, 127).round_().sub_(zero).mul_(scale)


def round_groups(x: torch.Tensor, overall: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., features] rounded to E2M1 as floats of x's dtype.

    Without `overall`: with a power of two per 32 features. With it, float32 [1]: with an E4M3 scale per 16 ÷ `overall`.
    """
    groups = x.reshape(*x.shape[:-1], -1, 32 if overall is None else 16)
    largest = groups.abs().amax(-1, keepdim=True)
    if overall is None:
        scale = small_floats.power_of_two(largest).to(x.dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    else:
        scale = small_floats.scale_of_16(largest, overall) / overall
    return small_floats.round_e2m1(groups / scale).mul_(scale).flatten(-2).to(x.dtype)


class ActivationLinear(nn.Linear):
    """y = W·x̂ + b, x̂ = x rounded to numbers of `kind`; made from a plain layer, whose parameters it takes over.

    `input_global_scale`: float32 [1], of nvfp4 only, from calibration. `is_symmetric`: without a zero point; int alone can
    have one.
    """

    input_global_scale: torch.Tensor | None

    def __init__(
        self, linear: nn.Linear, kind: Kind, input_global_scale: torch.Tensor | None = None, *, is_symmetric: bool = True
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.kind, self.is_symmetric = kind, is_symmetric
        self.register_buffer("input_global_scale", input_global_scale, persistent=False)
        self.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out] in x's dtype."""
        if not self.is_symmetric:
            x = round_tokens_asymmetric(x)
        elif self.kind in ("int", "fp8"):
            x = round_tokens(x, self.kind)
        else:
            x = round_groups(x, self.input_global_scale)
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, inputs rounded to {self.kind}{'' if self.is_symmetric else ' with a zero point'}"
