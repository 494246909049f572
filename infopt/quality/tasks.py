"""Tier 3: multiple choice by log-likelihood, and what changed against the reference.

Each choice is scored as the sum of log-probabilities of its tokens after the question (joined by one space) ÷ its bytes in
UTF-8, and the highest score is the answer. Per byte, not per token, so that tokenizers can be compared. Nothing is
generated and no letter is asked for: small models carry signal here long before they can follow an instruction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infopt.data.choices import Item
from infopt.errors import InputError
from infopt.protocols import Progress
from infopt.quality.values import figure_value
from infopt.result import Value
from infopt.shares import ShareDifference, mcnemar_p, retention, share_interval
from infopt.stats import Interval

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    MaskedLogitsOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """([choices, tokens] ids, the same shape of mask, both int64 on the CPU) → [choices, tokens, vocabulary] logits."""


FIGURES = ("mc.accuracy", "mc.delta", "mc.flips_share", "mc.retention")


@dataclass(frozen=True)
class ItemScore:
    """`log_likelihoods`: one sum per choice, nats; `per_byte`: the same ÷ the choice's bytes."""

    id: str
    answer: int
    log_likelihoods: tuple[float, ...]
    per_byte: tuple[float, ...]

    @property
    def predicted(self) -> int | None:
        """The choice with the highest score per byte, the first of equals; None when any score is NaN."""
        if any(math.isnan(score) for score in self.per_byte):
            return None
        return self.per_byte.index(max(self.per_byte))

    @property
    def is_correct(self) -> bool:
        return self.predicted == self.answer


@dataclass(frozen=True)
class TaskResult:
    """Counts over the same items. `broken`: right by the reference, wrong now; `fixed`: the other way round."""

    total: int
    correct_reference: int
    correct: int
    broken: tuple[str, ...]
    fixed: tuple[str, ...]
    alpha: float = 0.05
    majority: float | None = None
    """Share of the items with the commonest answer, where all have the same choices."""

    @property
    def retention(self) -> Interval | None:
        """What is left of the reference's lead over always giving the commonest answer; None where there is no such lead."""
        if self.majority is None:
            return None
        return retention(len(self.broken), len(self.fixed), self.correct_reference, self.total, self.majority, self.alpha)

    @property
    def accuracy(self) -> Interval:
        return share_interval(self.correct, self.total, self.alpha)

    @property
    def difference(self) -> ShareDifference:
        """Candidate − reference accuracy: its interval, minimum detectable effect and p-values."""
        return ShareDifference(len(self.broken), len(self.fixed), self.total, self.alpha)

    @property
    def flips(self) -> Interval:
        """Share of items whose correctness changed."""
        return share_interval(len(self.broken) + len(self.fixed), self.total, self.alpha)

    @property
    def mcnemar_p(self) -> float:
        """Exact two-sided p for "as many broken as fixed"."""
        return mcnemar_p(len(self.broken), len(self.fixed))

    @property
    def mde(self) -> float:
        """Smallest difference in accuracy that this many items and flips would show with 80 % power."""
        return self.difference.mde

    def figures(self) -> dict[str, Value]:
        found = {"mc.accuracy": self.accuracy, "mc.delta": self.difference.interval, "mc.flips_share": self.flips}
        figures = dict(figure_value(key, interval.estimate, self.total, interval=interval) for key, interval in found.items())
        kept, reason = self.retention, "the items have choices of their own"
        if self.majority is not None:
            reason = "the reference is right no more often than the commonest answer"
        return figures | dict(
            [figure_value("mc.retention", kept.estimate if kept else None, self.total, interval=kept, reason=reason)]
        )


