"""An environment without a venv: its interpreter is this one, its worker a few lines of Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from infopt.backends import environments, work
from infopt.backends.environments import Environment

Worker = Callable[[str], Environment]


@dataclass(frozen=True)
class Here(Environment):
    """Uses the interpreter that the tests run in."""

    @property
    def interpreter(self) -> Path:
        return Path(sys.executable)


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where lock files are looked for."""
    folder = tmp_path / "locks"
    folder.mkdir()
    monkeypatch.setattr(environments, "LOCKS", folder)
    return folder


@pytest.fixture
def worker(tmp_path: Path, locks: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """`worker(body)`: an environment whose worker script does `body`; `job` is its open job."""

    def made(body: str) -> Environment:
        scripts = tmp_path / "scripts"
        scripts.mkdir()
        (scripts / "job.py").write_text((work.SCRIPTS / "job.py").read_text(encoding="utf-8"), encoding="utf-8")
        text = f"import os, sys, time\nfrom job import Job\njob = Job.open()\n{body}\n"
        (scripts / "fake_worker.py").write_text(text, encoding="utf-8")
        (locks / "fake.txt").write_text("fake==1.0\n", encoding="utf-8")
        monkeypatch.setattr(work, "SCRIPTS", scripts)
        return Here("fake", "made up", package="fake", proof="", bytes=0)

    return made
