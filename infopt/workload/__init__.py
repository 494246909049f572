"""What an engine is asked to do: prompts and stop rules. Every request follows from a seed and a block number,
so that all arms answer the same prompts, and no two requests of a block share a prefix unless the user's file makes them.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from infopt.errors import InputError
from infopt.protocols import Request

#: One static batch: requests that enter the engine in one call.
Batch = list[Request]


@dataclass(frozen=True)
class Workload(ABC):
    """Requests per block, grouped into static batches."""

    kind: ClassVar[str]
    name: str

    @abstractmethod
    def batches(self, seed: int, block: int) -> list[Batch]:
        """The measured requests of one block. The same seed and block give the same requests."""

    @abstractmethod
    def warmup(self, seed: int, block: int) -> Iterator[Batch]:
        """Endless batches of the same shape for warming up, not measured."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Everything that decides the requests, prompts as a hash: goes into `run.json`."""

    @property
    def hash(self) -> str:
        """sha256 of `as_dict`, name left out: with the same seed, equal for equal requests."""
        content = {key: value for key, value in self.as_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_ids(rows: Sequence[Sequence[int]]) -> str:
    """sha256 of token ids."""
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()


def require_room(what: str, prompt_tokens: int, new_tokens: int, context: int) -> None:
    """Raises InputError when prompt and answer do not fit into `context` tokens."""
    if prompt_tokens + new_tokens > context:
        raise InputError(
            f"{what}: {prompt_tokens} prompt + {new_tokens} new tokens = {prompt_tokens + new_tokens}; "
            f"the model's context allows {context}",
            hint="shorten the prompt or lower the number of new tokens",
        )


def require_positive(**counts: int) -> None:
    """Raises InputError for the first count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} is {count}; allowed: 1 or more")
