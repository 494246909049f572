from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from infopt.cli import app
from infopt.cli.export import _checked
from infopt.errors import Exit
from infopt.export.record import Export, LoadBackCheck


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
    assert lines[3] == (
        "loaded back in infopt, over transformers' GGUF reader: logits within 0 of what was written on 256 tokens "
        "(allowed 0.000100), 6 texts encoded alike"
    )
    # tiny's tokenizer has no merges; llama.cpp wants one, and transformers wants it to make a token.
    assert lines[4].startswith(f"warning: plain transformers {version('transformers')} does not read it: ")
    assert lines[5].startswith("against tiny: top-1 agreement 0.")
    assert "note: not checked in llama.cpp: make interop does" in lines
    assert lines[-1] == f"gguf q4_0: tiny-q4_0.gguf, {Path('tiny-q4_0.gguf').stat().st_size / 1e3:.1f} kB"


def test_json_is_one_document_that_reads_as_an_export() -> None:
    result = run("tiny", "--to", "gguf", "-o", "own.gguf", "--json")
    made = Export.model_validate(json.loads(result.stdout))
    assert (made.type, made.path, made.source) == ("q8_0", "own.gguf", "tiny")
    assert made.bytes == Path("own.gguf").stat().st_size
    assert result.stderr == ""


def test_int4_is_held_against_the_source_and_says_so() -> None:
    check = LoadBackCheck(
        reader="onnx", tokens=9, max_abs_logit_difference=0.2, top1_agreement=0.9, top1_floor=0.3, texts=4, texts_tried=6
    )
    assert _checked(check, is_source=True) == (
        "loaded back in onnx: logits within 0.200 of the source on 9 tokens (top-1 at least 0.300), 4 of 6 texts encoded alike"
    )


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
