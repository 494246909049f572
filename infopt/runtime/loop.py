"""The loop that every way of running a model shares: prompts in, tokens out, step by step, all rows together.

Rows need not be equally long, nor end together. A row's drafted tokens are verified in the same step as the other rows'
tokens; greedy output is that of plain decoding whatever was drafted, and sampled output has its distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch

from infopt.errors import InputError
from infopt.protocols import Sampling
from infopt.runtime.draft_length import DraftLength
from infopt.runtime.drafts import Draft, Drafter, Wanted
from infopt.runtime.sampling import accept, draw, draw_rows, generator, penalised, probabilities
from infopt.runtime.steps import Output, Room, Run, Step

Finish = Literal["length", "token", "text", "cancelled"]
#: Tokens before a stop text that are decoded with it: what begins a text is at times spelled otherwise.
MARGIN = 8


@dataclass(frozen=True)
class Ask:
    """One prompt. `stop_tokens` end the answer and belong to it; `stop_texts` end it and are looked for in `decode`'s text.

    `candidates` rows answer it, each drawn with a stream of its own from `seed`; their prompt is computed once.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None
    keep_logprobs: bool = False


@dataclass
class Answer:
    """One row. `logprobs[i]`: natural logarithm of the probability that the model, unfiltered, gave token i."""

    ask: int
    candidate: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def mean_logprob(self) -> float | None:
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else None


@dataclass
class Row:
    index: int
    answer: Answer
    ask: Ask
    sequence: Any
    source: torch.Generator
    state: Any = None
    """What the drafter keeps for it."""
    ids: list[int] = field(default_factory=list)
    """Prompt and answer; the last token is not in the sequence yet."""
    draft: Draft = field(default_factory=Draft)


@dataclass
class Told:
    """What `listen` hears of a step: how many tokens each row got, in order of the rows, and the seconds since the start."""

    seconds: float
    tokens: list[int]
    is_prefill: bool = False
    drafts: list[tuple[int, int]] = field(default_factory=list)
    """Of each draft, how many tokens it had and how many were kept."""


