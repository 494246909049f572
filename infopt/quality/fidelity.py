"""Tier 1: how far the candidate's next-token distributions are from the reference's, on the same tokens.

Both models read the same windows of text. At each position (the window's last token has no successor) they give two
distributions p (reference) and q (candidate) over the vocabulary, and x is the token that really follows:

    KLD(p ‖ q) = Σ_v p(v)·(log p(v) − log q(v))      nats
    ΔNLL       = log p(x) − log q(x)                 nats; exp of its mean is the perplexity ratio
    Δp         = q(x) − p(x)                         share of probability

A candidate with a part of the reference's vocabulary (`quality.vocabularies.Part`) reads the same text, tokens that it lacks
in pieces. Then q(x) is the product over the pieces, so that ΔNLL counts what each lost token costs. KLD, which would be infinite,
is no figure then: what `kld_mean` says is over the tokens that both have, p renormalised to them.

Only these scalars are kept. Logits are worked through in chunks of positions, in fp32, so beside the models' own outputs
memory is bounded by a few chunks × vocabulary. Intervals count windows, not tokens: a window's tokens share a context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from infopt.errors import InfoptError, InputError
from infopt.protocols import Progress
from infopt.quality.values import figure_value
from infopt.quality.vocabularies import Part
from infopt.result import Value
from infopt.stats import Interval, cluster_mean_interval

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    LogitsOf = Callable[[torch.Tensor], torch.Tensor]
    """[1, tokens] ids (int64, CPU) → [1, tokens, vocabulary] logits, any float type, any device."""

FIGURES = ("kld.mean", "kld.median", "kld.p99", "kld.max", "ppl_ratio", "top1_agreement", "rms_dp")
CHUNK_POSITIONS = 128
_PADDING_MULTIPLES = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class WindowScores:
    """One window's scalars, each [tokens − 1], float64 (`is_same_top`: bool)."""

    kld: NDArray[np.float64]
    nll_reference: NDArray[np.float64]
    nll: NDArray[np.float64]
    delta_p: NDArray[np.float64]
    is_same_top: NDArray[np.bool_]


@dataclass(frozen=True)
class FidelityResult:
    """Scores per window, and the figures derived from them."""

    windows: tuple[WindowScores, ...]
    kld_reason: str | None = None
    """Why KLD is no figure; `kld_mean` is over the tokens that both models have then."""

    @property
    def positions(self) -> int:
        return sum(len(window.kld) for window in self.windows)

    @cached_property
    def non_finite(self) -> int:
        """Positions where either model's figures are infinite or undefined; figures are then null."""
        return sum(int(np.sum(~(np.isfinite(w.kld) & np.isfinite(w.nll) & np.isfinite(w.nll_reference)))) for w in self.windows)

    @property
    def kld_mean(self) -> Interval | None:
        return self._mean([w.kld for w in self.windows])

    @property
    def delta_nll(self) -> Interval | None:
        """Candidate − reference, nats per token."""
        return None if self.non_finite else self._mean([w.nll - w.nll_reference for w in self.windows])

    @property
    def ppl_ratio(self) -> Interval | None:
        """Candidate's perplexity ÷ the reference's."""
        return None if self.delta_nll is None else _exp(self.delta_nll)

    @property
    def top1_agreement(self) -> Interval | None:
        """Share of positions with the same most likely token; bounds are cut to 0 … 1."""
        mean = self._mean([w.is_same_top.astype(np.float64) for w in self.windows])
        if mean is None or mean.low is None or mean.high is None:
            return mean
        return Interval(mean.estimate, max(0.0, mean.low), min(1.0, mean.high), mean.alpha)

    @property
    def ppl(self) -> float | None:
        return self._perplexity([w.nll for w in self.windows])

    @property
    def ppl_reference(self) -> float | None:
        return self._perplexity([w.nll_reference for w in self.windows])

    def figures(self) -> dict[str, Value]:
        """The catalogue's fidelity figures; null, with the count as reason, when logits were not finite."""
        if self.non_finite:
            reason = f"logits not finite at {self.non_finite} of {self.positions} positions"
            return dict(figure_value(key, None, self.positions, reason=reason) for key in FIGURES)
        kld = np.concatenate([w.kld for w in self.windows])
        delta_p = np.concatenate([w.delta_p for w in self.windows])
        means = {"kld.mean": self.kld_mean, "ppl_ratio": self.ppl_ratio, "top1_agreement": self.top1_agreement}
        numbers = {
            "kld.median": float(np.median(kld)),
            "kld.p99": float(np.percentile(kld, 99)),
            "kld.max": float(kld.max()),
            "rms_dp": math.sqrt(float(np.mean(delta_p**2))),
        } | {key: interval.estimate for key, interval in means.items() if interval}
        return dict(
            figure_value(key, None, self.positions, reason=self.kld_reason)
            if self.kld_reason and key.startswith("kld.")
            else figure_value(key, numbers[key], self.positions, interval=means.get(key))
            for key in FIGURES
        )

    def _mean(self, groups: Sequence[NDArray[np.float64]]) -> Interval | None:
        return None if self.non_finite else cluster_mean_interval(groups)

    def _perplexity(self, nlls: Sequence[NDArray[np.float64]]) -> float | None:
        if self.non_finite:
            return None
        ppl = _exp_float(float(np.concatenate(nlls).mean()))
        return ppl if math.isfinite(ppl) else None


