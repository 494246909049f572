"""What a teacher says of the examples, computed once and kept on the disk: its likeliest tokens at every position that counts.

A token takes 6·k + 2 bytes: int32 numbers, float16 log-probabilities, and that of all others. Training then needs no teacher in
memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from infopt.distil.examples import Batch, Example
from infopt.distil.losses import Likeliest
from infopt.distil.students import listening
from infopt.model import atomic
from infopt.protocols import Progress

#: Positions that a teacher is run over at a time.
POSITIONS = 2048


class Kept:
    """Of each example in turn, [positions, k]; read from the disk as it is asked for."""

    def __init__(self, folder: Path, examples: Sequence[Example]) -> None:
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.levels = np.load(folder / "log_probabilities.npy", mmap_mode="r")
        self.lengths = [each.positions for each in examples]
        self.starts = np.cumsum([0, *self.lengths])

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
    *,
    temperature: float = 1.0,
    vocabulary: int | None = None,
) -> Kept:
    """Asks the teacher, unless the folder holds its answers to these very examples already. Raises DiskFullError.

    `vocabulary`: tokens of the student, where the teacher's table has more rows, which stand for none.
    """
    place = folder / digest(examples)
    if (place / "tokens.npy").is_file():
        return Kept(place, examples)
    total = sum(each.positions for each in examples)
    count = min(count, vocabulary or teacher.config.get_text_config().vocab_size)
    with atomic.writing(folder, total * count * 6):
        place.mkdir(parents=True, exist_ok=True)
        # Written in order, not mapped: a mapped file has no place on the disk yet, and one that runs full ends the process.
        with (place / "part").open("wb") as tokens, (place / "log_probabilities.npy").open("wb") as levels:
            _header(tokens, np.dtype(np.int32), (total, count))
            _header(levels, np.dtype(np.float16), (total, count + 1))
            done = 0
            for indices in _grouped(examples):
                progress(f"the teacher's answers: {done} of {total} tokens")
                with listening(device):
                    said = logits(teacher, Batch.of(examples, indices, device))[:, :vocabulary]
                    found = Likeliest.of(said, count, temperature)
                tokens.write(found.tokens.cpu().numpy().astype(np.int32).tobytes())
                levels.write(found.log_probabilities.cpu().numpy().astype(np.float16).tobytes())
                done += len(found)
        (place / "part").replace(place / "tokens.npy")
    return Kept(place, examples)


def digest(examples: Sequence[Example]) -> str:
    """Of what is asked, so that no answer is taken for that to another question."""
    found = hashlib.sha256()
    for each in examples:
        found.update(repr((each.ids, each.weights)).encode())
    return found.hexdigest()[:16]


def _header(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, int]) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, described)


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
