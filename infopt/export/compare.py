"""An export against what it should be, and against what it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from infopt.errors import LoadBackError
from infopt.export.record import Against, LoadBackCheck
from infopt.units import significant

if TYPE_CHECKING:
    import torch

_HINT = "this is a defect of the export or of that reader; please report it"


def top1(first: torch.Tensor, second: torch.Tensor) -> float:
    """Share of positions where both [tokens, vocabulary] have the same likeliest token."""
    return float((first.argmax(-1) == second.argmax(-1)).float().mean())


def against(before: torch.Tensor, after: torch.Tensor, ids: torch.Tensor) -> Against:
    """What the storage type costs, on the probe: logits [tokens, vocabulary] of the same `ids` [1, tokens]."""
    from torch.nn.functional import cross_entropy

    losses = [float(cross_entropy(logits[:-1], ids[0, 1:])) for logits in (before, after)]
    return Against(
        max_abs_logit_difference=float((before - after).abs().max()),
        top1_agreement=top1(before, after),
        perplexity_ratio=float(2.718281828459045 ** (losses[1] - losses[0])),
    )


def figures(expected: torch.Tensor, found: torch.Tensor) -> dict[str, Any]:
    """The fields of a `LoadBackCheck` that follow from logits, [tokens, vocabulary] each."""
    return {
        "tokens": expected.shape[0],
        "max_abs_logit_difference": float((expected - found).abs().max()),
        "top1_agreement": top1(expected, found),
    }


def require(check: LoadBackCheck) -> LoadBackCheck:
    """Raises LoadBackError when the logits differ by more than the check's tolerance, agree on the likeliest token at fewer
    positions than its floor, or are not finite."""
    difference, same = check.max_abs_logit_difference, check.top1_agreement
    assert difference is not None
    assert same is not None
    if not isfinite(difference):
        raise LoadBackError(f"the export, loaded by {check.reader}, gives logits that are not finite", hint=_HINT)
    if check.tolerance is not None and difference > check.tolerance:
        raise LoadBackError(
            f"the export, loaded by {check.reader}, gives logits up to {significant(difference)} away from the weights that "
            f"were written (allowed: {significant(check.tolerance)}); nothing was written",
            hint=_HINT,
        )
    if check.top1_floor is not None and same < check.top1_floor:
        raise LoadBackError(
            f"the export, loaded by {check.reader}, has the source's likeliest token at {same:.0%} of the positions (at least "
            f"{check.top1_floor:.0%} is asked for); nothing was written",
            hint="a type of more bits",
        )
    return check


def encoded(tokenizer: Any, texts: Sequence[str]) -> dict[str, list[int]]:
    """Each text's ids, special tokens included as the tokenizer adds them."""
    return {text: list(tokenizer(text, verbose=False)["input_ids"]) for text in texts}


def parting(expected: Mapping[str, Sequence[int]], encode: Callable[[str], Sequence[int]]) -> dict[str, int]:
    """The texts that `encode` makes other ids of than `expected`: text → the first token that differs."""
    found = {}
    for text, ids in expected.items():
        made = list(encode(text))
        if made != list(ids):
            pairs = enumerate(zip(ids, made, strict=False))
            found[text] = next((index for index, (a, b) in pairs if a != b), min(len(ids), len(made)))
    return found


def same_tokens(expected: Mapping[str, Sequence[int]], encode: Callable[[str], Sequence[int]], reader: str) -> None:
    """Raises LoadBackError when `reader` encodes a text in another way, naming the first place."""
    for text, place in parting(expected, encode).items():
        raise LoadBackError(
            f"the export's tokenizer, loaded by {reader}, encodes a text in another way: {text[:60]!r}, token {place}; "
            "nothing was written",
            hint=_HINT,
        )
