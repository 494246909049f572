"""`infopt results`: half-written folders are named, nothing that is no result is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infopt import results
from infopt.cli.results import app
from infopt.comparison import Comparison, read_comparison
from infopt.errors import InfoptError, InputError
from infopt.result import Run, dump


@pytest.fixture
def folder(tmp_path: Path, comparison: Comparison, run: Run) -> Path:
    """One of each: a comparison, a run, an incomplete run, two half-written folders, a broken one, and no result at all."""
    root = tmp_path / "results"
    for name, file, text in (
        (comparison.id, "compare.json", dump(comparison)),
        (run.id, "run.json", dump(run)),
        (
            "20261122T110000Z-cut",
            "run.json",
            dump(run.model_copy(update={"is_complete": False, "incomplete_reason": "interrupted"})),
        ),
        ("20261122T120000Z-half", "samples.jsonl", ""),
        ("20261122T130000Z-pair/arms/int8", "samples.jsonl", ""),
        ("20261122T140000Z-torn", "run.json", '{"schema_version": 1, "id"'),
        ("notes", "todo.txt", "buy milk"),
        ("examples/20261122T150000Z-x", "samples.jsonl", ""),
    ):
        (root / name).mkdir(parents=True)
        (root / name / file).write_text(text, encoding="utf-8")
    return root


def invoke(*words: str) -> str:
    outcome = CliRunner().invoke(app, list(words))
    if outcome.exception is not None:
        raise outcome.exception
    return outcome.output


def test_list_names_every_state(folder: Path) -> None:
    states = {entry.folder.name.split("-", 1)[-1]: entry.status for entry in results.entries(folder)}
    assert states == {
        "demo-9c1d": "complete", "int8-77aa": "complete", "cut": "incomplete", "half": "half-written", "pair": "half-written",
        "torn": "unreadable",
    }  # fmt: skip
    lines = invoke("list", str(folder)).splitlines()
    assert len(lines) == 6
    assert lines[0].endswith("int8: demo on transformers, 128 prompt tokens + 64 new tokens, batch 1, TPOT 64.1 ms")
    assert "half-written: samples but no run.json" in lines[3]
    assert "half-written: samples but no compare.json" in lines[4]
    assert "incomplete: interrupted" in lines[2]


def test_list_as_json_is_one_document(folder: Path) -> None:
    found = json.loads(invoke("list", str(folder), "--json"))
    assert found["schema_version"] == 1
    assert [entry["kind"] for entry in found["results"]] == ["run", "comparison", "run", None, None, "run"]


def test_list_without_results(tmp_path: Path) -> None:
    assert "no results yet" in invoke("list", str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        invoke("list", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["20261122T120000Z-half", "20261122T130000Z-pair"])
def test_a_half_written_folder_is_refused_in_one_line_with_a_hint(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="half-written, samples but no") as caught:
        invoke("show", str(folder / name))
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "message"), [("20261122T140000Z-torn", "broken JSON"), ("notes", "holds no result"), ("nowhere", "no such folder")]
)
def test_show_refuses_what_is_no_result(folder: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        invoke("show", str(folder / name))


def test_show_takes_a_folder_or_its_document(folder: Path, comparison: Comparison, run: Run) -> None:
    assert "FAIL: int8" in invoke("show", str(folder / comparison.id))
    assert json.loads(invoke("show", str(folder / comparison.id / "compare.json"), "--json"))["id"] == comparison.id
    assert "ttft_s" in invoke("show", str(folder / run.id))
    assert "incomplete: interrupted" in invoke("show", str(folder / "20261122T110000Z-cut"))


def test_export_to_stdout_file_and_folder(folder: Path, comparison: Comparison, tmp_path: Path) -> None:
    source = str(folder / comparison.id)
    text = invoke("export", source, "--to", "junit")
    assert text.startswith("<?xml")
    file = tmp_path / "out" / "report.xml"
    assert invoke("export", source, "--to", "junit", "-o", str(file)).strip() == str(file)
    assert file.read_text(encoding="utf-8") == text
    target = tmp_path / "ci"
    listed = invoke("export", source, "--to", "benchmark-action", "-o", str(target)).split()
    assert sorted(listed) == sorted(str(path) for path in target.iterdir())
    with pytest.raises(InputError, match="makes 2 files"):
        invoke("export", source, "--to", "csv")
    with pytest.raises(InputError, match="a file stands where a folder is wanted"):
        invoke("export", source, "--to", "csv", "-o", str(file))


def test_export_into_a_folder_that_exists_uses_the_usual_name(folder: Path, run: Run, tmp_path: Path) -> None:
    invoke("export", str(folder / run.id), "--to", "markdown", "-o", str(tmp_path))
    assert (tmp_path / "report.md").is_file()


def test_rm_removes_results_and_nothing_else(folder: Path) -> None:
    invoke("rm", "--yes", str(folder / "20261122T120000Z-half"), str(folder / "20261122T130000Z-pair"))
    assert not (folder / "20261122T120000Z-half").exists()
    assert not (folder / "20261122T130000Z-pair").exists()
    for name in ("notes", "examples", "."):
        with pytest.raises(InputError, match="not a results folder"):
            invoke("rm", "--yes", str(folder / name))
    assert (folder / "notes" / "todo.txt").is_file()


def test_rm_asks_or_needs_yes(folder: Path, run: Run) -> None:
    with pytest.raises(InputError, match="nobody is there") as caught:
        invoke("rm", str(folder / run.id))
    assert isinstance(caught.value, InfoptError)
    assert (folder / run.id).is_dir()


def test_rm_leaves_links_and_the_current_folder(folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder / run.id)
    with pytest.raises(InputError, match="a link"):
        results.remove(link)
    monkeypatch.chdir(folder / run.id)
    with pytest.raises(InputError, match="the folder you are in"):
        results.remove(folder / run.id)
    with pytest.raises(InputError, match="no such folder"):
        results.remove(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 2}', "schema_version 2"),
        ("[]", "schema_version None"),
        ('{"schema_version": 1}', "Field required"),
        ("{", "broken"),
    ],
)
def test_a_damaged_comparison_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "compare.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_comparison(tmp_path)
    assert caught.value.hint


def test_reports_import_neither_torch_nor_rich() -> None:
    code = (
        "import sys, infopt.results, infopt.report.console, infopt.report.html, infopt.report.github, infopt.report.readme; "
        "import infopt.report.junit; "
        "print([name for name in ('torch', 'rich', 'transformers', 'scipy') if name in sys.modules])"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == "[]"
