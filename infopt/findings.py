"""What `infopt data check` finds, as data: the rules by their ids, findings with file and line, and the summary."""

from __future__ import annotations

from typing import Literal, NamedTuple

from infopt.result import Record

Level = Literal["error", "note"]


class Rule(NamedTuple):
    level: Level
    about: str


RULES: dict[str, Rule] = {
    "empty": Rule("error", "a file without text, or a row whose text is blank"),
    "encoding": Rule("error", "a binary file, a line that is not UTF-8, or half a surrogate pair in a JSON string"),
    "json": Rule("error", "a line that is not one JSON object (RFC 8259: no NaN), or that gives a key twice"),
    "fields": Rule("error", "a field that is missing, unknown or of the wrong type, or an id used twice"),
    "format": Rule("error", "a row of another format than most of its file, or JSON in a file that is not named .jsonl"),
    "duplicate": Rule("error", "a row of a JSONL file that says the same as an earlier one, case and punctuation aside"),
    "contradiction": Rule("error", "an input seen before with another label: a class, a choice, an expected or a usual answer"),
    "leakage": Rule("error", "a row that shares a run of 13 words, or a question, with a set that it must not (--against)"),
    "over-tokens": Rule("error", "a row of more tokens than the model's context, or --max-tokens (with --model)"),
    "near-duplicate": Rule("note", "rows of 14 words or more that differ in one word, or one in 27 (80 % of runs of 3 words)"),
    "repeated-passage": Rule("note", "a passage of plain text that occurs twice"),
    "several-answers": Rule("note", "an input seen before with another answer, where answers are no labels"),
    "over-long": Rule("note", "a row of more characters than --max-chars"),
    "imbalance": Rule("note", "always giving the most frequent label beats guessing by more than 25 percentage points"),
    "mojibake": Rule("note", "replacement characters (U+FFFD): the text was decoded wrongly before"),
}  # fmt: skip


class Finding(Record):
    """`line` None: the file as a whole. `score`: what ranks findings of one rule, worst first."""

    file: str
    line: int | None
    rule: str
    message: str
    score: float = 0.0

    @property
    def level(self) -> Level:
        return RULES[self.rule].level

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.rule}: {self.message}"


class FileSummary(Record):
    """`rows` could be read. `tokens_max` and `tokens_total` are None without a model; `labels`: rows per label, most frequent
    first, where the file has labels."""

    file: str
    format: str
    rows: int
    chars_median: int | None
    chars_max: int | None
    tokens_total: int | None = None
    tokens_max: int | None = None
    labels: dict[str, int]
    errors: int = 0
    notes: int = 0
    is_against: bool = False
    """Compared with: of itself only rows that could not be read are findings."""


class Audit(Record):
    schema_version: Literal[1] = 1
    files: tuple[FileSummary, ...]
    findings: tuple[Finding, ...]
    """In the order of files and lines."""

    def failed(self, is_strict: bool) -> bool:
        return any(is_strict or finding.level == "error" for finding in self.findings)

    def by_rule(self) -> dict[str, int]:
        """Findings per rule that has any, in the order of RULES."""
        counts = {rule: sum(finding.rule == rule for finding in self.findings) for rule in RULES}
        return {rule: count for rule, count in counts.items() if count}
