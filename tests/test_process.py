"""A worker process from its parent's side: answers, events, errors, and every way to die."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from infopt import process
from infopt.errors import Exit, InputError, LoadBackError, MissingNeedError, RecipeError, WorkerError
from infopt.process import WorkerProcess, worker_environment

#: A worker in a few lines: what it does with a command is the command itself.
ECHO = """
import json, os, signal, sys, time
for line in sys.stdin:
    command = json.loads(line)
    exec(command["code"], {"emit": lambda **event: print(json.dumps(event), flush=True), "value": command.get("value"),
                           "os": os, "signal": signal, "sys": sys, "time": time})
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "echo_worker.py").write_text(ECHO, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(WorkerProcess, "module", "echo_worker")
    monkeypatch.setattr(process, "_CLOSE_S", 2.0)
    lines: list[str] = []
    with WorkerProcess("arm", progress=lines.append) as found:
        found.lines = lines  # type: ignore[attr-defined]
        yield found


def test_an_answer_comes_back_with_what_was_sent(worker: WorkerProcess) -> None:
    sent = {"text": "größer ‖ kleiner", "numbers": [1, 2.5, None]}
    assert worker.call("x", code="emit(event='answer', value=value)", value=sent) == sent
    assert worker.call("x", code="emit(event='answer', value=None)") is None


def test_progress_and_events_come_on_the_way(worker: Any) -> None:
    events: list[dict[str, Any]] = []
    code = (
        "emit(event='progress', line='half'); emit(event='sample', n=1); emit(event='sample', n=2); emit(event='answer', value=3)"
    )
    assert worker.call("x", events.append, code=code) == 3
    assert worker.lines == ["half"]
    assert events == [{"event": "sample", "n": 1}, {"event": "sample", "n": 2}]


@pytest.mark.parametrize("kind", [InputError, MissingNeedError, LoadBackError, WorkerError])
def test_an_error_arrives_as_what_it_was(worker: WorkerProcess, kind: type[Exception]) -> None:
    code = f"emit(event='error', kind={kind.__name__!r}, message='no', hint='do')"
    with pytest.raises(kind, match=r"^no$") as caught:
        worker.call("x", code=code)
    assert type(caught.value) is kind
    assert caught.value.hint == "do"  # type: ignore[attr-defined]
    assert worker.call("x", code="emit(event='answer', value=1)") == 1, "the worker goes on"


def test_an_error_with_a_constructor_of_its_own_arrives_too(worker: WorkerProcess) -> None:
    code = "emit(event='error', kind='RecipeError', message='steps[0]: no', hint=None)"
    with pytest.raises(RecipeError, match=r"^steps\[0\]: no$") as caught:
        worker.call("x", code=code)
    assert caught.value.exit_code is Exit.USAGE


def test_an_unknown_error_is_the_workers(worker: WorkerProcess) -> None:
    with pytest.raises(WorkerError, match="no"):
        worker.call("x", code="emit(event='error', kind='NoSuchError', message='no', hint=None)")


def test_killed_is_said_to_be_memory(worker: WorkerProcess) -> None:
    with pytest.raises(WorkerError, match=r"^arm: the measuring process was killed \(out of memory\?\)$") as caught:
        worker.call("x", code="os.kill(os.getpid(), signal.SIGKILL)")
    assert caught.value.hint == "infopt optimize --dry-run"


def test_another_signal_has_its_name(worker: WorkerProcess) -> None:
    with pytest.raises(WorkerError, match="was ended by SIGTERM: it said nothing"):
        worker.call("x", code="os.kill(os.getpid(), signal.SIGTERM)")


def test_a_crash_is_told_with_its_last_words(worker: WorkerProcess) -> None:
    with pytest.raises(WorkerError, match=r"ended with code 1: ZeroDivisionError: division by zero"):
        worker.call("x", code="1/0")
    with pytest.raises(WorkerError, match="ended with code 1"):
        worker.call("x", code="emit(event='answer', value=1)")


@pytest.mark.parametrize(
    "code",
    [
        "print('Loading: 100 %', flush=True)",
        "print('{\"event\": ', flush=True)",
        "print('[1]', flush=True)",
        "print('3', flush=True)",
        "print('{}', flush=True)",
        "os.write(1, bytes([255, 254, 10]))",
    ],
)
def test_nonsense_ends_the_worker_in_one_line(worker: WorkerProcess, code: str) -> None:
    with pytest.raises(WorkerError, match="which is no event") as caught:
        worker.call("x", code=code)
    assert len(str(caught.value)) < 200
    with pytest.raises(WorkerError, match="was killed"):
        worker.call("x", code="emit(event='answer', value=1)")


def test_a_worker_that_hangs_up_without_leaving_is_killed(worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_CLOSE_S", 0.2)
    with pytest.raises(WorkerError, match="was killed"):
        worker.call("x", code="os.close(1); time.sleep(60)")


def test_closing_waits_for_the_worker_and_then_does_not(worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_CLOSE_S", 0.2)
    worker._process.stdin.write(json.dumps({"code": "time.sleep(60)"}) + "\n")  # type: ignore[union-attr]
    worker.close()
    assert worker._process.returncode == -9
    worker.close()


def test_a_worker_ends_by_itself_when_its_parent_is_done(tmp_path: Path, worker: WorkerProcess) -> None:
    worker.call("x", code="emit(event='answer', value=1)")
    worker.close()
    assert worker._process.returncode == 0


def test_leaving_with_an_error_kills_at_once(worker: WorkerProcess) -> None:
    with pytest.raises(KeyboardInterrupt), WorkerProcess("second") as second:
        raise KeyboardInterrupt
    assert second._process.returncode == -9


def test_threads_reach_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = worker_environment(3)
    assert [found[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")] == ["3"] * 3
    assert worker_environment(None)["OMP_NUM_THREADS"] == "7"
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_the_parent_needs_no_torch() -> None:
    import subprocess

    code = "import sys, infopt.process; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
