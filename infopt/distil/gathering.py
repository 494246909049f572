"""From text or rows to examples: answered, checked, told apart, split; and what was thrown away, with the reason."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.data import prompts
from infopt.data.candidates import answer_in, choose, last_match, said
from infopt.data.jsonl import short
from infopt.data.lessons import Lesson, read_lessons
from infopt.distil.examples import Example, batches, split
from infopt.distil.spelling import Spelling
from infopt.errors import InputError
from infopt.model.atomic import writing
from infopt.protocols import Context, Request, Sampling
from infopt.result import write_atomic
from infopt.settings import portable

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

#: Prompts that a teacher answers side by side.
TOGETHER = 16
#: Rows of each reason that the report shows.
SHOWN = 3

Thrown = dict[str, list[tuple[str, str]]]
"""By reason, the rows that were thrown away, as (where, what it said)."""


@dataclass(frozen=True)
class Wanted:
    """What is learned from: the options of `distil` of these names."""

    data: str | None = None
    teacher: str | None = None
    answers: str = "rows"
    samples: int = 1
    answer_temperature: float = 0.0
    answer_tokens: int = 128
    answer: str | None = None
    filter: bool = True
    rationale: float | None = None
    prompts: float = 0.0
    validation: float = 0.05


@dataclass(frozen=True)
class Answered:
    """A row with all that is answered: `reason` characters that say why, and what it `says`, by which it is judged: the text
    behind these, or what the answer's expression finds. `ids`: the tokens with their end, where a model wrote them. `votes`: what
    all samples said, where there were several."""

    lesson: Lesson
    text: str
    says: str
    reason: int = 0
    ids: tuple[int, ...] = ()
    has_ended: bool = True
    votes: tuple[str | None, ...] = ()


@dataclass
class Gathered:
    """`rows`: as many as there were; `examples` are those that are left, by number in `train` or `validation`."""

    source: str
    examples: list[Example]
    train: list[int]
    validation: list[int]
    rows: int
    thrown: Thrown = field(default_factory=dict)

    def batches(self, size: int, epochs: int, seed: int) -> list[list[int]]:
        chosen = [self.examples[index] for index in self.train]
        return [[self.train[index] for index in batch] for batch in batches(chosen, size, epochs, seed)]

    def weight(self, indices: Iterable[int]) -> float:
        """How much there is to learn in some examples."""
        return sum(sum(self.examples[index].weights) for index in indices)

    def summary(self) -> dict[str, Any]:
        return {
            "source": portable(self.source),
            "rows": self.rows,
            "examples": len(self.train),
            "tokens": sum(self.examples[index].positions for index in self.train),
            "validation_examples": len(self.validation),
            "thrown_away": {
                reason: {"rows": len(found), "shown": [{"row": self._place(at), "said": text} for at, text in found[:SHOWN]]}
                for reason, found in sorted(self.thrown.items())
            },
        }

    def _place(self, row: str) -> str:
        """Without folders of this machine, since artifacts travel."""
        return row.replace(self.source, portable(self.source))

    def described(self) -> str:
        """The same for people, in Markdown."""
        found = self.summary()
        learned = f"{found['examples']} examples ({found['tokens']} tokens), {found['validation_examples']} more validate"
        lines = [f"Learned from `{found['source']}`, {self.rows} rows: {learned}.", ""]
        if self.thrown:
            lines += ["| thrown away | rows | one of them |", "|---|---:|---|"]
            lines += [
                f"| {reason} | {len(rows)} | {self._place(rows[0][0])}: {rows[0][1].replace('|', chr(92) + '|')} |"
                for reason, rows in sorted(self.thrown.items())
            ]
        return "\n".join([*lines, ""])


def gather(wanted: Wanted, bundle: Bundle, context: Context) -> Gathered:
    """Raises InputError where too little is left to train and to validate on.

    What a teacher wrote is kept with `context.unfinished`, so that a run that goes on learns the very same.
    """
    kept = context.unfinished / "gathered.json" if context.unfinished and wanted.answers == "teacher" else None
    if kept and kept.is_file():
        read = json.loads(kept.read_text(encoding="utf-8"))
        examples = [Example(tuple(each["ids"]), tuple(each["weights"])) for each in read.pop("examples")]
        return Gathered(examples=examples, **read)
    thrown: Thrown = {}
    if wanted.data is None:
        source, rows = "calibration text", len(context.calibration_ids)
        examples = (
            continued(wanted, context) if wanted.answers == "teacher" else list(map(Example.of_text, context.calibration_ids))
        )
        groups = [str(index) for index in range(len(examples))]
    else:
        lessons = read_lessons(Path(wanted.data))
        source, rows = wanted.data, len(lessons)
        examples, groups = _of_rows(lessons, wanted, bundle, context, thrown)
        context.progress(f"distil: {len(examples)} of {rows} rows to learn from")
    found = _divided(source, examples, groups, rows, thrown, wanted.validation, context.seed)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(asdict(found)))
    return found


def _divided(
    source: str, examples: list[Example], groups: list[str], rows: int, thrown: Thrown, share: float, seed: int
) -> Gathered:
    """Split by what was asked, so that nothing validates what it trains. Raises InputError."""
    names = sorted(set(groups))
    if len(names) < 2:
        away = f"; thrown away: {', '.join(f'{len(found)} {reason}' for reason, found in thrown.items())}" if thrown else ""
        raise InputError(
            f"{source}: {len(names)} prompts or texts are left, of which one must validate{away}",
            hint="give more rows, or look at what was thrown away: filter: false",
        )
    _, held = split(len(names), share, 1, seed)
    validating = {names[index] for index in held}
    train = [index for index, group in enumerate(groups) if group not in validating]
    validation = [index for index, group in enumerate(groups) if group in validating]
    return Gathered(source, examples, train, validation, rows, thrown)


def _of_rows(
    lessons: Sequence[Lesson], wanted: Wanted, bundle: Bundle, context: Context, thrown: Thrown
) -> tuple[list[Example], list[str]]:
    """Examples with the prompt of each, by which they are split."""
    spelling = Spelling.of(bundle)
    fitting = []
    for lesson in lessons:
        if lesson.prompt is not None and len(prompts.encode(lesson.prompt, bundle.tokenizer)) >= spelling.context:
            thrown.setdefault("longer than the model's context", []).append((lesson.where, short(lesson.asked)))
        elif lesson.prompt is None and wanted.answers == "teacher":
            thrown.setdefault("asks nothing", []).append((lesson.where, short(lesson.asked)))
        else:
            fitting.append(lesson)
    if wanted.answers == "teacher":
        answered = write_answers(fitting, wanted, spelling, context)
    else:
        answered = [_own(lesson, wanted.answer) for lesson in fitting]
    if wanted.filter:
        answered = sift(answered, spelling, thrown)
    examples, groups = [], []
    for each in answered:
        made = spelling.example(each.lesson, each.text, each.ids, each.reason, wanted.rationale, wanted.prompts)
        if len(made.ids) > spelling.context:
            thrown.setdefault("longer than the model's context", []).append((each.lesson.where, short(each.text)))
        elif not made.positions:
            thrown.setdefault("nothing to predict", []).append((each.lesson.where, short(each.text)))
        else:
            examples.append(made)
            asked = made.ids if each.lesson.prompt is None else prompts.encode(each.lesson.prompt, bundle.tokenizer)
            groups.append(str(bundle.tokenizer.decode(list(asked))))
    return examples, alike(groups, wanted.validation)


def alike(texts: Sequence[str], share: float) -> list[str]:
    """A name for each, the same for those that differ in case and space, or nearly say the same (`infopt.data.duplicates`).

    More of one kind than the `share` that validates are forms that were filled in: they are told apart all the same.
    """
    from infopt.data.duplicates import groups
    from infopt.data.overlap import Piece, Words

    names = [key(text) for text in texts]
    for group in groups(Words.of(Piece(row, row, text) for row, text in enumerate(texts))) if texts else []:
        if len(group) <= max(2, share * len(texts)):
            for row in group[1:]:
                names[row] = names[group[0]]
    return names


def key(text: str) -> str:
    """The same for texts that differ in case and space alone."""
    return "".join(text.split()).casefold()


def _own(lesson: Lesson, answer: str | None) -> Answered:
    if lesson.response is None:
        return Answered(lesson, lesson.text or "", lesson.text or "")
    if lesson.rationale is not None:
        before = lesson.rationale if lesson.rationale[-1:].isspace() else f"{lesson.rationale}\n"
        return Answered(lesson, before + lesson.response, lesson.response, len(before))
    return Answered(lesson, lesson.response, answer_in(lesson.response, answer), reason_in(lesson.response, answer))


def write_answers(lessons: Sequence[Lesson], wanted: Wanted, spelling: Spelling, context: Context) -> list[Answered]:
    """What the teacher answers to each prompt: of several samples the first of those that most say."""
    asked = [(lesson, lesson.prompt) for lesson in lessons if lesson.prompt is not None]
    requests = [
        Request(
            str(number), ids := prompts.encode(prompt, spelling.tokenizer),
            min(prompt.max_tokens or wanted.answer_tokens, spelling.context - len(ids)), False, context.seed + number,
        )
        for number, (_, prompt) in enumerate(asked)
    ]  # fmt: skip
    rows = _said(requests, wanted, context, "prompts")
    found = []
    for number, (lesson, _) in enumerate(asked):
        own = rows[number * wanted.samples : (number + 1) * wanted.samples]
        texts = [str(spelling.tokenizer.decode(spelling.without_end(ids), skip_special_tokens=True)) for ids in own]
        chosen = choose(texts, "majority", answer=wanted.answer).index
        votes = tuple(said(text, wanted.answer) for text in texts) if wanted.samples > 1 else ()
        text, ids = texts[chosen], own[chosen]
        says, reason = answer_in(text, wanted.answer), reason_in(text, wanted.answer)
        found.append(Answered(lesson, text, says, reason, ids, bool(ids) and ids[-1] in spelling.ends, votes))
    return found


def continued(wanted: Wanted, context: Context) -> list[Example]:
    """What the teacher makes of the first quarter of each window: its own words, of which those after the quarter are learned."""
    openings = [tuple(window[: max(1, len(window) // 4)]) for window in context.calibration_ids]
    requests = [
        Request(str(number), opening, wanted.answer_tokens, True, context.seed + number)
        for number, opening in enumerate(openings)
    ]
    said_all = _said(requests, wanted, context, "windows")
    return [Example.of_answer(opening, found) for opening, found in zip(openings, said_all, strict=True)]


def _said(requests: Sequence[Request], wanted: Wanted, context: Context, what: str) -> list[tuple[int, ...]]:
    """The teacher's rows, request after request. They are kept as they come, and a run that goes on asks for the others."""
    assert context.open_engine is not None
    kept = context.unfinished / "answers.jsonl" if context.unfinished else None
    found = _whole_lines(kept) if kept else []
    engine = context.open_engine(wanted.teacher, Sampling(temperature=wanted.answer_temperature, candidates=wanted.samples))
    try:
        for start in range(len(found) * TOGETHER, len(requests), TOGETHER):
            context.progress(f"distil: the teacher answers {start + 1} … of {len(requests)} {what}")
            found.append([list(ids) for ids in engine.generate(requests[start : start + TOGETHER]).output_ids])
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with writing(kept.parent), kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    finally:
        engine.close()
    return [tuple(ids) for rows in found for ids in rows]


