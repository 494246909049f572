"""Every error infopt raises on purpose, and the exit code each one ends the command with.

    InfoptError                       1  the tool or the run failed
    ├── InputError                    2  refused before work starts: a bad flag, file, model or prompt
    │   ├── RecipeError               2  a recipe that does not say what it should
    │   ├── DivergedError             2  training ran into a number that is none, and would again
    │   └── MissingNeedError          2  this machine lacks what the recipe needs (see `infopt doctor`)
    ├── LoadBackError                 1  a saved artifact does not reload as what was saved
    ├── WorkerError                   1  a measuring process died or answered nonsense
    ├── DiskFullError                 1  no space left while writing
    └── NotComparableError            5  two stored runs differ in machine or method, or a baseline is missing

A message says what was found and what is allowed; the hint says what to type next.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """Process exit codes; CI scripts rely on them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    GATE_FAILED = 3
    INCONCLUSIVE = 4
    NOT_COMPARABLE = 5
    INTERRUPTED = 130
    TERMINATED = 143


class InfoptError(Exception):
    """Base of all deliberate errors. `str(error)` is one line; `error.hint` is the next thing to do."""

    exit_code: Exit = Exit.FAILED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(" ".join(message.splitlines()))
        self.hint = hint


class InputError(InfoptError):
    exit_code = Exit.USAGE


class RecipeError(InputError):
    """`path` is where in the recipe, e.g. `steps[1].gptq.bits`; it opens the message."""

    def __init__(self, path: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"{path}: {message}" if path else message, hint=hint)
        self.path = path


class DivergedError(InputError):
    pass


class MissingNeedError(InputError):
    pass


class LoadBackError(InfoptError):
    pass


class WorkerError(InfoptError):
    pass


class DiskFullError(InfoptError):
    pass


class NotComparableError(InfoptError):
    exit_code = Exit.NOT_COMPARABLE


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread, so that it unwinds as Ctrl-C does."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None when nothing is close (difflib ratio 0.6)."""
    matches = difflib.get_close_matches(word, sorted(known), n=1)
    return matches[0] if matches else None


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """One sentence for an unknown name: what it was, the nearest known one, or else the whole list."""
    names = sorted(known)
    close = nearest(word, names)
    if close:
        return f"unknown {what} {word!r}; did you mean {close!r}?"
    return f"unknown {what} {word!r}; known: {', '.join(names)}"


def shown(value: Any) -> str:
    """A value out of a file, as a message quotes it: as JSON where it is that, shortened."""
    if value is None:
        return "nothing"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def first_line(error: BaseException) -> str:
    """Of a library's message, which may be a page, or empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
