"""The rules of `infopt data check` over the rows of several files: length, duplicates, contradictions, balance, leakage.

No rule depends on the order of rows, except for which of several equal ones is named first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

from infopt import units
from infopt.data import duplicates, rows
from infopt.data.calibration import HUB, Source
from infopt.data.jsonl import short
from infopt.data.overlap import RUN, Fingerprint, Piece, Share, Words, partners, quote, shares
from infopt.data.rows import DataFile, Row, plain
from infopt.data.texts import BUNDLED
from infopt.errors import InputError, unknown
from infopt.findings import RULES, Audit, FileSummary, Finding

MAX_CHARS = 50_000
REMARK_CHARS = 2_000_000
NEAR_WORDS = 8
"""Passages of plain text with fewer words, such as headings, may well occur twice."""
BALANCE_ROWS, BALANCE_LABELS, BALANCE_EXCESS = 20, 20, 0.25
BUNDLED_SETS = ("evaluation.txt", "hellaswag.jsonl", "openbookqa.jsonl", "prompts.jsonl")
"""What `--against bundled` stands for: everything that infopt judges by."""


@dataclass(frozen=True)
class Limits:
    """The longest row that is not worth a word. `max_tokens` needs `count`, tokens of a row; it raises InputError."""

    max_chars: int = MAX_CHARS
    max_tokens: int | None = None
    count: Callable[[Row], int] | None = None


def check(
    files: Sequence[Path], against: Sequence[str] = (), limits: Limits | None = None, ignored: Collection[str] = ()
) -> Audit:
    """What is wrong with `files`, and what they share with the files `against`, or infopt's own sets (`bundled`).

    `ignored`: rules to leave out. Raises InputError for a file that cannot be opened or is given twice, and unknown rules.
    """
    for rule in ignored:
        if rule not in RULES:
            raise InputError(f"--ignore: {unknown('rule', rule, RULES)}", hint="infopt data rules")
    _require_different([*map(str, files), *against])
    own = [rows.read(path) for path in files]
    others = [rows.read(path, name) for name, path in _sets(against)]
    found = [finding for file in [*own, *others] for finding in file.findings]
    checked = [row for file in own for row in file.rows]
    tokens, more = _lengths(checked, limits or Limits())
    found += more
    found += _duplicates(checked)
    found += _contradictions(checked, {file.file for file in own if _classes(file)})
    pieces = _pieces(checked)
    words = Words.of(pieces)
    taken = {(finding.file, finding.line) for finding in found}
    found += [each for each in _near(checked, words) if (each.file, each.line) not in taken]
    found += [each for file in own for each in _balance(file)]
    if others:
        found += _leaks(checked, pieces, words, [row for file in others for row in file.rows])
    places = {file.file: number for number, file in enumerate([*own, *others])}
    kept = sorted((each for each in found if each.rule not in ignored), key=lambda each: (places[each.file], each.line or 0))
    summaries = [_summary(file, kept, tokens, is_against=number >= len(own)) for number, file in enumerate([*own, *others])]
    return Audit(files=tuple(summaries), findings=tuple(kept))


def remark(source: Source) -> str | None:
    """How much of drawn calibration text is said more than once, in a line; None where nothing is, or it is infopt's own."""
    if source.name == "bundled":
        return None
    drawn = list(_drawn(source))
    again = _duplicates(drawn)
    taken = {finding.line for finding in again}
    near = [finding for finding in _near(drawn, Words.of(_pieces(drawn))) if finding.line not in taken]
    if not again and not near:
        return None
    advice = "" if source.name.startswith(HUB) else f" (infopt data check {source.name})"
    return f"calibration text: of {len(drawn)} rows, {len(again)} repeat others and {len(near)} nearly do{advice}"


def _drawn(source: Source) -> Iterator[Row]:
    """The rows of calibration text, numbered as they were drawn; the passages of a plain text. No more than can be told soon."""
    left = REMARK_CHARS
    if len(source.documents) == 1 and not source.documents[0].messages:
        yield from rows.passages(source.documents[0].text[:left], source.name)
        return
    for number, each in enumerate(source.documents, start=1):
        yield rows.of_chat(each.messages, source.name, number) if each.messages else rows.of_text(each.text, source.name, number)
        left -= sum(map(len, each.said))
        if left <= 0:
            return


