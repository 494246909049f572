"""From text or rows to examples: answered, checked, told apart, split; and what was thrown away, with the reason."""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from infopt.data import prompts
from infopt.data.candidates import choose, said
from infopt.data.jsonl import short
from infopt.data.lessons import Lesson, read_lessons
from infopt.distil.examples import Example, batches, split
from infopt.errors import InputError
from infopt.protocols import Context, Request, Sampling

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

#: Prompts that a teacher answers side by side.
TOGETHER = 16
#: Rows of each reason that the report shows.
SHOWN = 3


class Wanted(Protocol):
    """The options of `distil` that say what is learned from."""

    @property
    def data(self) -> str | None: ...
    @property
    def teacher(self) -> str | None: ...
    @property
    def answers(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def answer_temperature(self) -> float: ...
    @property
    def answer_tokens(self) -> int: ...
    @property
    def answer(self) -> str | None: ...
    @property
    def filter(self) -> bool: ...
    @property
    def rationale(self) -> float | None: ...
    @property
    def validation(self) -> float: ...


@dataclass(frozen=True)
class Answered:
    """A row with an answer to learn. `votes`: what all samples said of it, where there were several."""

    lesson: Lesson
    response: str
    rationale: str | None = None
    has_ended: bool = True
    votes: tuple[str | None, ...] = ()


@dataclass
class Gathered:
    """`thrown`: by reason, the rows that were thrown away, as (where, what it said)."""

    source: str
    examples: list[Example]
    train: list[int]
    validation: list[int]
    rows: int
    thrown: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def batches(self, size: int, epochs: int, seed: int) -> list[list[int]]:
        chosen = [self.examples[index] for index in self.train]
        return [[self.train[index] for index in batch] for batch in batches(chosen, size, epochs, seed)]

    def summary(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "rows": self.rows,
            "examples": len(self.train),
            "tokens": sum(self.examples[index].positions for index in self.train),
            "validation_examples": len(self.validation),
            "thrown_away": {
                reason: {"rows": len(found), "shown": [{"row": where, "said": text} for where, text in found[:SHOWN]]}
                for reason, found in sorted(self.thrown.items())
            },
        }


def gather(wanted: Wanted, bundle: Bundle, context: Context) -> Gathered:
    """Raises InputError where too little is left to train and to validate on."""
    if wanted.data is None:
        examples = [Example.of_text(window) for window in context.calibration_ids]
        if wanted.answers == "teacher":
            examples = continued(context.calibration_ids, wanted, context)
        groups = [str(index) for index in range(len(examples))]
        thrown: dict[str, list[tuple[str, str]]] = {}
        source, rows = "calibration text", len(examples)
    else:
        lessons = read_lessons(Path(wanted.data))
        answered = write_answers(lessons, wanted, bundle, context) if wanted.answers == "teacher" else list(map(_own, lessons))
        kept, thrown = sift(answered) if wanted.filter else (answered, {})
        examples, groups = _encoded(kept, wanted, bundle, thrown)
        source, rows = wanted.data, len(lessons)
        context.progress(f"distil: {len(examples)} of {rows} rows to learn from")
    names = sorted(set(groups))
    if len(names) < 2:
        reasons = ", ".join(f"{len(found)} {reason}" for reason, found in thrown.items())
        away = f"; thrown away: {reasons}" if reasons else ""
        raise InputError(
            f"{source}: {len(names)} prompts or texts are left, of which one must validate{away}",
            hint="give more rows, or look at what was thrown away: filter: false",
        )
    _, held = split(len(names), wanted.validation, 1, context.seed)
    validating = {names[index] for index in held}
    train = [index for index, group in enumerate(groups) if group not in validating]
    validation = [index for index, group in enumerate(groups) if group in validating]
    return Gathered(source, examples, train, validation, rows, thrown)


def _own(lesson: Lesson) -> Answered:
    return Answered(lesson, lesson.text if lesson.response is None else lesson.response, lesson.rationale)  # type: ignore[arg-type]


def write_answers(lessons: Sequence[Lesson], wanted: Wanted, bundle: Bundle, context: Context) -> list[Answered]:
    """What the teacher answers to each prompt: of several samples the first of those that most say."""
    assert context.open_engine is not None
    sampling = Sampling(temperature=wanted.answer_temperature, candidates=wanted.samples)
    engine = context.open_engine(wanted.teacher, sampling)
    tokenizer, found = bundle.tokenizer, []
    asked = [lesson for lesson in lessons if lesson.prompt is not None]
    ends = set(tokenizer.all_special_ids)
    try:
        for start in range(0, len(asked), TOGETHER):
            context.progress(f"distil: the teacher answers {start + 1} … of {len(asked)} prompts")
            part = asked[start : start + TOGETHER]
            requests = [
                Request(str(number), prompts.encode(lesson.prompt, tokenizer), wanted.answer_tokens, False, context.seed + number)
                for number, lesson in enumerate(part, start=start)
                if lesson.prompt is not None
            ]
            rows = engine.generate(requests).output_ids
            for number, lesson in enumerate(part):
                own = rows[number * wanted.samples : (number + 1) * wanted.samples]
                said_all = [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in own]
                chosen = choose(said_all, "majority", answer=wanted.answer).index
                votes = tuple(said(text, wanted.answer) for text in said_all) if wanted.samples > 1 else ()
                rationale, response = apart(said_all[chosen], wanted.answer)
                found.append(Answered(lesson, response, rationale, bool(own[chosen]) and own[chosen][-1] in ends, votes))
    finally:
        engine.close()
    return found


def continued(windows: Sequence[Sequence[int]], wanted: Wanted, context: Context) -> list[Example]:
    """What the teacher makes of the first quarter of each window: its own words, of which those after the quarter are learned."""
    assert context.open_engine is not None
    engine = context.open_engine(wanted.teacher, Sampling(temperature=wanted.answer_temperature))
    examples = []
    try:
        for start in range(0, len(windows), TOGETHER):
            context.progress(f"distil: the teacher goes on from {start + 1} … of {len(windows)} windows")
            openings = [tuple(window[: max(1, len(window) // 4)]) for window in windows[start : start + TOGETHER]]
            requests = [
                Request(str(number), opening, wanted.answer_tokens, True, context.seed + number)
                for number, opening in enumerate(openings, start=start)
            ]
            said_all = engine.generate(requests).output_ids
            examples += [Example.of_answer(opening, found) for opening, found in zip(openings, said_all, strict=True)]
    finally:
        engine.close()
    return examples


def apart(text: str, answer: str | None) -> tuple[str | None, str]:
    """(what comes before the answer, the answer); (None, the text) where the expression does not match, or nothing does."""
    last = deque(re.finditer(answer, text), maxlen=1) if answer is not None else None
    if not last or not text[: last[0].start()].strip():
        return None, text
    return text[: last[0].start()], text[last[0].start() :]


def sift(answered: Iterable[Answered]) -> tuple[list[Answered], dict[str, list[tuple[str, str]]]]:
    """What is worth learning, and by reason what is not.

    The rules are those that answers are judged by. A prompt that has two answers in the file teaches neither.
    """
    kept: list[Answered] = []
    thrown: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for each in answered:
        reason = wrong(each)
        if reason is None:
            kept.append(each)
        else:
            thrown[reason].append((each.lesson.where, short(each.response)))
    by_prompt: dict[str, set[str | None]] = defaultdict(set)
    for each in kept:
        if each.lesson.prompt is not None:
            by_prompt[each.lesson.asked].add(said(each.response))
    left, seen = [], set()
    for each in kept:
        key = (each.lesson.asked, said(each.response))
        if len(by_prompt[each.lesson.asked]) > 1:
            thrown["contradiction"].append((each.lesson.where, short(each.response)))
        elif key in seen:
            thrown["duplicate"].append((each.lesson.where, short(each.response)))
        else:
            seen.add(key)
            left.append(each)
    return left, dict(thrown)


def wrong(each: Answered) -> str | None:
    """Why an answer is not to be learned; None where it is."""
    if not each.response.strip():
        return "says nothing"
    if not each.has_ended:
        return "has no end"
    rules = each.lesson.prompt.expect if each.lesson.prompt else None
    broken = rules.check(each.response, 0) if rules else ()
    if broken:
        return f"breaks {broken[0].rule}"
    if each.votes:
        most = Counter(each.votes).most_common(1)[0]
        if most[0] is None or 2 * most[1] <= len(each.votes):
            return "no majority"
    return None


def _encoded(
    kept: Sequence[Answered], wanted: Wanted, bundle: Bundle, thrown: dict[str, list[tuple[str, str]]]
) -> tuple[list[Example], list[str]]:
    """Examples with the prompt of each, by which they are split. What exceeds the model's context is thrown away."""
    config: Any = bundle.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    examples, groups = [], []
    for each in kept:
        made = encode(each, wanted.rationale, bundle)
        if len(made.ids) > context or not made.positions:
            thrown.setdefault("longer than the model's context", []).append((each.lesson.where, short(each.response)))
        else:
            examples.append(made)
            groups.append(each.lesson.asked)
    return examples, groups


def encode(each: Answered, share: float | None, bundle: Bundle) -> Example:
    """`share`: of the rationale in the loss; None counts every token alike."""
    tokenizer = bundle.tokenizer

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if each.lesson.prompt is None:
        return Example.of_text([*tokenizer(each.response, verbose=False)["input_ids"], *end])
    prompt = prompts.encode(each.lesson.prompt, tokenizer)
    answer = [*ids(each.response), *end]
    if each.rationale is None:
        return Example.of_answer(prompt, answer)
    reason = ids(each.rationale if each.rationale[-1:].isspace() else f"{each.rationale}\n")
    total = len(reason) + len(answer)
    weights = [1.0] * total
    if share is not None:
        weights = [share * total / len(reason)] * len(reason) + [(1 - share) * total / len(answer)] * len(answer)
    return Example.of_answer(prompt, [*reason, *answer], weights)
