"""What an interrupted calibrated step leaves behind: its finished blocks, and the hidden states to go on from.

Going on gives the bytes that an undisturbed run gives, so the hidden states are stored, not computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from infopt.model import atomic


@dataclass(frozen=True)
class Unfinished:
    """A folder with one file per finished block, written whole or not at all; None keeps nothing."""

    folder: Path | None

    @staticmethod
    def open(folder: Path | None) -> Unfinished:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return Unfinished(folder)

    def restore(self, name: str, blocks: nn.ModuleList, packed: dict[str, dict[str, torch.Tensor]]) -> int:
        """Puts the finished blocks back in order and returns how many there are. `packed` gets their stored tensors."""
        for index, block in enumerate(blocks):
            if self.folder is None or not self._path(f"{name}.{index}").is_file():
                return index
            state = read_tensors(self._path(f"{name}.{index}"))
            # Copies: where a tensor lies in memory picks the kernel that multiplies it.
            block.load_state_dict({key[6:]: value.clone() for key, value in state.items() if key.startswith("dense/")})
            for key, value in state.items():
                if key.startswith("packed/"):
                    layer, _, part = key[7:].rpartition("/")
                    packed.setdefault(layer, {})[part] = value.clone()
        return len(blocks)

    def hidden(self, name: str, index: int) -> list[torch.Tensor] | None:
        """The inputs of block `index` as they were; None when nothing is known of them."""
        if self.folder is None or index == 0:
            return None
        state = read_tensors(self._path(f"{name}.{index}.inputs"))
        return [state[str(number)].clone() for number in range(len(state))]

    def finish(
        self, name: str, index: int, block: nn.Module, packed: dict[str, dict[str, torch.Tensor]], hidden: list[torch.Tensor]
    ) -> None:
        """Writes the inputs of the next block, if there is one, then the finished one, whose file is what counts.

        Raises DiskFullError.
        """
        if self.folder is None:
            return
        if hidden:
            write_tensors(self._path(f"{name}.{index + 1}.inputs"), {str(number): batch for number, batch in enumerate(hidden)})
        state = {f"dense/{key}": value for key, value in block.state_dict().items()}
        state |= {f"packed/{layer}/{part}": value for layer, parts in packed.items() for part, value in parts.items()}
        write_tensors(self._path(f"{name}.{index}"), state)
        self._path(f"{name}.{index}.inputs").unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_suffix(".part")
    with atomic.writing(temporary, sum(tensor.nbytes for tensor in tensors.values())):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)
