"""What is trained on, as token ids: stretches of text, or prompts with answers, of which the answers alone are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Example:
    """`weights[i]`: how much the prediction of token i + 1 counts; 0 where it is not learned."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def positions(self) -> int:
        """How many predictions count."""
        return sum(weight > 0 for weight in self.weights)

    @staticmethod
    def of_text(ids: Sequence[int]) -> Example:
        return Example(tuple(ids), (1.0,) * (len(ids) - 1))

    @staticmethod
    def of_answer(
        prompt: Sequence[int], answer: Sequence[int], weights: Sequence[float] | None = None, asked: float = 0.0
    ) -> Example:
        """`weights`: one for each token of the answer; `asked`: that of every token of the prompt."""
        learned = (1.0,) * len(answer) if weights is None else tuple(weights)
        return Example((*prompt, *answer), (asked,) * (len(prompt) - 1) + learned)


@dataclass(frozen=True)
class Batch:
    """Examples side by side, the shorter ones padded on the right, where no token before sees the padding.

    `ids` int64 [rows, tokens]; `rows`, `places` int64 [positions]: where a prediction counts, `tokens`: what comes there,
    `weights` float32; all of them in order of the examples.
    """

    indices: tuple[int, ...]
    ids: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor

    @property
    def span(self) -> torch.Tensor:
        """Places of which the model should give logits: from the first that counts to the last, int64."""
        return torch.arange(int(self.places.min()), int(self.places.max()) + 1, device=self.places.device)

    def picked(self, logits: torch.Tensor) -> torch.Tensor:
        """[positions, vocabulary] of the logits [rows, span, vocabulary]."""
        if logits.shape[0] * logits.shape[1] == len(self.places):  # all of them: nothing to copy
            return logits.flatten(0, 1)
        return logits[self.rows, self.places - self.places.min()]

    @staticmethod
    def of(examples: Sequence[Example], indices: Sequence[int], device: torch.device) -> Batch:
        chosen = [examples[index] for index in indices]
        ids = torch.zeros(len(chosen), max(len(each.ids) for each in chosen), dtype=torch.int64)
        rows, places, tokens, weights = [], [], [], []
        for row, each in enumerate(chosen):
            ids[row, : len(each.ids)] = torch.tensor(each.ids)
            for place, weight in enumerate(each.weights):
                if weight:
                    rows.append(row)
                    places.append(place)
                    tokens.append(each.ids[place + 1])
                    weights.append(weight)
        row_of, place_of, token_of = (torch.tensor(values, device=device) for values in (rows, places, tokens))
        weight_of = torch.tensor(weights, dtype=torch.float32, device=device)
        return Batch(tuple(indices), ids.to(device), row_of, place_of, token_of, weight_of)


def batches(examples: Sequence[Example], size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Indices of the examples of each step; every epoch in an order of its own that the seed decides.

    Within `SORTED` batches examples of like length come together, so that little is padded.
    """
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(examples), generator=shuffle).tolist()
        stretch = size * SORTED
        parts = [sorted(order[i : i + stretch], key=lambda k: len(examples[k].ids)) for i in range(0, len(order), stretch)]
        for part in parts:
            own = [part[i : i + size] for i in range(0, len(part), size)]
            for index in torch.randperm(len(own), generator=shuffle).tolist():
                yield own[index]


#: Batches among which examples are sorted by length.
SORTED = 16


def split(count: int, share: float, least: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on, one at least, and to validate on: `share` of `count` ≥ 2, `least` at least, by the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(max(least, round(count * share)), count - 1)
    return sorted(order[held:]), sorted(order[:held])
