"""What a terminal gets, and what a pipe does: colour, width, questions."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

INFOPT = Path(sys.executable).with_name("infopt")
EXAMPLE = Path(__file__).parents[2] / "results" / "examples" / "demo"
COMMANDS = {
    "results": ("results", "show", str(EXAMPLE)),
    "recipes": ("recipes", "list"),
    "error": ("recipes", "show", "gone"),
}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def on_a_terminal(*arguments: str) -> str:
    """Everything that the command writes when stdout and stderr are a terminal."""
    outer, inner = pty.openpty()
    process = subprocess.Popen([INFOPT, *arguments], stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    found = b""
    try:
        while chunk := os.read(outer, 65536):
            found += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(outer)
    process.wait()
    return found.decode()


def in_a_pipe(*arguments: str) -> str:
    done = subprocess.run(
        [INFOPT, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout


def test_tables_are_styled_on_a_terminal_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in on_a_terminal(*COMMANDS["results"])
    monkeypatch.setenv("NO_COLOR", "1")
    for arguments in COMMANDS.values():
        found = on_a_terminal(*arguments)
        assert found
        assert "\x1b" not in found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_gets_plain_text(command: str) -> None:
    found = in_a_pipe(*COMMANDS[command])
    assert found
    assert "\x1b" not in found


@pytest.mark.parametrize(
    ("columns", "allowed"), [("90", range(91)), ("", range(91, 121)), ("wide", range(91, 121)), ("0", range(91, 121))]
)
def test_a_pipe_is_as_wide_as_columns_says_or_120(monkeypatch: pytest.MonkeyPatch, columns: str, allowed: range) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    found = in_a_pipe(*COMMANDS["results"])
    assert "Traceback" not in found
    assert max(map(len, found.splitlines())) in allowed


def test_nobody_there_to_ask_is_a_no(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").touch()
    said = in_a_pipe("results", "rm", str(tmp_path))
    assert said.splitlines() == ["error: nobody is there to confirm the removal", "hint: add --yes"]
    assert (tmp_path / "samples.jsonl").is_file()
    said = in_a_pipe("models", "rm", "tiny")
    assert said.splitlines()[-2:] == ["error: tiny: kept", "hint: --yes removes without asking"]