def compare_models(
    reference: LogitsOf,
    candidate: LogitsOf,
    windows: Sequence[Sequence[int]],
    progress: Progress = lambda line: None,
    chunk: int = CHUNK_POSITIONS,
    part: Part | None = None,
) -> FidelityResult:
    """Scores every window with both models; `chunk` positions at a time are turned into probabilities.

    The models may differ in dtype and device. Vocabularies may differ by padding only, and are then compared over the
    common part, each renormalised to it; or the candidate's is `part` of the reference's, whose tokens `windows` hold. Raises
    InputError for other vocabularies or a window below two tokens, InfoptError when a model's logits do not fit the window.
    """
    import torch

    if not windows:
        raise InputError("no windows to compare on", hint="give a longer text")
    scores = []
    with torch.inference_mode():
        for number, window in enumerate(windows, start=1):
            progress(f"fidelity: window {number} of {len(windows)}")
            if len(window) < 2:
                raise InputError(f"window {number} has {len(window)} tokens; next-token scores need 2", hint="use longer windows")
            ids = torch.tensor([list(window)], dtype=torch.int64)
            if part is None:
                scores.append(_score(_logits(reference, ids), _logits(candidate, ids), ids[0], chunk))
                continue
            pieces = [part.pieces(token) for token in window]
            own = torch.tensor([[piece for each in pieces for piece in each]], dtype=torch.int64)
            lengths = torch.tensor([len(each) for each in pieces])
            scores.append(_score_part(_logits(reference, ids), _logits(candidate, own), ids[0], own[0], lengths, part, chunk))
    return FidelityResult(tuple(scores), None if part is None else f"KLD is over all of the reference's tokens; {part.described}")