def score_choices(
    model: MaskedLogitsOf,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    progress: Progress = lambda line: None,
    context_tokens: int | None = None,
) -> list[ItemScore]:
    """Scores each item with one forward pass over its choices, padded on the right.

    `context_tokens`: the model's context; an item that exceeds it is refused, since a cut question is another question.
    Raises InputError.
    """
    import torch

    scores = []
    with torch.inference_mode():
        for number, item in enumerate(items, start=1):
            progress(f"multiple choice: item {number} of {len(items)}")
            encoded = _encode_item(item, tokenizer, context_tokens)
            sums = _log_likelihoods(model, encoded, max(len(ids) for ids, _ in encoded))
            per_byte = tuple(total / len(choice.encode()) for total, choice in zip(sums, item.choices, strict=True))
            scores.append(ItemScore(item.id, item.answer, sums, per_byte))
    return scores


def require_room(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, context_tokens: int | None) -> None:
    """Raises InputError for the first item that `score_choices` would refuse."""
    for item in items:
        _encode_item(item, tokenizer, context_tokens)


def masked_logits_of(model: PreTrainedModel) -> MaskedLogitsOf:
    """The callable that `score_choices` wants, from an open model on any device."""

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        device = model.device
        logits: torch.Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        return logits

    return forward


def majority(items: Sequence[Item]) -> float | None:
    """Share of the commonest answer, where every item has the same choices: a classification. None for other items."""
    if len({item.choices for item in items}) != 1:
        return None
    return max(Counter(item.answer for item in items).values()) / len(items)


def compare_scores(
    reference: Sequence[ItemScore], candidate: Sequence[ItemScore], alpha: float = 0.05, majority: float | None = None
) -> TaskResult:
    """What changed between two scorings of the same items in the same order. Raises InputError for other items."""
    if not reference or [(r.id, r.answer) for r in reference] != [(c.id, c.answer) for c in candidate]:
        raise InputError("reference and candidate were not scored on the same items", hint="score both on one file")
    pairs = list(zip(reference, candidate, strict=True))
    return TaskResult(
        total=len(pairs),
        correct_reference=sum(old.is_correct for old, _ in pairs),
        correct=sum(new.is_correct for _, new in pairs),
        broken=tuple(old.id for old, new in pairs if old.is_correct and not new.is_correct),
        fixed=tuple(old.id for old, new in pairs if new.is_correct and not old.is_correct),
        alpha=alpha,
        majority=majority,
    )


def _encode_item(item: Item, tokenizer: PreTrainedTokenizerBase, context_tokens: int | None) -> list[tuple[list[int], int]]:
    encoded = [_encode(item, choice, tokenizer) for choice in item.choices]
    longest = max(len(ids) for ids, _ in encoded)
    if context_tokens is not None and longest > context_tokens:
        raise InputError(f"item {item.id!r} has {longest} tokens; the model's context is {context_tokens}")
    return encoded


def _encode(item: Item, choice: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of question and choice, and the index of the first token that belongs to the choice.

    Encoded together, since some tokenizers write a text's first token differently; where the question's own tokens stop
    agreeing with the joint ones, the choice begins.
    """
    joint = list(tokenizer(f"{item.question.rstrip()} {choice.strip()}")["input_ids"])
    alone = list(tokenizer(item.question.rstrip())["input_ids"])
    start = next((i for i, (a, b) in enumerate(zip(alone, joint, strict=False)) if a != b), min(len(alone), len(joint)))
    if not 0 < start < len(joint):
        raise InputError(f"item {item.id!r}: question and choice cannot be told apart as tokens", hint="give a longer question")
    return joint, start


def _log_likelihoods(model: MaskedLogitsOf, encoded: Sequence[tuple[list[int], int]], longest: int) -> tuple[float, ...]:
    import torch

    ids = torch.zeros(len(encoded), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    logits = model(ids, mask)
    sums = []
    for row, (tokens, start) in enumerate(encoded):
        log_probs = torch.log_softmax(logits[row, start - 1 : len(tokens) - 1].float(), dim=-1)
        chosen = log_probs.gather(-1, ids[row, start : len(tokens), None].to(log_probs.device))
        sums.append(float(chosen.cpu().sum(dtype=torch.float64)))
    return tuple(sums)
