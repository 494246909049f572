"""Memory in huge pages: weights that are read from end to end cost a page walk every 4 KiB otherwise."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

CHUNK = 32 << 20
HUGE = 2 << 20
LINE = 64


class Arena:
    """Hands out memory from chunks of 32 MiB, which live as long as any tensor in them."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)
        self._chunks: list[torch.Tensor] = []
        self._used: list[int] = []

    @property
    def spans(self) -> list[torch.Tensor]:
        """uint8: what was handed out of each chunk. The rest was never written, and all of it is one page of zeros."""
        return [chunk[:used] for chunk, used in zip(self._chunks, self._used, strict=True)]

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], at the start of a cache line."""
        wanted = -(-nbytes // LINE) * LINE
        if wanted > len(self._left) or not self._used:
            self._left = _mapped(max(wanted, CHUNK))
            self._chunks.append(self._left)
            self._used.append(0)
        self._used[-1] += wanted
        taken, self._left = self._left[:nbytes], self._left[wanted:]
        return taken

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy."""
        copy = self.take(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape) if tensor.numel() else tensor
        return copy.copy_(tensor)


def give_back() -> None:
    """Returns to the system what was freed: packing leaves the heap full of holes the size of layers."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim:
            trim(0)


def _mapped(nbytes: int) -> torch.Tensor:
    if sys.platform != "linux":
        return torch.empty(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + nbytes]
