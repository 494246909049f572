"""Linear layers that multiply from packed weights, inside whatever model they stand in."""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from infopt.kernels import library
from infopt.kernels.arena import Arena, give_back
from infopt.kernels.library import CLayer, CModel
from infopt.kernels.packed import Packed
from infopt.runtime.weights import Wanted, head_kind, joined, require


class Products:
    """The threads that all swapped layers of a model share. `is_prompt`: whether their inputs are those of a prompt."""

    def __init__(self, threads: int) -> None:
        self.library = library.load()
        self._layer = CLayer()
        # No layer of it is ever run: only products are asked for.
        self._model = CModel(hidden=32, heads=1, kv_heads=1, head_dim=16, layer=ctypes.pointer(self._layer))
        self.engine = ctypes.c_void_p(self.library.infopt_open(ctypes.byref(self._model), threads))
        self.is_prompt = False

    def __del__(self) -> None:
        if getattr(self, "engine", None):
            self.library.infopt_close(self.engine)
            self.engine = ctypes.c_void_p()


class KernelLinear(nn.Module):
    """y = x·Wᵀ + bias, computed in float32 and returned in x's dtype."""

    def __init__(self, packed: Packed, products: Products) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.inner, packed.rows
        self.packed, self._products = packed, products
        self._matrix = library.matrix(packed)
        self._at, self._multiply = ctypes.byref(self._matrix), products.library.infopt_multiply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]"""
        flat = x.reshape(-1, self.in_features).to(torch.float32)
        missing = self.packed.padded_inner - self.in_features
        flat = torch.nn.functional.pad(flat, (0, missing)) if missing else flat.contiguous()
        tokens, products = flat.shape[0], self._products
        out = torch.empty(tokens, self.packed.padded_rows)
        if tokens:
            self._multiply(products.engine, self._at, flat.data_ptr(), tokens, out.data_ptr(), products.is_prompt)
        return out[:, : self.out_features].view(*x.shape[:-1], self.out_features).to(x.dtype)


def swap(model: nn.Module, threads: int, weights: Wanted, head: Wanted) -> tuple[list[Packed], Products]:
    """Replaces the linear layers of a model one by one; each one's own weights are let go. Returns what was packed, and
    what multiplies with it.

    Raises Unfit, before any was replaced, for layers that keep their weights in a way of their own.
    """
    found = [name for name, module in model.named_modules() if _is_linear(module)]
    for name in found:
        require(model.get_submodule(name))
    arena, products = Arena(), Products(threads)
    made: list[Packed] = []
    last = getattr(model, "get_output_embeddings", lambda: None)()
    found.sort(key=lambda name: model.get_submodule(name) is last)  # the head follows the others
    for name in found:
        module = model.get_submodule(name)
        packed = joined([module], head_kind(head, weights, made) if module is last else weights).moved(arena.keep)
        model.set_submodule(name, KernelLinear(packed, products))
        made.append(packed)
    give_back()
    return made, products


def _is_linear(module: nn.Module) -> bool:
    """Floating point, compressed-tensors, or int8 with a scale per row. Attention may have a scheme too: of its cache.

    One that does something else with plain weights, as the routers of some mixtures do, is left as it is.
    """
    if hasattr(module, "quantization_scheme") or hasattr(module, "weight_scale"):
        return hasattr(module, "in_features")
    is_plain = type(module).forward is nn.Linear.forward
    return isinstance(module, nn.Linear) and (is_plain or type(module.weight) is not nn.Parameter)