def _whole_lines(path: Path) -> list[list[list[int]]]:
    """What each line holds; a last one that was not written to its end is taken off the file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        write_atomic(path, "".join(whole))
    return [json.loads(line) for line in whole]


def reason_in(text: str, answer: str | None) -> int:
    """Characters before what the answer's expression finds last; 0 where it finds nothing, or nothing is before it."""
    last = last_match(text, answer) if answer is not None else None
    return last.start() if last and text[: last.start()].strip() else 0


def sift(answered: Iterable[Answered], spelling: Spelling, thrown: Thrown) -> list[Answered]:
    """What is worth learning; what is not goes into `thrown`, by reason.

    The rules are those that answers are judged by. A prompt that has two answers in the file teaches neither.
    """

    def throw(reason: str, each: Answered) -> None:
        thrown.setdefault(reason, []).append((each.lesson.where, short(each.text)))

    kept: list[Answered] = []
    for each in answered:
        reason = wrong(each, spelling)
        if reason is None:
            kept.append(each)
        else:
            throw(reason, each)
    by_prompt: dict[str, set[str | None]] = defaultdict(set)
    for each in kept:
        if each.lesson.prompt is not None:
            by_prompt[key(each.lesson.asked)].add(said(each.says))
    left, seen = [], set()
    for each in kept:
        asked = key(each.lesson.asked)
        if len(by_prompt[asked]) > 1:
            throw("contradiction", each)
        elif (asked, said(each.says)) in seen:
            throw("duplicate", each)
        else:
            seen.add((asked, said(each.says)))
            left.append(each)
    return left


def wrong(each: Answered, spelling: Spelling) -> str | None:
    """Why an answer is not to be learned; None where it is. Rules see what it says, without the reasons for it."""
    if not each.text.strip():
        return "says nothing"
    if not each.has_ended:
        return "has no end"
    if not each.says.strip():
        return "has no answer"
    rules = each.lesson.prompt.expect if each.lesson.prompt else None
    if rules:
        is_whole = each.says == each.text
        count = len(spelling.without_end(each.ids) if each.ids and is_whole else spelling.ids(each.says))
        broken = rules.check(each.says, count)
        if broken:
            return f"breaks {broken[0].rule}"
    if each.votes:
        most = Counter(each.votes).most_common(1)[0]
        if most[0] is None or 2 * most[1] <= len(each.votes):
            return "no majority"
    return None
