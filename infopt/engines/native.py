"""The native engine: infopt's own loop over whole steps in C++, or over transformers' modules with our linear layers.

Every row of a call is a sequence of its own, so requests need not be equally long. Drafts are verified in the same step as
plain tokens are made, and their length follows what they were seen to bring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from infopt.errors import InputError
from infopt.protocols import Request, Sampling, Trace

if TYPE_CHECKING:
    from infopt.runtime.drafts import Drafter
    from infopt.runtime.loop import Answer, Ask, Told
    from infopt.runtime.native_model import NativeModel


class NativeEngine:
    """`model` comes from `pipeline.open_arm` under `engine: {name: native}`.

    `draft`: what proposes tokens: prompt_lookup, self, the name of one of `model.drafts`, auto for whichever of `among` is
    fastest in a short trial on the first prompts, or None. `draft_tokens`: how many at most, None for as many as pay.
    `draft_layers`: those that `self` drafts with, None for a quarter. Raises InputError for settings that do not go together.
    """

    name = "native"
    notes: tuple[str, ...]

    def __init__(
        self,
        model: NativeModel,
        *,
        pad_token_id: int | None = None,
        sampling: Sampling | None = None,
        cache: str = "dynamic",
        prefix: bool = False,
        draft: str | None = None,
        draft_tokens: int | None = None,
        draft_layers: int | None = None,
        among: Sequence[str] = (),
        compile: str = "never",
        notes: tuple[str, ...] = (),
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        from infopt.runtime.draft_length import DraftLength
        from infopt.runtime.loop import Loop

        self.model, self.sampling = model, sampling or Sampling()
        _check(self.sampling, cache, prefix, compile)
        eos: Any = model.generation_config.eos_token_id
        self._ends = frozenset(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])
        self._draft, self._now = draft, now
        self._most = draft_tokens or MOST_DRAFTED
        self.notes = notes
        self._drafters: dict[str, Drafter] = {}
        for name in among if draft == "auto" else [draft] if draft else []:
            try:
                self._drafters[name] = self._drafter(name, draft_layers)
            except InputError as error:
                if draft != "auto":
                    raise
                self.notes = (*self.notes, f"draft {name} was not tried: {error}")
        length = DraftLength(most=self._most, is_fixed=draft_tokens is not None)
        self._loop = Loop(model.step, self._drafters[draft] if draft and draft != "auto" else None, length, now)
        self._is_chosen, self._has_remarked = draft != "auto", False

    def generate(self, requests: Sequence[Request]) -> Trace:
        """Answers the requests. Rows come in request order, each request's `sampling.candidates` rows together."""
        from infopt.runtime.loop import Ask

        if not requests:
            raise InputError("no requests; a batch needs at least 1")
        asks = [
            Ask(
                request.prompt_ids, request.max_new_tokens, self.sampling, request.seed,
                frozenset() if request.ignore_eos else self._ends, keep_logprobs=self.sampling.choose is not None,
            )
            for request in requests
        ]  # fmt: skip
        if not self._is_chosen:
            self._choose(asks)
        told: list[Told] = []
        answers = self._loop.run(asks, lambda each, _: told.append(each))
        if not self._has_remarked and self.model.step.remarks:
            self.notes, self._has_remarked = (*self.notes, *self.model.step.remarks), True
        return _trace(told, answers, drafts=self._loop.drafter is not None)

    def close(self) -> None:
        """Gives the model up."""
        del self._loop, self._drafters, self.model

    def _drafter(self, name: str, layers: int | None) -> Drafter:
        from infopt.runtime.drafts import ModelDraft, PromptLookup

        if name == "prompt_lookup":
            return PromptLookup()
        if name == "self":
            return ModelDraft(self.model.early(layers))
        return ModelDraft(self.model.drafts[name], self.model.step.vocabulary)

    def _choose(self, asks: Sequence[Ask]) -> None:
        """Once, on the prompts of the first call that has something to try."""
        from infopt.runtime import draft_choice
        from infopt.runtime.loop import Loop

        chosen = draft_choice.choose(self.model.step, self._drafters, self._most, asks, self._now)
        if chosen is None:
            return  # the next call may tell
        best, said = chosen
        self._loop = Loop(self.model.step, best.drafter, best.length, self._now)
        self.notes, self._is_chosen = (*self.notes, said), True


ENGINE = NativeEngine
#: Tokens that are drafted at most where their number follows what they bring.
MOST_DRAFTED = 12


def _check(sampling: Sampling, cache: str, prefix: bool, compile: str) -> None:
    if cache == "static":
        raise InputError(
            "the native engine keeps keys and values in pages; nothing is reserved", hint="engine: {name: transformers}"
        )
    if sampling.candidates > 1 and sampling.temperature <= 0:
        raise InputError(
            f"{sampling.candidates} candidates at temperature {sampling.temperature}; greedy decoding has exactly 1",
            hint="raise sampling.temperature above 0",
        )
    if prefix:
        raise InputError("the native engine keeps no prefix between requests yet", hint="engine: {name: transformers}")
    if compile != "never":
        raise InputError("the native engine compiles nothing while it runs", hint="engine: {compile: never}")


def _trace(told: list[Told], answers: list[Answer], *, drafts: bool) -> Trace:
    """A step counts what the rows that it served got on average: they may accept different numbers of drafted tokens."""
    counts = [_typical([tokens for tokens in each.tokens if tokens]) for each in told]
    made = [draft for each in told for draft in each.drafts]
    longest = max((drafted for drafted, _ in made), default=0)
    return Trace(
        output_ids=tuple(tuple(answer.ids) for answer in answers),
        emission_s=tuple(each.seconds for each in told),
        emission_tokens=tuple(counts),
        prefill_s=told[0].seconds if told else None,
        drafted=sum(drafted for drafted, _ in made) if drafts else None,
        accepted=sum(kept for _, kept in made) if drafts else None,
        accepted_at=tuple(_accepted_at(made, position) for position in range(longest)) if drafts else None,
        mean_logprobs=tuple(answer.mean_logprob for answer in answers) if any(answer.logprobs for answer in answers) else None,
    )


def _typical(tokens: list[int]) -> int:
    return round(sum(tokens) / len(tokens)) if tokens else 1


def _accepted_at(drafts: list[tuple[int, int]], position: int) -> tuple[int, int]:
    """Drafts that reached so far, and those of them that were kept so far."""
    return sum(drafted > position for drafted, _ in drafts), sum(kept > position for _, kept in drafts)
