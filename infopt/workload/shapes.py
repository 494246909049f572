"""Fixed shape: prompt length × new tokens × batch, the workload whose figures compare across recipes and machines.

Prompts are windows of real text, because speculation and mixtures of experts behave differently on random tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

from infopt.errors import InputError
from infopt.protocols import Request
from infopt.workload import Batch, Workload, hash_ids, require_positive, require_room


@dataclass(frozen=True)
class FixedShape(Workload):
    """`requests` static batches per block, each of `batch` prompts of exactly `prompt_tokens` tokens.

    `text_ids` are the token ids of the text that prompts are cut from; a window that reaches its end goes on at its
    start. Windows of one block all start elsewhere, so a prefix cache finds nothing that real prompts would not give it.
    """

    kind: ClassVar[str] = "fixed_shape"
    prompt_tokens: int
    new_tokens: int
    batch: int
    requests: int
    text_ids: tuple[int, ...]
    context: int

    def __post_init__(self) -> None:
        require_positive(prompt=self.prompt_tokens, new_tokens=self.new_tokens, batch=self.batch, requests=self.requests)
        require_room(self.name, self.prompt_tokens, self.new_tokens, self.context)
        if len(self.text_ids) < self.batch * self.requests:
            raise InputError(
                f"{self.name}: the text has {len(self.text_ids)} tokens; {self.batch * self.requests} different prompts "
                f"need at least as many",
                hint="give a longer text, or fewer requests per block",
            )

    def batches(self, seed: int, block: int) -> list[Batch]:
        starts = self._starts(f"{seed}/{block}", self.batch * self.requests)
        rows = [self._request(f"{block}.{i}", start, seed + i) for i, start in enumerate(starts)]
        return [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]

    def warmup(self, seed: int, block: int) -> Iterator[Batch]:
        for turn in count():
            starts = self._starts(f"{seed}/{block}/warmup/{turn}", self.batch)
            yield [self._request(f"{block}.warmup.{turn}.{i}", start, seed) for i, start in enumerate(starts)]

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "batch": self.batch,
            "requests": self.requests,
            "prompts_hash": hash_ids([self.text_ids]),
        }

    def _starts(self, key: str, number: int) -> list[int]:
        return random.Random(key).sample(range(len(self.text_ids)), number)

    def _request(self, name: str, start: int, seed: int) -> Request:
        length = len(self.text_ids)
        window = tuple(self.text_ids[(start + i) % length] for i in range(self.prompt_tokens))
        return Request(id=name, prompt_ids=window, max_new_tokens=self.new_tokens, seed=seed)
