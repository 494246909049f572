"""Which of several answers to one prompt is the answer: best-of-n.

| `choose` | the answer is |
|---|---|
| `mean_logprob` | the candidate whose tokens the model found likeliest on average, so that length does not count |
| `majority` | one that says what most say: self-consistency (Wang et al., arXiv 2203.11171, section 2) |
| `check` | the likeliest that passes the prompt's `expect:` rules; the likeliest of all where none does |

What a candidate says is its whole text, or the last match of a regular expression in it (its first group where it has one);
white space and case do not count. A candidate that says nothing has no vote. Ties go to the higher mean log-probability,
then to the candidate that was drawn first; without log-probabilities, to that one at once.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from infopt.data.jsonl import short
from infopt.errors import InputError
from infopt.sections import Choose

if TYPE_CHECKING:
    from infopt.data.prompts import Prompt


@dataclass(frozen=True)
class Choice:
    """`index`: the chosen candidate, from 0. `why`: in a few words, for people."""

    index: int
    why: str


def choose(
    texts: Sequence[str],
    how: Choose,
    *,
    mean_logprobs: Sequence[float | None] | None = None,
    answer: str | None = None,
    passes: Callable[[int], bool] | None = None,
) -> Choice:
    """The chosen one of `texts`, one or more answers to one prompt.

    `mean_logprobs`: nats per token, one for each text; None where the engine has none. `answer`: the expression that
    `majority` looks for. `passes`: whether the candidate of an index meets the rules, for `check`. Raises InputError where
    what `how` needs is missing.
    """
    if not texts or (mean_logprobs is not None and len(mean_logprobs) != len(texts)):
        raise InputError(f"{len(texts)} candidates, {len(mean_logprobs or ())} log-probabilities; allowed: 1 or more of each")
    order = ranked(mean_logprobs, len(texts))
    if how == "majority":
        return _majority([said(text, answer) for text in texts], order, _first(mean_logprobs))
    if how == "check":
        if passes is None:
            raise InputError("choose: check has no rules to check by", hint=RULES_HINT)
        return _checked(passes, order, _first(mean_logprobs))
    if mean_logprobs is None:
        raise InputError("choose: mean_logprob has no log-probabilities to choose by", hint=LOGPROBS_HINT)
    best = mean_logprobs[order[0]]
    level = "unknown" if best is None else f"{best:.3f} nats per token"
    return Choice(order[0], f"the likeliest of {len(texts)}: mean log-probability {level}")


RULES_HINT = 'give the prompt rules: {"prompt": …, "expect": {"contains": "Paris"}}, or infopt generate --expect'
LOGPROBS_HINT = "engine: {name: native}, or choose: majority"


def ranked(mean_logprobs: Sequence[float | None] | None, number: int) -> list[int]:
    """Indices of all candidates, the likeliest first; unknown ones last, equal ones as they were drawn."""
    if mean_logprobs is None:
        return list(range(number))
    known = [-math.inf if each is None or math.isnan(each) else each for each in mean_logprobs]
    return sorted(range(number), key=lambda index: (-known[index], index))


def last_match(text: str, answer: str) -> re.Match[str] | None:
    """Where the text says its answer."""
    last = deque(re.finditer(answer, text), maxlen=1)
    return last[0] if last else None


def answer_in(text: str, answer: str | None = None) -> str:
    """What the text says, as it stands there; empty where the expression does not match."""
    if answer is None:
        return text
    last = last_match(text, answer)
    return (last[1 if last.re.groups else 0] or "") if last else ""


def said(text: str, answer: str | None = None) -> str | None:
    """What a candidate votes for; None where it says nothing."""
    return " ".join(answer_in(text, answer).split()).casefold() or None


def require_rules(prompts: Sequence[Prompt], how: Choose | None) -> None:
    """Raises InputError for the first prompt without the rules that `choose: check` needs."""
    for prompt in prompts if how == "check" else ():
        if prompt.expect is None:
            raise InputError(
                f"{prompt.where + ': ' if prompt.where else ''}the prompt {prompt.id!r} has no rules; choose: check needs some",
                hint=RULES_HINT,
            )


def _first(mean_logprobs: Sequence[float | None] | None) -> str:
    return "the first" if mean_logprobs is None else "the likeliest"


def _majority(votes: Sequence[str | None], order: Sequence[int], first: str) -> Choice:
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return Choice(order[0], f"none of {len(votes)} says anything that counts: {first}")
    most = max(counts.values())
    leading = [vote for vote, number in counts.items() if number == most]
    index = next(index for index in order if votes[index] in leading)
    why = f"{most} of {len(votes)} say {short(votes[index] or '')}"
    tied = len(leading) - 1
    return Choice(index, why if not tied else f"{why}; {tied} other answer{'s' * (tied > 1)} had as many votes: {first}")


def _checked(passes: Callable[[int], bool], order: Sequence[int], first: str) -> Choice:
    for place, index in zip(count(1), order, strict=False):
        if passes(index):
            return Choice(index, f"{first} of {len(order)} that passes, after {place - 1} that did not")
    return Choice(order[0], f"none of {len(order)} passes: {first}")
