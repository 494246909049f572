"""Losses over a vocabulary, each as a value and its gradient with respect to the student's logits.

With p the teacher's distribution and q = softmax(z/T) the student's, every divergence D(p, q) has
∂D/∂z_j = q_j·(d_j − Σ_i q_i·d_i)/T, where d = ∂D/∂q. Written out, float32 copies of a few positions are held at a time and not of
all. The teacher's distribution is whole, or its likeliest tokens and the mass of all others together, which the student's others
are then held against together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Divergence = Literal["forward", "reverse", "jensen_shannon"]

#: Positions whose log-probabilities over the vocabulary are held at a time.
POSITIONS = 64
#: The least that is left for all other tokens, where rounding leaves nothing: log 0 has no gradient.
LEAST = 1e-30


@dataclass(frozen=True)
class Likeliest:
    """What is kept of a teacher's distribution at each position, at one temperature.

    `tokens` int64 [positions, k]; `log_probabilities` float32 [positions, k + 1], the last one of all other tokens together.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor

    def __getitem__(self, part: slice) -> Likeliest:
        return Likeliest(self.tokens[part], self.log_probabilities[part])

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def of(logits: torch.Tensor, count: int, temperature: float = 1.0) -> Likeliest:
        """The `count` likeliest of [positions, vocabulary]."""
        found = []
        for start in range(0, len(logits), POSITIONS):
            every = (logits[start : start + POSITIONS].float() / temperature).log_softmax(-1)
            tokens = every.topk(min(count, logits.shape[-1]), dim=-1).indices
            found.append((tokens, _with_rest(every, tokens)))
        return Likeliest(torch.cat([tokens for tokens, _ in found]), torch.cat([levels for _, levels in found]))


Target = torch.Tensor | Likeliest
"""The teacher's logits [positions, vocabulary], or what is kept of them at the loss's temperature."""


def divergence(
    logits: torch.Tensor,
    target: Target,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    weights: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor]:
    """Mean divergence in nats over positions, and its gradient; `logits` [positions, vocabulary].

    forward is KL(teacher ‖ student), reverse KL(student ‖ teacher), jensen_shannon the mean KL of both to their mean. At a
    temperature T both are softened by it and the loss is multiplied by T² (Hinton et al., arXiv 1503.02531, section 2), so that
    its gradient stays as large. `weights` [positions] are relative.
    """
    shares = _shares(logits, weights)
    gradient, total = torch.empty_like(logits), 0.0
    for start in range(0, len(logits), POSITIONS):
        part = slice(start, start + POSITIONS)
        wanted = target[part]
        log_q = (logits[part].float() / temperature).log_softmax(-1)
        if isinstance(wanted, Likeliest):
            value, slope = _against_likeliest(log_q, wanted, kind)
        else:
            value, slope = _against(log_q, (wanted.float() / temperature).log_softmax(-1), kind)
        total += float((value * shares[part]).sum())
        gradient[part] = slope.mul_(shares[part, None] * temperature)
    return total * temperature**2, gradient


def token_loss(logits: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[float, torch.Tensor]:
    """Mean −log q(token) in nats over positions, and its gradient; `tokens` int64 [positions]."""
    shares = _shares(logits, weights)
    gradient, total = torch.empty_like(logits), 0.0
    for start in range(0, len(logits), POSITIONS):
        part = slice(start, start + POSITIONS)
        found = logits[part].float().log_softmax(-1)
        chosen = found.gather(1, tokens[part, None])
        total -= float((chosen[:, 0] * shares[part]).sum())
        slope = found.exp_().scatter_add_(1, tokens[part, None], torch.full_like(chosen, -1.0))
        gradient[part] = slope.mul_(shares[part, None])
    return total, gradient


def _shares(logits: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        return torch.full((len(logits),), 1 / len(logits), device=logits.device)
    return weights / weights.sum()


def _against(log_q: torch.Tensor, log_p: torch.Tensor, kind: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence [positions] and its gradient [positions, vocabulary] with respect to z/T."""
    q = log_q.exp()
    if kind == "forward":  # where d = −p/q, q·(d − Σ q·d) is q − p
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), q.sub_(p)
    d = _slope(log_p, log_q, kind)
    return _value(log_p, log_q, kind).sum(-1), q * (d - (q * d).sum(-1, keepdim=True))


def _against_likeliest(log_q: torch.Tensor, wanted: Likeliest, kind: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where all other tokens count as one."""
    log_p = wanted.log_probabilities
    found = _with_rest(log_q, wanted.tokens)
    q = log_q.exp()
    if kind == "forward":
        # As of whole distributions: q − p, and for the others their share of the rest.
        ratio = (log_p[:, -1:] - found[:, -1:]).exp()
        gradient = q - q * ratio
        gradient.scatter_(1, wanted.tokens, (found.exp() - log_p.exp())[:, :-1])
        return _value(log_p, found, kind).sum(-1), gradient
    d = _slope(log_p, found, kind)
    mean = (found.exp() * d).sum(-1, keepdim=True)
    gradient = (d[:, -1:] - mean).expand_as(q).scatter(1, wanted.tokens, d[:, :-1] - mean)
    return _value(log_p, found, kind).sum(-1), gradient * q


def _with_rest(every: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of `tokens` [positions, k] and, behind them, of all others together, from those of all."""
    # Summed, since what is left of 1 would be rounding.
    rest = every.exp().scatter_(1, tokens, 0.0).sum(-1, keepdim=True).clamp_min(LEAST).log()
    return torch.cat([every.gather(1, tokens), rest], dim=-1)


def _value(log_p: torch.Tensor, log_q: torch.Tensor, kind: Divergence) -> torch.Tensor:
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        return p * (log_p - log_q)
    if kind == "reverse":
        return q * (log_q - log_p)
    mean = _log_mean(log_p, log_q)
    return (p * (log_p - mean) + q * (log_q - mean)) / 2


def _slope(log_p: torch.Tensor, log_q: torch.Tensor, kind: Divergence) -> torch.Tensor:
    """∂D/∂q, up to what is the same for every token: that does not change the gradient."""
    return log_q - log_p if kind == "reverse" else (log_q - _log_mean(log_p, log_q)) / 2


def _log_mean(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(log_p, log_q) - math.log(2)
