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
    from infopt.runtime.loop import Answer, Told
    from infopt.runtime.native_model import NativeModel


class NativeEngine:
    """`model` comes from `pipeline.open_arm` under `engine: {name: native}`.

    `draft`: what proposes tokens: prompt_lookup, or None; `draft_tokens`: how many at most, None for as many as pay.
    Raises InputError for settings that do not go together.
    """

    name = "native"

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
        compile: str = "never",
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        from infopt.runtime.draft_length import DraftLength
        from infopt.runtime.loop import Loop

        self.model, self.sampling = model, sampling or Sampling()
        _check(self.sampling, prefix, compile)
        eos: Any = model.generation_config.eos_token_id
        self._ends = frozenset(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])
        self._draft = draft
        length = DraftLength(most=draft_tokens or MOST_DRAFTED, is_fixed=draft_tokens is not None)
        self._loop = Loop(model.step, self._drafter if draft else None, length, now)

    def generate(self, requests: Sequence[Request]) -> Trace:
        """Answers the requests. Rows come in request order, each request's `sampling.candidates` rows together."""
        from infopt.runtime.loop import Ask

        if not requests:
            raise InputError("no requests; a batch needs at least 1")
        asks = [
            Ask(
                request.prompt_ids, request.max_new_tokens, self.sampling, request.seed,
                frozenset() if request.ignore_eos else self._ends,
            )
            for request in requests
        ]  # fmt: skip
        told: list[Told] = []
        answers = self._loop.run(asks, lambda each, _: told.append(each))
        return _trace(told, answers, drafts=self._draft is not None)

    def close(self) -> None:
        """Gives the model up."""
        del self._loop, self.model

    def _drafter(self) -> Drafter:
        from infopt.runtime.drafts import PromptLookup

        return PromptLookup()


ENGINE = NativeEngine
#: Tokens that are drafted at most where their number follows what they bring.
MOST_DRAFTED = 12


def _check(sampling: Sampling, prefix: bool, compile: str) -> None:
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
    if len(answers) > 1 and any(len(set(each.tokens)) > 1 for each in told if 0 not in each.tokens):
        # Rows that accept different numbers of drafted tokens: a step counts what its slowest row got.
        counts = [max(1, min(each.tokens)) for each in told]
    else:
        counts = [max(each.tokens) for each in told]
    return Trace(
        output_ids=tuple(tuple(answer.ids) for answer in answers),
        emission_s=tuple(each.seconds for each in told),
        emission_tokens=tuple(counts),
        prefill_s=told[0].seconds if told else None,
        drafted=sum(each.drafted for each in told) if drafts else None,
        accepted=sum(each.accepted for each in told) if drafts else None,
    )
