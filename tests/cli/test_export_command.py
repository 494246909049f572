from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from infopt.cli import app
from infopt.errors import Exit
from infopt.export.record import Export


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["export", *arguments])


def test_the_report_says_what_was_stored_checked_and_lost() -> None:
    result = run("tiny", "--to", "gguf", "--type", "Q4_0")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:3] == ["Q8_0: 1 tensor", "Q4_0: 14 tensors", "F32: 5 tensors"]
    assert lines[3].startswith(
        "loaded back in transformers: logits within 0 of what was written on 256 tokens (allowed 0.000100)"
    )
    assert lines[3].endswith("texts encoded alike")
    assert lines[4].startswith("against tiny: top-1 agreement 0.")
    assert lines[-1] == f"gguf q4_0: tiny-q4_0.gguf, {Path('tiny-q4_0.gguf').stat().st_size / 1e3:.1f} kB"


def test_json_is_one_document_that_reads_as_an_export() -> None:
    result = run("tiny", "--to", "gguf", "-o", "own.gguf", "--json")
    made = Export.model_validate(json.loads(result.stdout))
    assert (made.type, made.path, made.source) == ("q8_0", "own.gguf", "tiny")
    assert made.bytes == Path("own.gguf").stat().st_size
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", "--to", "ggml"), "unknown format 'ggml'"),
        (("tiny", "--to", "gguf", "-t", "q3"), "unknown GGUF type 'q3'"),
        (("tiny-moe", "--to", "gguf"), "model type 'mixtral' cannot be exported to GGUF"),
        (("nowhere/", "--to", "gguf"), "nowhere/: no such file or folder"),
    ],
)
def test_what_is_refused_is_one_line_and_a_hint(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == Exit.USAGE
    assert result.stdout == ""
    error, hint = result.stderr.splitlines()
    assert message in error
    assert hint.startswith("hint: ")
    assert list(tmp_path.iterdir()) == []
