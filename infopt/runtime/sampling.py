"""From logits to a token: the filters of transformers' `generate` in its order, drawn with a generator of the request's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from infopt.protocols import Sampling

#: Tokens among which a nucleus is looked for first.
LIKELIEST = 1024


def generator(seed: int, row: int = 0) -> torch.Generator:
    """A stream of its own for each row of a request."""
    return torch.Generator().manual_seed((seed * 1_000_003 + row) % (1 << 63))


def penalised(logits: torch.Tensor, seen: Sequence[int], penalty: float) -> torch.Tensor:
    """[vocabulary] with what was seen made less likely: positive logits divided, negative ones multiplied (CTRL, 1909.05858)."""
    if penalty == 1.0 or not seen:
        return logits
    ids = torch.tensor(sorted({token for token in seen if token < len(logits)}), dtype=torch.long, device=logits.device)
    found = logits[ids]
    return logits.index_copy(0, ids, torch.where(found > 0, found / penalty, found * penalty))


def probabilities(logits: torch.Tensor, sampling: Sampling, seen: Sequence[int] = ()) -> torch.Tensor:
    """What a token is drawn from: float32 [..., vocabulary], 0 where a filter rules a token out. `logits` [..., vocabulary].

    temperature 0 is all on the likeliest token. `seen`: of a single row.
    """
    logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[..., -1:], -torch.inf)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    if sampling.min_p > 0:
        found = logits.softmax(-1)
        logits = logits.masked_fill(found < sampling.min_p * found.amax(-1, keepdim=True), -torch.inf)
    return logits.softmax(-1)


def _nucleus(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """The likeliest tokens that have `mass` together, at least one; the others ruled out (arXiv 1904.09751)."""
    whole, vocabulary = logits.logsumexp(-1, keepdim=True), logits.shape[-1]
    for count in (min(LIKELIEST, vocabulary), vocabulary):  # sorting all takes longer than a step
        ordered, ids = logits.topk(count)
        found = (ordered - whole).exp()
        upto = found.cumsum(-1)
        if count == vocabulary or bool((upto[..., -1] >= mass).all()):
            break
    kept = ordered.masked_fill(upto - found >= mass, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, kept)


def draw(weights: torch.Tensor, source: torch.Generator) -> int:
    """An index, with a probability in proportion to its weight. `weights` [vocabulary], not all 0."""
    return draw_rows(weights[None], [source])[0]


def draw_rows(weights: torch.Tensor, sources: Sequence[torch.Generator]) -> list[int]:
    """The same of each row of `weights` [rows, vocabulary], with a stream of its own: the host waits for the GPU once."""
    sums = weights.double().cumsum(-1)
    shares = torch.stack([torch.rand((1,), generator=source, dtype=torch.float64) for source in sources])
    found = torch.searchsorted(sums, shares.to(sums.device) * sums[:, -1:], right=True)
    return [min(index, weights.shape[-1] - 1) for index in found[:, 0].tolist()]


def accept(
    drafted: Sequence[int],
    proposed: Sequence[torch.Tensor | None],
    target: Callable[[int], torch.Tensor],
    source: torch.Generator,
) -> list[int]:
    """The tokens to keep of a draft, and one more: distributed as `target` says, whatever was drafted.

    Leviathan et al., arXiv 2211.17192, algorithm 1: a drafted token is kept with probability min(1, p/q); the first that is
    not is drawn anew from max(0, p − q). `proposed[i]`: what draft i was drawn from, None for a draft that could only be
    what it was (q = 1). `target(i)`: the distribution at draft i, or behind all of them; none is asked for in vain.
    """
    kept: list[int] = []
    for index, (token, q) in enumerate(zip(drafted, proposed, strict=True)):
        p = target(index)
        allowed = float(p[token]) / (1.0 if q is None else float(q[token]))
        if float(torch.rand((), generator=source, dtype=torch.float64)) < allowed:
            kept.append(token)
            continue
        rest = p.clone() if q is None else (p - q).clamp_(min=0)
        if q is None:
            rest[token] = 0
        if not float(rest.sum()) > 0:  # p and q differ by rounding alone
            rest = p
        return [*kept, draw(rest, source)]
    return [*kept, draw(target(len(drafted)), source)]
