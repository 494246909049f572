"""Linear layers that multiply from packed weights, inside whatever model they stand in."""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from infopt.kernels import library
from infopt.kernels.arena import Arena
from infopt.kernels.library import CLayer, CModel
from infopt.kernels.packed import Packed
from infopt.runtime.weights import Wanted, joined


class Products:
    """The threads that all swapped layers of a model share."""

    def __init__(self, threads: int) -> None:
        self.library = library.load()
        self._layer = CLayer()
        # No layer of it is ever run: only products are asked for.
        self._model = CModel(hidden=32, heads=1, kv_heads=1, head_dim=16, layer=ctypes.pointer(self._layer))
        self.engine = ctypes.c_void_p(self.library.infopt_open(ctypes.byref(self._model), threads))

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]"""
        flat = x.reshape(-1, x.shape[-1]).float()
        missing = self.packed.padded_inner - flat.shape[1]
        flat = torch.nn.functional.pad(flat, (0, missing)) if missing else flat.contiguous()
        out = torch.empty(len(flat), self.packed.padded_rows)
        if len(flat):
            products = self._products
            products.library.infopt_multiply(
                products.engine, ctypes.byref(self._matrix), flat.data_ptr(), len(flat), out.data_ptr()
            )
        return out[:, : self.out_features].reshape(*x.shape[:-1], self.out_features).to(x.dtype)


def swap(model: nn.Module, threads: int, weights: Wanted, head: Wanted) -> list[Packed]:
    """Replaces the linear layers of a model one by one; each one's own weights are let go. Returns what was packed."""
    arena, products, made = Arena(), Products(threads), []
    last = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) and not hasattr(module, "quantization_scheme") and not _is_int8(module):
            continue
        packed = joined([module], head if module is last else weights).moved(arena.keep)
        model.set_submodule(name, KernelLinear(packed, products))
        made.append(packed)
    return made


def _is_int8(module: nn.Module) -> bool:
    return hasattr(module, "weight_scale") and hasattr(module, "in_features")
