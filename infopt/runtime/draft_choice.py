"""Which draft pays, by a short trial on the prompts at hand: all of them beside plain decoding, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from infopt.errors import InputError
from infopt.runtime.draft_length import DraftLength
from infopt.runtime.drafts import Drafter
from infopt.runtime.loop import Ask, Loop, Told
from infopt.runtime.steps import Step

#: Prompts and new tokens of a trial, and how often each way takes its turn.
PROMPTS, TOKENS, TURNS = 2, 48, 2
#: How much faster than plain decoding a draft must have been.
LEAST = 1.03


@dataclass
class Tried:
    """A way of decoding on trial. `seconds` and `steps` are of decoding alone, prefill left out."""

    drafter: Drafter | None
    length: DraftLength
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    drafts: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 1.0

    def said(self, name: str, plain: Tried) -> str:
        """One clause for reports: measured speed-up, and what tokens a step and the cost of verifying would give."""
        predicted = self.tokens * plain.seconds / plain.tokens / self._expected_s()
        drafted, kept = sum(each for each, _ in self.drafts), sum(each for _, each in self.drafts)
        share = f"{kept / drafted:.0%} of drafted tokens accepted" if drafted else "nothing drafted"
        return (
            f"{name} {plain.seconds / self.seconds:.2f}× plain decoding (predicted {predicted:.2f}×; "
            f"{self.tokens_per_step:.2f} tokens a step, {share})"
        )

    def _expected_s(self) -> float:
        """What its steps should have taken, by how many tokens they verified and what such steps and drafting cost."""
        plain_steps = self.steps - len(self.drafts)
        verified = sum(self.length.cost(1 + drafted) + drafted * self.length.draft_s for drafted, _ in self.drafts)
        return verified + plain_steps * self.length.cost(1)


def choose(
    step: Step, drafters: Mapping[str, Drafter], most: int, asks: Sequence[Ask], now: Callable[[], float] = time.perf_counter
) -> tuple[Tried, str] | None:
    """The fastest of plain decoding and `drafters` on the first of `asks`, and a line that says why.

    Drafters for which memory is short are left out, and the line says so. None where a single token is asked for: nothing
    could be drafted.
    """
    if max(ask.max_new_tokens for ask in asks) < 2:
        return None
    Loop(step).check(asks)
    ways: dict[str, Tried] = {}
    said: list[str] = []
    for name, drafter in drafters.items():
        try:
            Loop(step, drafter).check(asks)
            ways[name] = Tried(drafter, DraftLength(most))
        except InputError as error:
            said.append(f"{name} was not tried: {error}")
    asks = [
        replace(ask, max_new_tokens=min(TOKENS, ask.max_new_tokens), stop_tokens=frozenset())
        for ask in asks
        if ask.max_new_tokens > 1
    ][:PROMPTS]
    plain = Tried(None, DraftLength(most))
    for turn in range(TURNS):
        for each in [plain, *ways.values()] if turn % 2 == 0 else [*ways.values(), plain]:
            for ask in asks:
                _run(step, each, ask, now)
    name, best = min(ways.items(), key=lambda item: item[1].seconds, default=("", plain))
    told = "; ".join([*(each.said(name, plain) for name, each in ways.items()), *said])
    if plain.seconds < LEAST * best.seconds:
        return plain, f"no draft: on {len(asks)} of the prompts none was faster: {told}"
    return best, f"draft {name}: the fastest on {len(asks)} of the prompts: {told}"


def _run(step: Step, way: Tried, ask: Ask, now: Callable[[], float]) -> None:
    told: list[Told] = []
    Loop(step, way.drafter, way.length, now).run([ask], lambda each, _: told.append(each))
    way.seconds += told[-1].seconds - told[0].seconds
    way.steps += len(told) - 1
    way.tokens += sum(each.tokens[0] for each in told[1:])
    for each in told[1:]:
        way.drafts += each.drafts
