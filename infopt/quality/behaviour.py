"""Tier 2: what the candidate answers to the same prompts, next to the reference.

`run_prompts` lets an engine answer; everything else is arithmetic on answers that exist. A prompt with rules is *kept*
(both pass), *broken* (only the reference passes), *fixed* (only the candidate) or *both_fail*. Equal pass counts can hide
many of both, so broken and fixed are never netted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from infopt.data.candidates import Choice, choose
from infopt.data.expect import Failure, is_refusal
from infopt.data.prompts import Prompt, encode
from infopt.errors import InputError
from infopt.protocols import Engine, Progress, Request
from infopt.quality.values import figure_value
from infopt.result import Value
from infopt.sections import SamplingSection
from infopt.shares import mcnemar_p, share_interval

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Status = Literal["kept", "broken", "fixed", "both_fail"]
Margin = Callable[[Sequence[int], Sequence[int], int], float]
"""(prompt ids, the reference's output ids, position) → the reference's top-2 logit margin at that output position."""

FIGURES = ("behaviour.pass_share", "behaviour.broken_share", "behaviour.same_share")
REPEAT_LENGTH = 4
DEFAULT_MAX_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One of `sampling.candidates` answers to a prompt.

    `output_ids` ends before the end-of-text token; `text` has no special tokens.
    """

    output_ids: tuple[int, ...]
    text: str
    mean_logprob: float | None = None
    """Nats per token, the end-of-text token included; None where nobody asked for it, or the engine has none."""


@dataclass(frozen=True)
class Answer:
    """One prompt answered, by the row that `choice` names, or by the first where nothing chooses."""

    id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    text: str
    rows: tuple[Row, ...] = ()
    choice: Choice | None = None


@dataclass(frozen=True)
class Outcome:
    """One prompt, before and after. `status` is None for a prompt without rules."""

    id: str
    status: Status | None
    failures_reference: tuple[Failure, ...]
    failures: tuple[Failure, ...]
    divergence: int | None
    """Index of the first output token that differs, or at which only one has ended; None when all are the same."""
    divergence_margin: float | None
    """How sure the reference was there: its logit for its own token minus the next best. Small means a coin flip."""
    tokens_reference: int
    tokens: int


@dataclass(frozen=True)
class BehaviourResult:
    """Outcomes per prompt; shares derived from them are of all prompts unless said otherwise."""

    outcomes: tuple[Outcome, ...]
    repetition_reference: float | None
    repetition: float | None
    """Mean share of repeated 4-grams, over the answers that have one; None when none has."""
    refusals_reference: int
    refusals: int

    def count(self, status: Status) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def checked(self) -> int:
        """Prompts that have rules."""
        return sum(outcome.status is not None for outcome in self.outcomes)

    @property
    def same(self) -> int:
        """Prompts answered with the reference's exact tokens."""
        return sum(outcome.divergence is None for outcome in self.outcomes)

    @property
    def mcnemar_p(self) -> float:
        return mcnemar_p(self.count("broken"), self.count("fixed"))

    def figures(self) -> dict[str, Value]:
        counts = {
            "behaviour.pass_share": (self.count("kept") + self.count("fixed"), self.checked),
            "behaviour.broken_share": (self.count("broken"), self.checked),
            "behaviour.same_share": (self.same, len(self.outcomes)),
        }
        return dict(
            figure_value(key, interval.estimate, total, interval=interval)
            if (interval := share_interval(found, total) if total else None)
            else figure_value(key, None, 0, reason="no prompt has expect rules")
            for key, (found, total) in counts.items()
        )


def run_prompts(
    engine: Engine,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    default_max_tokens: int = DEFAULT_MAX_TOKENS,
    progress: Progress = lambda line: None,
    seed: int = 0,
    sampling: SamplingSection | None = None,
) -> list[Answer]:
    """Lets `engine` answer each prompt alone, so that no answer depends on its neighbours in a batch.

    `sampling`: how the engine's rows are chosen from. Raises InputError where what that needs is missing.
    """
    answers = []
    for number, prompt in enumerate(prompts, start=1):
        progress(f"behaviour: prompt {number} of {len(prompts)}")
        prompt_ids = encode(prompt, tokenizer)
        limit = answer_limit(prompt, default_max_tokens)
        trace = engine.generate([Request(prompt.id, prompt_ids, limit, ignore_eos=False, seed=seed)])
        levels = trace.mean_logprobs or (None,) * len(trace.output_ids)
        rows = tuple(_row(ids, level, tokenizer) for ids, level in zip(trace.output_ids, levels, strict=True))
        choice = _choice(prompt, rows, trace.mean_logprobs, sampling)
        taken = rows[choice.index if choice else 0]
        answers.append(Answer(prompt.id, prompt_ids, taken.output_ids, taken.text, rows, choice))
    return answers


def _row(ids: Sequence[int], mean_logprob: float | None, tokenizer: PreTrainedTokenizerBase) -> Row:
    kept, ends = list(ids), set(tokenizer.all_special_ids)
    while kept and kept[-1] in ends:
        kept.pop()
    return Row(tuple(kept), str(tokenizer.decode(kept, skip_special_tokens=True)), mean_logprob)


def _choice(
    prompt: Prompt, rows: Sequence[Row], levels: Sequence[float | None] | None, sampling: SamplingSection | None
) -> Choice | None:
    if sampling is None or sampling.choose is None:
        return None
    rules = prompt.expect
    return choose(
        [row.text for row in rows],
        sampling.choose,
        mean_logprobs=levels,
        answer=sampling.answer,
        passes=None if rules is None else lambda index: not rules.check(rows[index].text, len(rows[index].output_ids)),
    )


def answer_limit(prompt: Prompt, default_max_tokens: int = DEFAULT_MAX_TOKENS) -> int:
    """The row's own `max_tokens`, else the default, or one more than its rule allows, so that the rule can fail."""
    allowed = prompt.expect.max_tokens if prompt.expect else None
    return prompt.max_tokens or max(default_max_tokens, (allowed or 0) + 1)


def require_room(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, context_tokens: int) -> None:
    """Raises InputError for a prompt that with its answer exceeds the model's context."""
    for prompt in prompts:
        total = len(encode(prompt, tokenizer)) + answer_limit(prompt)
        if total > context_tokens:
            raise InputError(f"prompt {prompt.id!r} and its answer take {total} tokens; the model's context is {context_tokens}")


def compare_answers(
    prompts: Sequence[Prompt], reference: Sequence[Answer], candidate: Sequence[Answer], margin: Margin | None = None
) -> BehaviourResult:
    """What changed, prompt by prompt. `margin` is asked only where outputs diverge. Raises InputError for other prompts."""
    ids = [prompt.id for prompt in prompts]
    if not ids or [a.id for a in reference] != ids or [a.id for a in candidate] != ids:
        raise InputError("reference and candidate did not answer the same prompts", hint="run both on one prompts file")
    return BehaviourResult(
        outcomes=tuple(_outcome(*row, margin) for row in zip(prompts, reference, candidate, strict=True)),
        repetition_reference=_mean_repetition(reference),
        repetition=_mean_repetition(candidate),
        refusals_reference=sum(is_refusal(answer.text) for answer in reference),
        refusals=sum(is_refusal(answer.text) for answer in candidate),
    )


def retokenised(answers: Sequence[Answer], reference: Sequence[Answer], tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
    """Answers of a model with other tokens in those of the reference's `tokenizer`: the same text has the reference's own."""
    own = {answer.id: answer for answer in reference}
    return [
        replace(
            answer,
            output_ids=own[answer.id].output_ids
            if answer.id in own and own[answer.id].text == answer.text
            else tuple(tokenizer(answer.text, add_special_tokens=False, verbose=False)["input_ids"]),
        )
        for answer in answers
    ]


def first_divergence(reference: Sequence[int], candidate: Sequence[int]) -> int | None:
    """Index of the first difference; the shorter length where one continues the other; None for equal outputs."""
    if tuple(reference) == tuple(candidate):
        return None
    pairs = zip(reference, candidate, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(reference), len(candidate)))


def repetition(ids: Sequence[int], length: int = REPEAT_LENGTH) -> float | None:
    """Share of the n-grams that occurred before in the same output; None for an output without any n-gram."""
    grams = Counter(tuple(ids[i : i + length]) for i in range(len(ids) - length + 1))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else None


def top_two_margin(logits_of: Callable[[torch.Tensor], torch.Tensor]) -> Margin:
    """The `margin` that `compare_answers` asks for, from the reference as `[1, tokens] ids → [1, tokens, vocabulary]`."""

    def margin(prompt_ids: Sequence[int], output_ids: Sequence[int], position: int) -> float:
        import torch

        with torch.inference_mode():
            logits = logits_of(torch.tensor([[*prompt_ids, *output_ids[:position]]], dtype=torch.int64))
            best, second = logits[0, -1].float().topk(2).values.tolist()
        return float(best - second)

    return margin


def _outcome(prompt: Prompt, old: Answer, new: Answer, margin: Margin | None) -> Outcome:
    failures_old = prompt.expect.check(old.text, len(old.output_ids)) if prompt.expect else ()
    failures_new = prompt.expect.check(new.text, len(new.output_ids)) if prompt.expect else ()
    divergence = first_divergence(old.output_ids, new.output_ids)
    return Outcome(
        id=prompt.id,
        status=_status(not failures_old, not failures_new) if prompt.expect else None,
        failures_reference=failures_old,
        failures=failures_new,
        divergence=divergence,
        divergence_margin=None if margin is None or divergence is None else margin(old.prompt_ids, old.output_ids, divergence),
        tokens_reference=len(old.output_ids),
        tokens=len(new.output_ids),
    )


def _status(passed_before: bool, passes: bool) -> Status:
    if passed_before:
        return "kept" if passes else "broken"
    return "fixed" if passes else "both_fail"


def _mean_repetition(answers: Sequence[Answer]) -> float | None:
    shares = [share for answer in answers if (share := repetition(answer.output_ids)) is not None]
    return sum(shares) / len(shares) if shares else None