class Loop:
    """`step` runs the model; `drafter` proposes tokens; `length` decides how many are tried."""

    def __init__(
        self,
        step: Step,
        drafter: Drafter | None = None,
        length: DraftLength | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.step, self.now, self.drafter = step, now, drafter
        self.length = length or DraftLength(most=8)

    @torch.inference_mode()
    def run(
        self,
        asks: Sequence[Ask],
        listen: Callable[[Told, list[Answer]], None] = lambda told, answers: None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[Answer]:
        """Answers all, rows of an ask together, in order. Raises InputError for what the model cannot take.

        `listen` is called after every step; `is_cancelled` before each, prompts counting as one: then rows end as they are.
        """
        self.check(asks)
        start = self.now()
        self.step.prepare(sum(ask.sampling.candidates for ask in asks), 1 + (self.length.most if self.drafter else 0))
        rows: list[Row] = []
        try:
            if is_cancelled():
                candidates = [(index, each) for index, ask in enumerate(asks) for each in range(ask.sampling.candidates)]
                return [Answer(index, each, finish="cancelled") for index, each in candidates]
            self._prefill(asks, rows, start, listen)
            answers = [row.answer for row in rows]
            while active := [row for row in rows if row.answer.finish is None]:
                if is_cancelled():
                    for row in active:
                        row.answer.finish = "cancelled"
                    break
                told = self._advance(active, rows)
                told.seconds = self.now() - start
                listen(told, answers)
            return answers
        finally:
            for row in rows:
                if row.sequence is not None:
                    self.step.close(row.sequence)
                if self.drafter and row.state is not None:
                    self.drafter.close(row.state)

    def check(self, asks: Sequence[Ask]) -> None:
        """Refuses, before anything is computed, what the model or memory cannot take. Raises InputError."""
        rooms = []
        for ask in asks:
            total = len(ask.prompt_ids) + ask.max_new_tokens
            if not ask.prompt_ids or ask.max_new_tokens < 1:
                raise InputError(f"{len(ask.prompt_ids)} prompt and {ask.max_new_tokens} new tokens; allowed: 1 or more of each")
            if total > self.step.context:
                raise InputError(
                    f"prompt and answer take {total} tokens; the model's context allows {self.step.context}",
                    hint="shorten the prompt or lower the number of new tokens",
                )
            bad = [token for token in ask.prompt_ids if not 0 <= token < self.step.vocabulary]
            if bad:
                raise InputError(f"prompt token {bad[0]}; allowed: 0 … {self.step.vocabulary - 1}")
            if ask.stop_texts and ask.decode is None:
                raise InputError("stop texts need a tokenizer", hint="give stop tokens instead")
            rooms.append(Room(total, ask.sampling.candidates, len(ask.prompt_ids)))
        promised = self.step.require(rooms)
        if self.drafter:
            self.drafter.require(rooms, promised)

    def _prefill(self, asks: Sequence[Ask], rows: list[Row], start: float, listen: Callable[[Told, list[Answer]], None]) -> None:
        """All prompts in one step, each once; its candidates are forks of it. `rows` has each as soon as it is opened."""
        for index, ask in enumerate(asks):
            for candidate in range(ask.sampling.candidates):
                row = Row(
                    len(rows), Answer(index, candidate), ask, None, generator(ask.seed, candidate), ids=list(ask.prompt_ids)
                )
                rows.append(row)
                row.state = self.drafter.open() if self.drafter else None
        firsts = [row for row in rows if row.answer.candidate == 0]
        for row in firsts:
            row.sequence = self.step.open()
        found = self.step.run(
            [Run(row.sequence, row.ask.prompt_ids) for row in firsts],
            want_logits=any(self._needs_logits(ask) for ask in asks),
        )
        for row in rows:
            if row.sequence is None:
                row.sequence = self.step.fork(firsts[row.answer.ask].sequence)
        drawn = _drawn(found, [(row, row.answer.ask) for row in rows])
        for row in rows:
            token = drawn.get(row.index)
            self._take(row, [self._next(row, found, row.answer.ask) if token is None else token], found, row.answer.ask)
        listen(Told(self.now() - start, [1] * len(rows), is_prefill=True), [row.answer for row in rows])

    def _advance(self, active: list[Row], rows: list[Row]) -> Told:
        drafted_s = self._draft(active)
        began = self.now()
        runs = [
            Run(row.sequence, (row.ids[-1], *row.draft.tokens), bool(row.draft.tokens), goes_on=_goes_on(row)) for row in active
        ]
        found = self.step.run(runs, want_logits=any(self._needs_logits(row.ask) for row in active))
        told, position = Told(0.0, [0] * len(rows)), 0
        seen: list[tuple[int, int, int]] = []
        places = accumulate((len(row.draft.tokens) + 1 for row in active), initial=0)
        drawn = _drawn(found, [(row, place) for row, place in zip(active, places, strict=False) if not row.draft.tokens])
        for row in active:
            token, drafted = drawn.get(row.index), len(row.draft.tokens)
            kept = self._verified(row, found, position) if token is None else [token]
            self.step.cut(row.sequence, self.step.length(row.sequence) - drafted + len(kept) - 1)
            told.tokens[row.index] = self._take(row, kept, found, position)
            seen.append((row.draft.kind, drafted, len(kept) - 1))
            position += drafted + 1
        told.drafts = [(drafted, kept) for _, drafted, kept in seen if drafted]
        if self.drafter:
            self.length.saw(seen, self.now() - began, drafted_s)
        return told

    def _draft(self, active: list[Row]) -> float:
        """Gives each row as much of what the drafter proposes as pays, leaving room for the token that follows it.

        Returns how many seconds proposing took.
        """
        if self.drafter is None:
            return 0.0
        most = self.length.most if self.drafter.is_free else self.length.choose(0, len(active))
        rooms = [min(most, row.ask.max_new_tokens - len(row.answer.ids) - 1) for row in active]
        wanted = [Wanted(row.state, row.ids, room, row.source, row.ask.sampling) for row, room in zip(active, rooms, strict=True)]
        if any(rooms):
            self.drafter.catch_up(wanted)
        began = self.now()
        drafts = self.drafter.propose(wanted) if any(rooms) else [Draft()] * len(active)
        seconds = self.now() - began
        for row, proposed in zip(active, drafts, strict=True):
            count = len(proposed.tokens)
            if self.drafter.is_free and count:
                count = min(self.length.choose(proposed.kind, len(active)), count)
            row.draft = Draft(proposed.tokens[:count], proposed.proposed[:count], proposed.kind)
        return seconds

    def _needs_logits(self, ask: Ask) -> bool:
        return ask.sampling.temperature > 0 or ask.sampling.repetition_penalty != 1 or ask.keep_logprobs

    def _next(self, row: Row, found: Output, position: int, seen: Sequence[int] | None = None) -> int:
        sampling = row.ask.sampling
        if sampling.temperature == 0 and sampling.repetition_penalty == 1:
            return found.tokens[position]
        assert found.logits is not None
        seen = row.ids if seen is None else seen
        if sampling.temperature == 0:
            return int(penalised(found.logits[position], seen, sampling.repetition_penalty).argmax())
        return draw(probabilities(found.logits[position], sampling, seen), row.source)

    def _verified(self, row: Row, found: Output, position: int) -> list[int]:
        """The drafted tokens that are kept, and the one after them."""
        drafted = row.draft.tokens
        if row.ask.sampling.temperature == 0:
            kept: list[int] = []
            for index in range(len(drafted) + 1):
                token = self._next(row, found, position + index, [*row.ids, *kept])
                kept.append(token)
                if index == len(drafted) or token != drafted[index]:
                    break
            return kept
        assert found.logits is not None
        logits = found.logits

        def target(index: int) -> torch.Tensor:
            return probabilities(logits[position + index], row.ask.sampling, [*row.ids, *drafted[:index]])

        return accept(drafted, row.draft.proposed, target, row.source)

    def _take(self, row: Row, tokens: list[int], found: Output, position: int) -> int:
        """Adds tokens to the answer until it ends; how many it took."""
        for count, token in enumerate(tokens):
            if row.ask.keep_logprobs:
                assert found.logits is not None
                row.answer.logprobs.append(float(found.logits[position + count].log_softmax(-1)[token]))
            row.ids.append(token)
            row.answer.ids.append(token)
            row.answer.finish = self._finish(row)
            if row.answer.finish:
                return count + 1
        return len(tokens)

    def _finish(self, row: Row) -> Finish | None:
        answer, ask = row.answer, row.ask
        if answer.ids[-1] in ask.stop_tokens:
            return "token"
        if ask.stop_texts and ask.decode is not None:
            # A token spells a byte or more, so that a text which ends here began among the last of them.
            text = ask.decode(answer.ids[-(max(len(stop.encode()) for stop in ask.stop_texts) + MARGIN) :])
            if any(stop in text for stop in ask.stop_texts):
                return "text"
        return "length" if len(answer.ids) >= ask.max_new_tokens else None


def _goes_on(row: Row) -> bool:
    """Whether a plain step will follow the next, as far as can be known."""
    return not row.draft.tokens and len(row.answer.ids) + 1 < row.ask.max_new_tokens


def _drawn(found: Output, rows: Sequence[tuple[Row, int]]) -> dict[int, int]:
    """The next token of each row that draws it from nothing but its logits, at a position: all rows that draw alike together."""
    alike: dict[Sampling, list[tuple[Row, int]]] = {}
    for row, position in rows:
        sampling = row.ask.sampling
        if sampling.temperature > 0 and sampling.repetition_penalty == 1:
            alike.setdefault(sampling, []).append((row, position))
    tokens: dict[int, int] = {}
    for sampling, group in alike.items():
        assert found.logits is not None
        weights = probabilities(found.logits[[position for _, position in group]], sampling)
        drawn = draw_rows(weights, [row.source for row, _ in group])
        tokens |= {row.index: token for (row, _), token in zip(group, drawn, strict=True)}
    return tokens
