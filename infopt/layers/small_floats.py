"""Rounding to 8- and 4-bit floating point, and the scales that bring numbers into its range.

E4M3 (OCP 8-bit floating point specification 1.0, also arXiv 2209.05433): up to 448, 3 bits of mantissa. E2M1 (OCP
microscaling formats 1.0, also arXiv 2310.10537): 0, ½, 1, 1½, 2, 3, 4, 6. All round half to even.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
E2M1_MAX = 6.0


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 numbers, in x's dtype; what is out of range becomes ±448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 numbers, in x's dtype; what is out of range becomes ±6."""
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    size = x.abs()
    # Numbers lie ½ apart below 2, 1 apart below 4, 2 apart above.
    step = 0.5 + 0.5 * (size >= 2).to(x.dtype) + (size >= 4).to(x.dtype)
    return x.div(step).round_().mul_(step)


def power_of_two(largest: torch.Tensor) -> torch.Tensor:
    """The scale of a group whose largest magnitude is `largest`, float32: a power of two from 2⁻¹²⁷ to 2¹²⁷.

    It puts `largest` below 7, which rounds to 6. The specification's own rule, 2^(⌊log₂ largest⌋ − 2), would let values
    up to 8 clip to 6.
    """
    mantissa, exponent = torch.frexp(largest.float())  # largest = mantissa · 2^exponent, mantissa in [½, 1)
    exponent = (exponent - 3 + (mantissa >= 0.875).to(exponent.dtype)).clamp_(-127, 127)
    return torch.ldexp(torch.ones_like(mantissa), exponent)


def global_scale(weight: torch.Tensor) -> torch.Tensor:
    """NVFP4's float32 scale of a whole tensor, [1]: its largest group's scale becomes 448, the end of E4M3's range."""
    largest = weight.abs().amax().float().reshape(1)
    return torch.where(largest > 0, E4M3_MAX * E2M1_MAX / largest, torch.ones_like(largest))


def scale_of_16(largest: torch.Tensor, overall: torch.Tensor) -> torch.Tensor:
    """NVFP4's scale of a group, an E4M3 number as float32, still to be divided by `overall`.

    Where it would be 0 it is ⅛, which makes the group 0, as its numbers are too small beside the rest of the tensor.
    """
    scale = round_e4m3((largest / E2M1_MAX).float() * overall)
    return torch.where(scale == 0, 0.125, scale)
