"""Keys and values on a GPU: one tensor of pages for each layer, so that a captured graph finds them where they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from infopt.kernels.gpu.attention import PAGE as DEVICE_PAGE
from infopt.kernels.gpu.attention import Paged
from infopt.runtime.pages import PAGE, Budget, Pages
from infopt.runtime.steps import Room

assert PAGE == DEVICE_PAGE
#: Pages that are there from the start, the first of them nobody's: rows that fill a graph up write there.
FIRST = 16


class DevicePages(Pages):
    """`on_move` is called when the tensors have become others, for want of room: whatever points to them is void then."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, budget: Budget,
        on_move: Callable[[], None],
    ) -> None:  # fmt: skip
        super().__init__(2 * layers * kv_heads * PAGE * head_dim * dtype.itemsize, budget)
        self._on_move = on_move
        self.layers = [
            Paged(*(torch.zeros(FIRST, kv_heads, PAGE, head_dim, dtype=dtype, device=device) for _ in range(2)))
            for _ in range(layers)
        ]
        self._take()

    def require(self, rooms: Iterable[Room], beside: float = 0) -> float:
        """Makes room for all of it at once, before any graph is captured."""
        rooms = list(rooms)
        needed = super().require(rooms, beside)
        self._grow(len(self._uses) - len(self._free) + self._count(rooms))
        return needed

    def _make(self, page: int) -> None:
        if page >= len(self.layers[0].keys):
            self._grow(page + 1 + page // 2)

    def _grow(self, count: int) -> None:
        have = len(self.layers[0].keys)
        if count <= have:
            return
        for index, layer in enumerate(self.layers):  # one by one: no two copies of all
            moved = []
            for part in (layer.keys, layer.values):
                grown = part.new_zeros(count, *part.shape[1:])
                grown[:have] = part
                moved.append(grown)
            self.layers[index] = Paged(*moved)
        self._on_move()

    def _copy(self, page: int, to: int) -> None:
        for layer in self.layers:
            layer.keys[to], layer.values[to] = layer.keys[page], layer.values[page]

    def _table(self, pages: list[int]) -> Any:
        return torch.tensor(pages, dtype=torch.int32)
