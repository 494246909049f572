"""What a teacher says of the examples, computed once and kept on the disk: its likeliest tokens at every position that counts.

A token takes k·6 bytes: int32 numbers and float16 log-probabilities. Training then needs no teacher in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infopt.distil.examples import Batch, Example
from infopt.distil.losses import Likeliest
from infopt.distil.students import listening
from infopt.errors import InputError
from infopt.model import atomic
from infopt.protocols import Progress

#: Positions that a teacher is run over at a time.
POSITIONS = 2048


class Kept:
    """Of each example in turn, [positions, k]; read from the disk as it is asked for."""

    def __init__(self, folder: Path, examples: Sequence[Example]) -> None:
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.levels = np.load(folder / "log_probabilities.npy", mmap_mode="r")
        ends = np.cumsum([0, *(each.positions for each in examples)])
        self.starts, total = ends[:-1], ends[-1]
        self.lengths = [each.positions for each in examples]
        if len(self.tokens) != total:
            raise InputError(f"{folder}: answers to other examples", hint="leave out --resume")

    def of(self, batch: Batch) -> Likeliest:
        """In the order of the batch's positions."""
        parts = [slice(self.starts[index], self.starts[index] + self.lengths[index]) for index in batch.indices]
        device = batch.ids.device
        tokens = np.concatenate([self.tokens[part] for part in parts]).astype(np.int64)
        levels = np.concatenate([self.levels[part] for part in parts]).astype(np.float32)
        return Likeliest(torch.from_numpy(tokens).to(device), torch.from_numpy(levels).to(device))


def keep(
    teacher: Any,
    examples: Sequence[Example],
    count: int,
    folder: Path,
    device: torch.device,
    progress: Progress = lambda line: None,
) -> Kept:
    """Asks the teacher, unless `folder` holds its answers already. Raises DiskFullError."""
    if not (folder / "tokens.npy").is_file():
        total = sum(each.positions for each in examples)
        with atomic.writing(folder, total * count * 6):
            folder.mkdir(parents=True, exist_ok=True)
            count = min(count, teacher.config.get_text_config().vocab_size)
            tokens = np.lib.format.open_memmap(folder / "part-tokens.npy", "w+", np.int32, (total, count))
            levels = np.lib.format.open_memmap(folder / "log_probabilities.npy", "w+", np.float16, (total, count + 1))
            done = 0
            for indices in _grouped(examples):
                progress(f"the teacher's answers: {done} of {total} tokens")
                with listening(device):
                    found = Likeliest.of(logits(teacher, Batch.of(examples, indices, device)), count)
                part = slice(done, done + len(found))
                tokens[part], levels[part] = found.tokens.cpu().numpy(), found.log_probabilities.cpu().numpy()
                done += len(found)
            tokens.flush()
            levels.flush()
            (folder / "part-tokens.npy").replace(folder / "tokens.npy")
    return Kept(folder, examples)


def logits(model: Any, batch: Batch) -> torch.Tensor:
    """[positions, vocabulary] of the places that count."""
    return batch.picked(model(input_ids=batch.ids, use_cache=False, logits_to_keep=batch.span).logits)


def _grouped(examples: Sequence[Example]) -> list[list[int]]:
    """Neighbouring examples, as many as have `POSITIONS` tokens."""
    groups: list[list[int]] = []
    size = 0
    for index, each in enumerate(examples):
        if not groups or size + len(each.ids) > POSITIONS:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += len(each.ids)
    return groups