def logits_of(model: PreTrainedModel) -> LogitsOf:
    """The callable that `compare_models` wants, from an open model on any device."""

    def forward(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return logits

    return forward


def common_vocabulary(reference: int, candidate: int) -> int:
    """The smaller size, where the larger is that size rounded up to a multiple of 8 … 512. Raises InputError otherwise."""
    small, large = sorted((reference, candidate))
    if small != large and all(-(-small // multiple) * multiple != large for multiple in _PADDING_MULTIPLES):
        raise InputError(
            f"vocabularies differ: reference {reference}, candidate {candidate}; only padding to a round size is allowed",
            hint="compare models that share a tokenizer",
        )
    return small


def _logits(model: LogitsOf, ids: torch.Tensor) -> torch.Tensor:
    """[tokens − 1, vocabulary]: the positions that have a successor."""
    logits = model(ids)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise InfoptError(f"logits of shape {tuple(logits.shape)} for {ids.shape[1]} tokens; [1, tokens, vocabulary] is wanted")
    return logits[0, :-1]


def _score(reference: torch.Tensor, candidate: torch.Tensor, ids: torch.Tensor, chunk: int) -> WindowScores:
    import torch

    size = common_vocabulary(reference.shape[-1], candidate.shape[-1])
    if int(ids.max()) >= size:
        raise InputError(f"token id {int(ids.max())} is outside the vocabulary of {size}", hint="use the model's own tokenizer")
    targets = ids[1:].to(reference.device)
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(reference), chunk):
        rows = slice(start, start + chunk)
        log_p = torch.log_softmax(reference[rows, :size].float(), dim=-1)
        log_q = torch.log_softmax(candidate[rows, :size].to(reference.device).float(), dim=-1)
        p = log_p.exp()
        # 0·log 0 is 0, and rounding may take a sum of ~1e5 terms just below the 0 that bounds it.
        kld = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1).clamp(min=0)
        true_p = log_p.gather(-1, targets[rows, None])[:, 0]
        true_q = log_q.gather(-1, targets[rows, None])[:, 0]
        same = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
        parts.append((kld, -true_p, -true_q, true_q.exp() - true_p.exp(), same))
    return _window(parts)


def _score_part(
    reference: torch.Tensor,
    candidate: torch.Tensor,
    ids: torch.Tensor,
    own: torch.Tensor,
    lengths: torch.Tensor,
    part: Part,
    chunk: int,
) -> WindowScores:
    """`own`: the window in the candidate's tokens, of which `lengths` belong to each of the reference's `ids`."""
    import torch

    device = reference.device
    if max(max(part.ids), int(ids.max())) >= reference.shape[-1] or len(part.ids) > candidate.shape[-1]:
        raise InputError("a vocabulary has more tokens than its model has logits", hint="use the model's own tokenizer")
    shared, targets = torch.tensor(part.ids, device=device), ids[1:].to(device)
    ends, owners = lengths.cumsum(0) - 1, torch.arange(len(ids)).repeat_interleave(lengths)
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(reference), chunk):
        stop = min(start + chunk, len(reference))
        first, last = int(ends[start]), int(ends[stop])  # candidate's positions first … last − 1 say the targets' pieces
        logits = reference[start:stop].float()
        log_p, log_shared = torch.log_softmax(logits, dim=-1), torch.log_softmax(logits[:, shared], dim=-1)
        log_pieces = torch.log_softmax(candidate[first:last, : len(shared)].to(device).float(), dim=-1)
        said = log_pieces.gather(-1, own[first + 1 : last + 1, None].to(device))[:, 0]
        whose = (owners[first + 1 : last + 1] - start - 1).to(device)
        true_q = torch.zeros(stop - start, device=device).index_add(0, whose, said)
        log_q = log_pieces[(ends[start:stop] - first).to(device)]
        p = log_shared.exp()
        kld = torch.where(p > 0, p * (log_shared - log_q), 0.0).sum(dim=-1).clamp(min=0)
        true_p = log_p.gather(-1, targets[start:stop, None])[:, 0]
        same = log_p.argmax(dim=-1) == shared[log_q.argmax(dim=-1)]
        parts.append((kld, -true_p, -true_q, true_q.exp() - true_p.exp(), same))
    return _window(parts)


def _window(parts: list[tuple[torch.Tensor, ...]]) -> WindowScores:
    import torch

    kld, nll_reference, nll, delta_p, same = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return WindowScores(
        kld=kld.double().numpy(),
        nll_reference=nll_reference.double().numpy(),
        nll=nll.double().numpy(),
        delta_p=delta_p.double().numpy(),
        is_same_top=same.numpy(),
    )


def _exp(interval: Interval) -> Interval:
    low, high = (None if bound is None else _exp_float(bound) for bound in (interval.low, interval.high))
    return Interval(_exp_float(interval.estimate), low, high, interval.alpha)


def _exp_float(value: float) -> float:
    """exp, infinite instead of an OverflowError: a ruined model's bound may be beyond any float."""
    return math.exp(value) if value < 700 else math.inf
