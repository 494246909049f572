"""A worker process as its parent sees it: JSON commands in, JSON events out, nothing shared but that.

Each arm lives in a process of its own (`python -m infopt.worker`), so that memory, threads and caches of one never touch
the figures of another. Torch-free.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import IO, Any

from infopt import errors
from infopt.errors import InfoptError, RecipeError, WorkerError
from infopt.protocols import Progress

Event = dict[str, Any]
_CLOSE_S = 10.0
_DOCTOR = "infopt doctor"


class WorkerProcess:
    """`call` sends one command and returns its answer; events on the way go to `on_event`, lines to `progress`."""

    module = "infopt.worker"

    def __init__(self, name: str, threads: int | None = None, progress: Progress = lambda line: None) -> None:
        self.name = name
        self._progress = progress
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=worker_environment(threads),
            text=True,
            encoding="utf-8",
            errors="replace",
        )

    def call(self, command: str, on_event: Callable[[Event], None] = lambda event: None, **arguments: Any) -> Any:
        """Raises the worker's own InfoptError, or WorkerError when it died or broke."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        for line in self._process.stdout:
            event = self._read(line)
            kind = event.pop("event")
            if kind == "answer":
                return event["value"]
            if kind == "error":
                raise self._error(event)
            if kind == "progress":
                self._progress(event["line"])
            else:
                on_event({"event": kind, **event})
        raise self._died()

    def close(self) -> None:
        """Ends the process: politely, then not."""
        if self._process.stdin and not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._end()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.kill()
        self.close()

    def _read(self, line: str) -> Event:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or "event" not in event:
            self.kill()
            raise WorkerError(f"{self.name}: the measuring process said {line.strip()[:80]!r}, which is no event", hint=_DOCTOR)
        return event

    def _error(self, event: Event) -> InfoptError:
        kind = getattr(errors, event["kind"], WorkerError)
        if kind is RecipeError:
            return RecipeError("", event["message"], hint=event["hint"])  # the place opens the message already
        found: InfoptError = kind(event["message"], hint=event["hint"])
        return found

    def _died(self) -> WorkerError:
        code = self._end()
        if code == -signal.SIGKILL:
            return WorkerError(
                f"{self.name}: the measuring process was killed (out of memory?)", hint="infopt optimize --dry-run"
            )
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return WorkerError(f"{self.name}: the measuring process {how}: {self._last_words()}", hint=_DOCTOR)

    def _end(self) -> int:
        """Waits for the process, not for ever; its exit code, negative after a signal."""
        try:
            return self._process.wait(timeout=_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


def worker_environment(threads: int | None) -> dict[str, str]:
    """Thread counts that every library honours; libraries keep quiet on stderr."""
    environment = dict(os.environ)
    if threads is not None:
        environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return environment | {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
    }
