"""A linear layer over int8 weights: one scale per output row, activations in floating point or int8 per group.

torch's int8 weight-only product reads a quarter of the bytes of a float32 layer, but its fast form takes bfloat16
activations only and costs time per row. So a step of few rows (decode) goes through it, and many rows (prefill)
dequantize the weights block by block and multiply in the model's dtype. Where the product does not run, every step
takes the second path, which is the definition that tests compare with.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from infopt.layers.packing import open_packed

#: Up to here torch's product beats dequantizing, in float32 and in bfloat16 (at 16 rows 80 against 155 us, 75 against 95).
FEW_ROWS = 16
#: Input features that the product reads at once; it checks nothing and reads past the end of other sizes.
KERNEL_STEP = 32
#: Weights dequantized at a time, in elements: the block is still in the cache when it is multiplied.
BLOCK = 1 << 20


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether torch's int8 weight-only product runs on `device` and is right there."""
    x = torch.arange(-32, 32, dtype=torch.bfloat16, device=device).div(8).repeat(2, 1)
    q = torch.arange(64 * 64, device=device).mul(37).remainder(251).sub(125).to(torch.int8).view(64, 64)
    scale = torch.full((64,), 0.5, dtype=torch.bfloat16, device=device)
    try:
        y = torch._weight_int8pack_mm(x, q, scale)
    except (RuntimeError, AttributeError):
        return False
    return bool(torch.allclose(y.float(), x.float() @ q.float().T * 0.5, rtol=2**-7))


def round_groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """`x` [..., features] rounded to symmetric int8 per group of `group_size` features of each token, as floats again.

    The scale of a group is its largest magnitude ÷ 127 (ZeroQuant, arXiv 2206.01861, with groups within a token).
    """
    groups = x.float().reshape(*x.shape[:-1], -1, group_size)
    scale = groups.abs().amax(-1, keepdim=True).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    return groups.div(scale).round_().mul_(scale).flatten(-2).to(x.dtype)


class Int8Linear(nn.Module):
    """y = x̂ · (q · scale)ᵀ + bias, x̂ = x or x rounded per group.

    `weight` int8 [out, in]; `weight_scale` [out, 1], exact in bfloat16, in the dtype of the model.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    kernel_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation_group: int | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activation_group = activation_group
        #: Steps of at most so many rows take the fast product; 0 where it does not run.
        self.few_rows = FEW_ROWS if self.in_features % KERNEL_STEP == 0 and has_kernel(weight.device) else 0
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("kernel_scale", weight_scale.flatten().bfloat16(), persistent=False)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out] in x's dtype."""
        if self.activation_group:
            x = round_groups(x, self.activation_group)
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] > self.few_rows:
            return self.multiply(rows).view(*x.shape[:-1], self.out_features)
        y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.kernel_scale).to(x.dtype)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """The definition, in x's dtype: dequantize a block of output rows, multiply, next block. [rows, in] → [rows, out]"""
        block = max(1, BLOCK // self.in_features)
        if block >= self.out_features:
            return nn.functional.linear(x, self.weight.to(x.dtype).mul_(self.weight_scale), self.bias)
        y = x.new_empty(x.shape[0], self.out_features)
        for start in range(0, self.out_features, block):
            end = min(start + block, self.out_features)
            bias = None if self.bias is None else self.bias[start:end]
            dense = self.weight[start:end].to(x.dtype).mul_(self.weight_scale[start:end])
            y[:, start:end] = nn.functional.linear(x, dense, bias)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, activation_group={self.activation_group}"


def swap(model: nn.Module, activation_group: int | None) -> None:
    """Puts an `Int8Linear` in place of every 8-bit packed layer that transformers has loaded."""

    def make(loaded: Any) -> Int8Linear:
        """`loaded` holds `weight_packed` int32 [out, in/4] (four bytes a word, offset 128) and `weight_scale` [out, 1]."""
        q = unpack_bytes(loaded.weight_packed.data, tuple(loaded.weight_shape.tolist()))
        bias = None if loaded.bias is None else loaded.bias.data
        return Int8Linear(q, loaded.weight_scale.data, bias, activation_group)

    open_packed(model, make)


def unpack_bytes(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """int32 words → int8 [out, in]. The stored byte is q + 128, so flipping its top bit gives q."""
    return packed.contiguous().view(torch.uint8)[:, : shape[1]].bitwise_xor(0x80).view(torch.int8).contiguous()
