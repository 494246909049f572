"""Losses over a vocabulary, each as a value and its gradient with respect to the student's logits.

With p the teacher's distribution and q = softmax(z/T) the student's, every divergence D(p, q) has
∂D/∂z_j = q_j·(d_j − Σ_i q_i·d_i)/T, where d = ∂D/∂q. Written out, float32 copies of a few positions are held at a time and not of
all. The teacher's distribution is whole, or its likeliest tokens and the mass of all others together, which the student's others
are then held against together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Divergence = Literal["forward", "reverse", "jensen_shannon"]

#: Positions whose log-probabilities over the vocabulary are held at a time.
POSITIONS = 64
#: Probabilities below this are no longer told from it: log 0 has no gradient.
LEAST = 1e-30


@dataclass(frozen=True)
class Likeliest:
    """What is kept of a teacher's distribution at each position, at temperature 1.

    `tokens` int64 [positions, k], `log_probabilities` float32 [positions, k]; the rest has 1 − Σ p together.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor

    def __getitem__(self, part: slice) -> Likeliest:
        return Likeliest(self.tokens[part], self.log_probabilities[part])

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def of(logits: torch.Tensor, count: int) -> Likeliest:
        """The `count` likeliest of [positions, vocabulary]."""
        found = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
        return Likeliest(found.indices, found.values)


Target = torch.Tensor | Likeliest
"""The teacher's logits [positions, vocabulary], or what is kept of them."""
PartOf = Callable[[slice], torch.Tensor]


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
        q = (logits[part].float() / temperature).softmax(-1)
        if isinstance(wanted, Likeliest):
            value, slope = _against_likeliest(q, wanted, kind, temperature)
        else:
            value, slope = _against(q, (wanted.float() / temperature).softmax(-1), kind)
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


def _against(q: torch.Tensor, p: torch.Tensor, kind: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence [positions] and its gradient [positions, vocabulary] with respect to z/T."""
    if kind == "forward":  # where d = −p/q, q·(d − Σ q·d) is q − p
        return (p * (_log(p) - _log(q))).sum(-1), q - p
    d = _slope(p, q, kind)
    return _value(p, q, kind).sum(-1), q * (d - (q * d).sum(-1, keepdim=True))


def _against_likeliest(
    q: torch.Tensor, wanted: Likeliest, kind: Divergence, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where all other tokens count as one. At T ≠ 1 the teacher's rest is taken to be as likely as it was at T = 1."""
    rest = (1 - wanted.log_probabilities.exp().sum(-1, keepdim=True)).clamp_min(0)
    p = torch.cat([(wanted.log_probabilities / temperature).softmax(-1) * (1 - rest), rest], dim=-1)
    found = q.gather(1, wanted.tokens)
    found = torch.cat([found, (1 - found.sum(-1, keepdim=True)).clamp_min(LEAST)], dim=-1)
    d = -p / found.clamp_min(LEAST) if kind == "forward" else _slope(p, found, kind)
    mean = (found * d).sum(-1, keepdim=True)
    gradient = (d[:, -1:] - mean).expand_as(q).scatter(1, wanted.tokens, d[:, :-1] - mean)
    return _value(p, found, kind).sum(-1), gradient * q


def _value(p: torch.Tensor, q: torch.Tensor, kind: Divergence) -> torch.Tensor:
    if kind == "forward":
        return p * (_log(p) - _log(q))
    if kind == "reverse":
        return q * (_log(q) - _log(p))
    mean = _log((p + q) / 2)
    return (p * (_log(p) - mean) + q * (_log(q) - mean)) / 2


def _slope(p: torch.Tensor, q: torch.Tensor, kind: Divergence) -> torch.Tensor:
    """∂D/∂q, up to what is the same for every token: that does not change the gradient."""
    return _log(q) - _log(p) if kind == "reverse" else (_log(q) - _log((p + q) / 2)) / 2


def _log(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_min(LEAST).log()
