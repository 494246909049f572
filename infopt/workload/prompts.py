"""The user's own prompts, in the order of their file, each once per block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, ClassVar, Protocol, TypeVar

from infopt.errors import InputError
from infopt.protocols import Request
from infopt.workload import Batch, Workload, hash_ids, require_positive, require_room


class Row(Protocol):
    """What a prompts file's row must tell; `max_tokens` None means the workload's default."""

    @property
    def id(self) -> str: ...

    @property
    def max_tokens(self) -> int | None: ...


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class PromptSet(Workload):
    """`requests` in the file's order. With `batch` > 1 neighbours form static batches, all run to the same length."""

    kind: ClassVar[str] = "prompts"
    requests: tuple[Request, ...]
    batch: int = 1

    def __post_init__(self) -> None:
        require_positive(batch=self.batch)
        if not self.requests:
            raise InputError(f"{self.name}: no prompts; at least 1 is needed", hint="one JSON object per line")
        if self.batch > 1 and not all(request.ignore_eos for request in self.requests):
            # Rows that stop early would leave padding that no figure may count as output.
            raise InputError(
                f"{self.name}: batch {self.batch} with answers that stop at the end token; batched answers run to full length",
                hint="use batch 1, or ignore the end token",
            )

    def batches(self, seed: int, block: int) -> list[Batch]:
        rows = [replace(request, seed=seed + i) for i, request in enumerate(self.requests)]
        groups = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        return [_level(group) for group in groups]

    def warmup(self, seed: int, block: int) -> Iterator[Batch]:
        """Never the first row where there is another: a prefix cache would still hold it when it is measured."""
        batches = self.batches(seed, block)
        return cycle(batches[1:] or batches)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "batch": self.batch,
            "requests": len(self.requests),
            "max_new_tokens": [request.max_new_tokens for request in self.requests],
            "ignore_eos": all(request.ignore_eos for request in self.requests),
            "prompts_hash": hash_ids([request.prompt_ids for request in self.requests]),
        }


def prompt_set(
    name: str,
    rows: Sequence[R],
    encode: Callable[[R], Sequence[int]],
    *,
    new_tokens: int,
    context: int,
    batch: int = 1,
    ignore_eos: bool = False,
) -> PromptSet:
    """Rows of a prompts file as a workload; `encode` gives a row's token ids.

    Raises InputError for no rows, for a row without tokens, and for one that exceeds `context` tokens.
    """
    requests = []
    for row in rows:
        ids = tuple(encode(row))
        if not ids:
            raise InputError(f"{name}: prompt {row.id!r} has no tokens; at least 1 is needed")
        limit = new_tokens if row.max_tokens is None else row.max_tokens
        require_positive(max_tokens=limit)
        require_room(f"{name}: prompt {row.id!r}", len(ids), limit, context)
        requests.append(Request(id=row.id, prompt_ids=ids, max_new_tokens=limit, ignore_eos=ignore_eos))
    return PromptSet(name=name, requests=tuple(requests), batch=batch)


def _level(group: list[Request]) -> list[Request]:
    """A static batch ends together: all of it at its shortest limit, which every prompt has room for."""
    limit = min(request.max_new_tokens for request in group)
    return [replace(request, max_new_tokens=limit) for request in group]
