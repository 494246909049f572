"""What every command shares: how errors end it, how progress shows, the options that mean the same everywhere."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from infopt.errors import Exit, InfoptError, InputError, Terminated

if TYPE_CHECKING:
    from rich.console import Console

    from infopt.comparison import Comparison
    from infopt.protocols import Progress
    from infopt.result import Run


class Shell(TyperGroup):
    """The root group: deliberate errors become one line, a hint and an exit code, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with terminable():
                return super().invoke(ctx)
        except InfoptError as error:
            fail(str(error), "; ".join([*filter(None, [error.hint]), *_notes(error)]))
            raise typer.Exit(int(error.exit_code)) from None
        except KeyboardInterrupt as error:
            terminated = isinstance(error, Terminated)
            is_measuring = ctx.invoked_subcommand in ("bench", "compare", "demo")
            hint = "what was measured before is in the results folder, marked incomplete" if is_measuring else None
            fail("terminated" if terminated else "interrupted", "; ".join(_notes(error)) or hint)
            raise typer.Exit(int(Exit.TERMINATED if terminated else Exit.INTERRUPTED)) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader left, as `| head` does
            raise typer.Exit(int(Exit.FAILED)) from None
        except OSError as error:
            if error.strerror is None:
                raise
            hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another file or folder"
            fail(f"{error.filename or 'writing'}: {error.strerror}", hint)
            raise typer.Exit(int(Exit.FAILED)) from None


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that nothing half-written stays and nothing measured is lost."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way up: how to go on."""
    return list(getattr(error, "__notes__", ()))


def fail(message: str, hint: str | None = None) -> None:
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from infopt import __version__

        typer.echo(f"infopt {__version__}")
        raise typer.Exit


def version(
    show: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@contextmanager
def reporting(quiet: bool, verbose: bool) -> Iterator[Progress]:
    """Progress on stderr: one moving line on a terminal, a line each with -v, nothing with -q or in a pipe."""
    if quiet and verbose:
        raise InputError("--verbose has no effect beside --quiet", hint="leave one of them out")
    if quiet:
        yield lambda line: None
        return
    if verbose or not sys.stderr.isatty():
        yield (lambda line: typer.echo(line, err=True)) if verbose else (lambda line: None)
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda line: status.update(line.replace("[", r"\["))


def agreed(question: str) -> bool:
    """Whether the user says yes; nobody there to ask is a no."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        typer.echo(err=True)
        return False


def console() -> Console:
    """Where tables go: stdout. NO_COLOR drops bold and dim text too; CI and pipes get plain text 120 columns wide."""
    from rich.console import Console

    if not sys.stdout.isatty():
        columns = os.environ.get("COLUMNS", "")
        return Console(width=int(columns) if columns.isdecimal() and int(columns) else 120)
    return Console(color_system=None if os.environ.get("NO_COLOR") else "auto")


def tell_github(found: Run | Comparison, folder: Path | None) -> None:
    """The step summary and outputs, where a workflow asks for them; one that cannot be written costs no verdict."""
    from infopt.report.github import write

    try:
        write(found, folder)
    except OSError as error:
        typer.echo(f"warning: {error.filename}: {error.strerror}; the workflow's summary lacks this result", err=True)


Recipe = Annotated[str | None, typer.Option("--recipe", "-r", help="A recipe file, or a shipped recipe's name.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one key: steps.0.nf4.double_quant=true")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DType = Annotated[str | None, typer.Option(help="Override engine.dtype: float32, bfloat16, float16 or auto.")]
Threads = Annotated[int | None, typer.Option(min=1, max=os.cpu_count(), help="CPU threads; part of the machine's fingerprint.")]
Seed = Annotated[int, typer.Option(help="Seed of prompts, order and calibration.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model's authors ship.")]
AllowLeakage = Annotated[
    bool, typer.Option("--allow-leakage", help="Judge on what calibration has seen, and say so, instead of refusing.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A line per step of progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Exactly one JSON document on stdout.")]
Results = Annotated[Path, typer.Option("--results", help="Folder that results are written to.")]
