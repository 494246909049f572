"""Distillation: a model learns to say what another one says."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from infopt.errors import InputError, RecipeError
from infopt.layers import passes
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Needs, Options, Technique

if TYPE_CHECKING:
    from collections.abc import Iterator

    from infopt.distil.gathering import Gathered, Wanted
    from infopt.distil.students import Weights
    from infopt.distil.teachers import Signals
    from infopt.model.bundle import Bundle

    P = TypeVar("P", Wanted, Signals)

#: Forward passes that a training step is worth: the student's, its backward pass of two, and as much again for logits and AdamW.
PASSES = 6
#: Bytes per trained weight beside the model: the float32 master, its gradient, two moments of Adam, the best so far.
HELD_BYTES = 5 * 4


class DistilOptions(Options):
    teacher: str | None = None
    data: str | None = None
    answers: Literal["rows", "teacher"] = "rows"
    samples: int = Field(default=1, ge=1, le=64)
    answer_temperature: float = Field(default=0.0, ge=0, le=5)
    answer_tokens: int = Field(default=128, ge=1)
    answer: str | None = None
    filter: bool = True
    logits: float = Field(default=1.0, ge=0)
    tokens: float = Field(default=0.0, ge=0)
    hidden: float = Field(default=0.0, ge=0)
    attention: float = Field(default=0.0, ge=0)
    rationale: float | None = Field(default=None, ge=0, le=1)
    prompts: float = Field(default=0.0, ge=0)
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    temperature: float = Field(default=1.0, gt=0, le=100)
    likeliest: int | None = Field(default=128, ge=1)
    train: Literal["all", "lora"] = "all"
    rank: int = Field(default=16, ge=1)
    epochs: int = Field(default=1, ge=1)
    batch: int = Field(default=4, ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=0.0002, gt=0)
    validation: float = Field(default=0.05, gt=0, lt=1)
    measure: Literal["loss", "agreement"] = "loss"
    patience: int = Field(default=10, ge=1)
    checkpoint_minutes: float = Field(default=5.0, gt=0)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if not self.logits + self.tokens + self.hidden + self.attention:
            raise ValueError("found logits, tokens, hidden and attention 0: nothing is learned; allowed: one of them above 0")
        try:
            re.compile(self.answer or "")
        except re.error as error:
            raise ValueError(f"found answer: {self.answer!r} ({error}); allowed: a pattern of Python's re") from None
        if self.samples > 1 and not self.answer_temperature:
            raise ValueError(
                f"found samples: {self.samples} at answer_temperature 0, all of them the same; allowed: 1, or above 0"
            )
        for name in ("samples", "answer_temperature", "answer_tokens"):
            if self.answers == "rows" and self.is_set(name):
                raise ValueError(f"found {name}: {getattr(self, name)} with answers: rows; allowed: answers: teacher")
        for name in ("samples", "answer", "rationale", "prompts", "filter"):
            if self.data is None and self.is_set(name):
                raise ValueError(f"found {name}: {getattr(self, name)} without data; calibration text has no rows with answers")
        if self.train == "all" and self.is_set("rank"):
            raise ValueError(f"found rank: {self.rank} with train: all; allowed: train: lora")
        return self


class Distil(Technique):
    """Trains the model, as the steps before have left it, to say what its teacher says.

    Hinton et al., arXiv 1503.02531: the loss is the divergence of both distributions over the next token; beside it, or instead,
    the tokens themselves (on answers that the teacher wrote: sequence-level, arXiv 1606.07947), hidden states and attention
    (TinyBERT, arXiv 1909.10351). Answers that come with their reasoning are learned with it (arXiv 2305.02301). Some examples
    validate; the weights kept are those of the best validation. The artifact's `distil.json` says what was learned from,
    what was thrown away and why; `distil.svg` shows the losses. Needs 20 bytes per weight beside the model. An interrupted run
    goes on from its last checkpoint with the same result.

    teacher             a model's reference with the same tokenizer; null (default): the model that the recipe started from.
    data                rows to learn from, a .jsonl file of texts, chats, or prompts (`infopt.data.lessons`); null (default): the
                        recipe's calibration text, all of whose tokens are learned. Of chats only the last answer is.
    answers             rows (default): the file's. teacher: the teacher writes an answer to every prompt; of calibration text it
                        reads the first quarter of every window, and goes on from there.
    samples             answers that the teacher draws for a prompt, 1 … 64, default 1. Of several, one of the majority is kept.
    answer_temperature  of the teacher's answers, 0 … 5, default 0.0: greedy.
    answer_tokens       longest answer, ≥ 1, default 128; one that has not ended by then is thrown away.
    answer              regular expression whose last match in an answer is what it says, for the majority and `rationale`;
                        default null: the whole text.
    filter              true (default): rows whose answer breaks their `expect` rules, has no end, no majority, or says nothing
                        are thrown away, as are contradictions and duplicates. false: none, to see what that does.
    logits              weight of the divergence, ≥ 0, default 1.0.
    tokens              weight of −log q of the tokens themselves, ≥ 0, default 0.0.
    hidden              weight of the hidden states' distance, ≥ 0, default 0.0. The teacher then runs in every step.
    attention           weight of the attention's divergence, ≥ 0, default 0.0. The teacher then runs in every step.
    rationale           share, 0 … 1, of what comes before the answer in an answer's loss, where a row has a `rationale`, or the
                        answer's expression leaves one; default null: each token counts the same.
    prompts             weight of each token of a prompt beside an answer's 1, ≥ 0, default 0.0: answers alone are learned. Some
                        hundredths give a student that has lost blocks its language back, on the task's own text.
    divergence          forward (default): KL(teacher ‖ student), covers all that the teacher says. reverse: keeps to what it says
                        most. jensen_shannon: between them.
    temperature         of both distributions, above 0, default 1.0.
    likeliest           tokens of the teacher's distribution that are kept, with the mass of all others, ≥ 1, default 128; it is
                        asked once, and its answers lie on the disk, 6 bytes each. null: all tokens, asked in every step.
    train               all (default): every weight. lora: adapters beside the linear layers, merged at the end.
    rank                of the adapters, ≥ 1, default 16.
    epochs              times that training goes over the examples, ≥ 1, default 1.
    batch               examples side by side, ≥ 1, default 4.
    accumulate          batches a step, ≥ 1, default 1.
    learning_rate       of AdamW at its highest, above 0, default 0.0002; rises over the first 5 % of the steps, then falls
                        linearly to zero.
    validation          share of the examples that validates, 0 … 1, default 0.05; none shares a prompt with those that train.
    measure             what validates: loss (default), that of training; agreement: share of tokens that are not the teacher's
                        likeliest, which is what speculation rejects.
    patience            validations, of ten in a run, without a better one, after which it ends, ≥ 1, default 10.
    checkpoint_minutes  between checkpoints, above 0, default 5.0.
    """

    Options = DistilOptions
    needs = Needs(calibration=True)
    options: DistilOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        modules = ("peft", "accelerate") if self.options.train == "lora" else ()
        self.needs = Needs(modules=modules, calibration=self.options.data is None)
        self.data = self.options.data
        o = self.options
        self.models = (o.teacher,) if o.teacher else ()
        is_taught = o.logits or o.hidden or o.attention or o.measure == "agreement" or o.answers == "teacher"
        self.holds_against_reference = bool(is_taught) and o.teacher is None

    def check(self, shapes: Shapes, path: str) -> None:
        from infopt.data.lessons import read_lessons

        o = self.options
        if o.data is not None:
            rows = read_lessons(Path(o.data))
            unanswered = next((row for row in rows if row.response is None and row.text is None), None)
            if o.answers == "rows" and unanswered:
                message = f"{unanswered.where} has no response; allowed: rows with one, or answers: teacher"
                raise RecipeError(f"{path}.data", message)
        elif o.answers == "teacher":
            opening = max(1, self.calibration_tokens // max(1, self.calibration_samples) // 4)
            if opening + o.answer_tokens > shapes.context:
                message = f"found {o.answer_tokens}, after {opening} tokens of text; the model's context allows {shapes.context}"
                raise RecipeError(f"{path}.answer_tokens", message)

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.distil import gathering, teachers
        from infopt.distil.training import Schedule, train

        if bundle.packed or bundle.save_config or getattr(bundle.model, "hf_quantizer", None) is not None:
            raise InputError("the model's weights are quantized already", hint="put distil before the step that quantizes")
        o, signals = self.options, self._part(teachers.Signals)
        if signals.has_teacher or o.answers == "teacher":
            teachers.require_same_tokens(bundle, context, o.teacher)
        learned = gathering.gather(self._part(gathering.Wanted), bundle, context)
        schedule = Schedule(o.learning_rate, o.accumulate, o.patience, 60 * o.checkpoint_minutes)
        # The teacher first: one that is asked once is gone before the student's weights become float32.
        with teachers.asking(signals, bundle, learned, context) as asked, self._trained(bundle.model, context.seed) as weights:
            batches = learned.batches(o.batch, o.epochs, context.seed)
            own = weights.beside(asked.projections)
            history = train(own, batches, asked.learn, asked.validate, schedule, context, "distil", learned.weight)
        context.progress(f"distil: best validation {history.best:.4g} at step {history.best_step}")
        return replace(bundle, files={**bundle.files, **self._report(learned, history)})

    def _part(self, kind: type[P]) -> P:
        """The options that one part of the work knows, by their names."""
        return kind(**{each.name: getattr(self.options, each.name) for each in fields(kind)})

    @contextmanager
    def _trained(self, model: Any, seed: int) -> Iterator[Weights]:
        import torch

        from infopt.distil import students

        o = self.options
        weights = students.all_weights(model) if o.train == "all" else students.low_rank(model, o.rank, seed)
        with torch.enable_grad(), weights as trained:
            yield trained

    def _report(self, learned: Gathered, history: Any) -> dict[str, str]:
        from infopt.calibrate.curve_plot import Curve, plot

        found = {
            "schema_version": 1,
            **learned.summary(),
            "measure": self.options.measure,
            "steps": history.steps,
            "best_step": history.best_step,
            "ended_early": history.ended_early,
            "losses": history.losses,
            "validations": history.validations,
        }
        curves = [Curve("training loss", history.losses), Curve(f"validation: {self.options.measure}", history.validations)]
        return {
            "distil.json": json.dumps(found, indent=1) + "\n",
            "distil.md": learned.described(),
            "distil.svg": plot("Loss as training goes on", [each for each in curves if each.points], "steps"),
        }

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        o = self.options
        tokens = self.calibration_tokens if o.data is None else Path(o.data).stat().st_size // 4
        trained = shapes.parameters
        if o.train == "lora":
            trained = sum(out + inner for out, inner in shapes.linear.values()) * o.rank
        peak = before.weights_bytes + HELD_BYTES * trained + before.weights_bytes  # and the teacher's
        rate = machine.read_bytes_per_s
        step = Prediction(before.weights_bytes, max(before.peak_bytes, peak), before.weights_bytes / rate if rate else None)
        # Training multiplies in bfloat16 where that is faster, whatever the model's dtype.
        fastest = replace(machine, flops=dict.fromkeys(machine.flops, max(machine.flops.values(), default=0.0)))
        return passes.add(step, before, shapes, (o.epochs + 1) * tokens, fastest, passes=PASSES, hessians=False)


TECHNIQUE = Distil
