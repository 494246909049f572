"""transformers' cache with room ahead: adding a token copies that token, not all that came before it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

#: Positions that a layer has room for at first; a full one gets half as much again.
FIRST = 256


def growing_cache() -> Any:
    """An empty transformers cache, for any number of layers."""
    from transformers.cache_utils import Cache

    return Cache(layer_class_to_replicate=_growing_layer())


@cache
def _growing_layer() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
        """Keys and values [rows, heads, positions, head_dim] are views of the front of larger tensors."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """The states with those before them."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.rooms = [torch.empty(0)] * 2
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            before: Any = (self.keys, self.values)
            for side, states in enumerate((key_states, value_states)):
                if self.rooms[side].dim() < 4 or self.rooms[side].shape[-2] < end:
                    grown = states.new_empty(*states.shape[:-2], max(FIRST, end + end // 2), states.shape[-1])
                    if start:
                        grown[..., :start, :] = before[side]
                    self.rooms[side] = grown
                self.rooms[side][..., start:end, :] = states
            self.keys, self.values = (room[..., :end, :] for room in self.rooms)
            return self.keys, self.values

    return GrowingLayer