def _require_different(names: Sequence[str]) -> None:
    seen: set[Path] = set()
    for name in names:
        path = Path(name).resolve()
        if path in seen:
            raise InputError(f"{name}: given twice", hint="a file is checked once, or against others")
        seen.add(path)


def _sets(against: Sequence[str]) -> list[tuple[str, Path]]:
    """(name in messages, path) of every file to compare with."""
    found: list[tuple[str, Path]] = []
    for name in against:
        is_bundled = name == "bundled" and not Path(name).exists()
        found += [(f"bundled/{each}", BUNDLED / each) for each in BUNDLED_SETS] if is_bundled else [(name, Path(name))]
    return found


def _finding(row: Row, rule: str, message: str, score: float = 0.0) -> Finding:
    return Finding(file=row.file, line=row.line, rule=rule, message=message, score=score)


def _lengths(found: Sequence[Row], limits: Limits) -> tuple[dict[str, list[int]], list[Finding]]:
    """Tokens of each file's rows, where they are counted, and what is too long."""
    tokens: dict[str, list[int]] = {}
    findings: list[Finding] = []
    for row in found:
        if len(row.text) > limits.max_chars:
            message = f"{len(row.text)} characters, more than {limits.max_chars}"
            findings.append(_finding(row, "over-long", message, len(row.text)))
        if limits.count is None:
            continue
        try:
            count = limits.count(row)
        except InputError as error:
            findings.append(_finding(row, "fields", str(error).removeprefix(f"{row.where}: ")))
            continue
        tokens.setdefault(row.file, []).append(count)
        if limits.max_tokens is not None and count > limits.max_tokens:
            findings.append(_finding(row, "over-tokens", f"{count} tokens, more than {limits.max_tokens}", count))
    return tokens, findings


def _place(row: Row, beside: Row) -> str:
    """Where `row` is, as told at `beside`."""
    return f"line {row.line}" if row.file == beside.file else row.where


def _duplicates(found: Sequence[Row]) -> list[Finding]:
    first: dict[str, Row] = {}
    findings = []
    for row in found:
        known = first.setdefault(row.key, row)
        if known is row:
            continue
        if row.format != "text":
            findings.append(_finding(row, "duplicate", f"says the same as {_place(known, row)}"))
        elif len(row.key.split()) >= NEAR_WORDS:
            findings.append(_finding(row, "repeated-passage", f"the same passage as {_place(known, row)}"))
    return findings


def _contradictions(found: Sequence[Row], labelled: Collection[str]) -> list[Finding]:
    """One finding an input, at the first row whose label differs from the first row's.

    Short answers of chats are labels in the files `labelled`, which give the same few again and again.
    """
    asked: dict[str, list[Row]] = {}
    for row in found:
        if row.asked is not None and row.label is not None:
            asked.setdefault(row.asked, []).append(row)
    findings = []
    for same in asked.values():
        by_label: dict[str, Row] = {}
        for row in same:
            by_label.setdefault(plain(row.label or ""), row)
        if len(by_label) < 2:
            continue
        first, other, *_ = by_label.values()
        is_label = all(row.format != "chats" or (row.answer_class and row.file in labelled) for row in by_label.values())
        shown = f": {short(other.label or '')} here, {short(first.label or '')} there" if is_label else ""
        more = f"; {len(by_label)} answers in {len(same)} rows" if len(same) > 2 else ""
        message = f"the same input as {_place(first, other)} with another answer{shown}{more}"
        findings.append(_finding(other, "contradiction" if is_label else "several-answers", message, len(same)))
    return findings


def _pieces(found: Sequence[Row]) -> list[Piece]:
    """Runs of words cross from one passage of a plain text to the next, and otherwise from no piece to another."""
    pieces: list[Piece] = []
    stretch = 0
    for number, row in enumerate(found):
        goes_on = row.format == "text" and number and found[number - 1].file == row.file
        for text in row.pieces:
            stretch += not goes_on
            pieces.append(Piece(number, stretch, text))
    return pieces


