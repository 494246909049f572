"""A child process in a group of its own: its lines as they come, and no part of it outlives the call."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_GRACE_S = 5.0
_LAST_LINES = 3
_LAST_CHARACTERS = 500


def stream(command: Sequence[str], on_line: Callable[[str], None], log: Path, environment: Mapping[str, str]) -> int:
    """Runs `command` and returns its exit code, negative after a signal. stdout goes line by line to `on_line`, and with
    stderr into `log`. Ctrl-C, or any exception, ends the whole process group.

    The child's stdin is a pipe that says nothing and closes when this process ends, even by SIGKILL. There is no time limit:
    calibration takes hours, and how many nobody knows beforehand; whoever waits sees its lines, and has Ctrl-C.
    """
    with log.open("ab") as written:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=written,
            env=dict(environment),
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                written.write(line.encode())
                written.flush()
                on_line(line.rstrip())
            return process.wait()
        finally:
            _end_group(process)
            process.stdin.close()
            process.stdout.close()


def plain_environment(*dropped: str, **changes: str) -> dict[str, str]:
    """This process's environment variables without `dropped`, and those that would change how another interpreter finds
    its packages, and a script what lies beside it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON") and key not in dropped}
    kept.pop("VIRTUAL_ENV", None)
    return {**kept, "PYTHONNOUSERSITE": "1", **changes}


def last_words(log: Path, start: int = 0) -> str:
    """The last lines of `log` from byte `start` on that say something, on one line: no traceback frames, no warnings."""
    lines = log.read_bytes()[start:].decode(errors="replace").replace("\r", "\n").splitlines()
    told = [line for line in lines if line.strip() and not line.startswith((" ", "\t", "WARNING", "[notice]", "Traceback"))]
    return " | ".join(told[-_LAST_LINES:])[-_LAST_CHARACTERS:] or "it said nothing"


def how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (out of memory?)"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ends whatever is left of the group: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_S)
            if number == signal.SIGKILL or not _group_runs(process.pid):
                return


def _group_runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
