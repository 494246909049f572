"""`infopt data check` and `data rules`, as a linter: lines, summary, exit codes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from infopt.cli import app
from infopt.errors import Exit
from infopt.findings import RULES, Audit

FIXTURES = Path(__file__).parent / "data_check"
ALL = ("train.jsonl", "items.jsonl", "notes.txt", "--against", "eval.jsonl")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _beside_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FIXTURES)
    monkeypatch.delenv("COLUMNS", raising=False)


def test_the_report_looks_as_it_should() -> None:
    """INFOPT_UPDATE_GOLDEN=1 writes it anew."""
    done = run("check", *ALL)
    golden = FIXTURES / "expected.txt"
    if os.environ.get("INFOPT_UPDATE_GOLDEN") == "1":
        golden.write_text(done.stdout, encoding="utf-8")
    assert done.stdout == golden.read_text(encoding="utf-8")
    assert done.exit_code == Exit.FAILED
    assert done.stderr == ""


def test_json_holds_every_finding() -> None:
    done = run("check", *ALL, "--json", "--limit", "1")
    found = Audit.model_validate_json(done.stdout)
    lines = (FIXTURES / "expected.txt").read_text(encoding="utf-8").splitlines()
    assert [str(finding) for finding in found.findings] == [line for line in lines if re.match(r"[\w.]+(:\d+)?: ", line)]
    assert done.exit_code == Exit.FAILED


def test_a_limit_keeps_the_worst_and_counts_the_rest() -> None:
    done = run("check", "train.jsonl", "--against", "eval.jsonl", "--limit", "1")
    assert "train.jsonl:12: leakage" in done.stdout, "line 5 holds less of the other row"
    assert "train.jsonl:5: leakage" not in done.stdout
    assert "more of leakage (--limit)" in done.stdout


def test_exit_codes(tmp_path: Path) -> None:
    sound, noted = tmp_path / "sound.jsonl", tmp_path / "noted.jsonl"
    sound.write_text('{"text": "one"}\n', encoding="utf-8")
    noted.write_text('{"text": "one \ufffd"}\n', encoding="utf-8")
    assert run("check", sound, "--strict").exit_code == Exit.OK
    assert run("check", noted).exit_code == Exit.OK
    assert run("check", noted, "--strict").exit_code == Exit.FAILED
    assert run("check", noted, "--strict", "--ignore", "mojibake").exit_code == Exit.OK
    for arguments in (("gone.jsonl",), (sound, "--ignore", "nonsense"), (sound, "--max-tokens", 5), (sound, "-a", sound)):
        done = run("check", *arguments)
        assert done.exit_code == Exit.USAGE, arguments
        assert done.stderr.startswith("error: ")
        assert "hint: " in done.stderr


def test_a_model_counts_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 3000}) + "\n" + json.dumps({"text": "y" * 30}), encoding="utf-8")
    done = run("check", path, "--model", "tiny")
    assert f"{path}:1: over-tokens: 3000 tokens, more than 2048" in done.stdout
    assert done.exit_code == Exit.FAILED
    assert run("check", path, "--model", "tiny", "--max-tokens", 3000).exit_code == Exit.OK
    assert run("check", path, "--model", "nonsense").exit_code == Exit.USAGE


def test_every_rule_is_documented() -> None:
    text = run("rules").stdout
    found = json.loads(run("rules", "--json").stdout)["rules"]
    assert [row["rule"] for row in found] == list(RULES)
    assert all(row["rule"] in text and row["level"] in ("error", "note") and row["about"] for row in found)