def _near(found: Sequence[Row], words: Words) -> list[Finding]:
    findings = []
    seen: dict[str, int] = {}
    is_copy = [seen.setdefault(row.key, number) != number for number, row in enumerate(found)]
    for group in duplicates.groups(words):
        distinct = [found[number] for number in group if not is_copy[number]]
        if distinct and distinct[0].format == "text":
            distinct = [row for row in distinct if len(row.key.split()) >= NEAR_WORDS]
        findings += [
            _finding(row, "near-duplicate", f"says nearly the same as {_place(distinct[0], row)}", len(distinct))
            for row in distinct[1:]
        ]
    return findings


def _classes(file: DataFile) -> Counter[str]:
    """Rows per short answer; empty where these are no classes, since nearly every row has another."""
    counts = Counter(row.answer_class for row in file.rows if row.answer_class is not None)
    return counts if len(counts) <= min(BALANCE_LABELS, counts.total() // 2) else Counter()


def _labels(file: DataFile) -> Counter[str]:
    """Rows per label; empty where fewer than half of the rows have one."""
    counts = _classes(file)
    return counts if counts.total() >= len(file.rows) / 2 else Counter()


def _balance(file: DataFile) -> list[Finding]:
    counts = _labels(file)
    total = counts.total()
    if total < BALANCE_ROWS:
        return []
    label, most = counts.most_common(1)[0]
    even = 1 / max(len(counts), *(row.options for row in file.rows))
    if most / total - even <= BALANCE_EXCESS:
        return []
    share = f"{units.percent(most / total)}; evenly it would be {units.percent(even)}"
    message = f"{short(label)} is the answer of {most} of {total} rows ({share})"
    return [Finding(file=file.file, line=None, rule="imbalance", message=message)]


def _leaks(own: Sequence[Row], pieces: Sequence[Piece], words: Words, others: Sequence[Row]) -> list[Finding]:
    """Each row that shares a passage with the other set, and where the most of it is there.

    That is a row that is found there, and one that a row of the other set is found in.
    """
    other_pieces = _pieces(others)
    other_words = Words.of(other_pieces)
    found = shares(words, Fingerprint.whole(other_words), other_words)
    back = {share.row: share for share in shares(other_words, Fingerprint.whole(words), words)}
    beside = partners(words, other_words, found)
    findings = {}
    for share in found:
        row, other, returned = own[share.row], others[beside[share.row]], back.get(beside[share.row])
        worst = share.found / share.judged + (returned.found / returned.judged if returned else 0)
        findings[share.row] = _finding(row, "leakage", _leak(pieces[share.piece], row, share, other, returned), worst)
    for there, here in partners(other_words, words, back.values()).items():
        if here not in findings and others[there].format != "text":
            text = short(other_pieces[back[there].piece].text, 80)
            findings[here] = _finding(own[here], "leakage", f"{others[there].where} is in it: {text}", 1.0)
    return list(findings.values())


def _leak(piece: Piece, row: Row, share: Share, other: Row, back: Share | None) -> str:
    text = short(quote(piece.text, share.first, share.length), 80)
    if share.length < RUN:
        return f"{'its question' if piece.text != row.pieces[0] else 'all of it'} is in {other.where}: {text}"
    there = f"; {units.percent(back.found / back.judged)} of that row is here" if back else ""
    return f"shares {share.found} of its {share.judged} runs of {RUN} words with {other.where}{there}: {text}"


def _summary(file: DataFile, findings: Sequence[Finding], tokens: dict[str, list[int]], *, is_against: bool) -> FileSummary:
    lengths = sorted(len(row.text) for row in file.rows)
    counted = tokens.get(file.file, [])
    own = [finding for finding in findings if finding.file == file.file]
    return FileSummary(
        file=file.file,
        format=file.format,
        rows=len(file.rows),
        chars_median=median_low(lengths) if lengths else None,
        chars_max=lengths[-1] if lengths else None,
        tokens_total=sum(counted) if counted else None,
        tokens_max=max(counted, default=None),
        labels=dict(_labels(file).most_common()),
        errors=sum(finding.level == "error" for finding in own),
        notes=sum(finding.level == "note" for finding in own),
        is_against=is_against,
    )
