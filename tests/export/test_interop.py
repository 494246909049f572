"""The frame of `make interop`: what a reader answers becomes a verdict, and a table."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

WANTED: dict[str, Any] = {
    "outputs": [
        {"tokens": [5, 6, 7], "logprobs": [-1.0, -1.0, -1.0], "margins": [2.0, 0.01, 3.0]},
        {"tokens": [8, 9, 1], "logprobs": [-1.0, -1.0, -1.0], "margins": [1.0, 1.0, 1.0]},
    ],
    "text_logprobs": [-1.0, -2.0, -3.0],
    "encoded": [[1, 2], [3]],
}


@pytest.fixture(scope="module")
def interop() -> Any:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import interop as module

        yield module
    finally:
        sys.path.remove(folder)


@pytest.fixture
def subject(interop: ModuleType, tmp_path: Path) -> Any:
    return interop.Subject("gguf-q8_0", "gguf", tmp_path / "model.gguf", "demo", 10)


def reader(interop: ModuleType, **changed: Any) -> Any:
    return interop.Reader(**{"name": "fake", "script": "fake.py", "formats": ("gguf",), **changed})


def test_the_same_answer_is_equal(interop: ModuleType, subject: Any) -> None:
    row = interop.judge(subject, reader(interop), {**copy.deepcopy(WANTED), "versions": {"fake": "1"}}, WANTED)
    assert (row.verdict, row.loads, row.equal_prompts, row.max_abs_logprob_difference) == ("equal", True, 2, 0)
    assert (row.texts_encoded_alike, row.texts, row.reason) == (2, 2, None)


@pytest.mark.parametrize(("place", "shift", "verdict"), [(1, 0.02, "ties"), (1, 0.001, "DIFFERENT"), (0, 0.02, "DIFFERENT")])
def test_another_token_is_a_tie_only_where_the_two_likeliest_were_near(
    place: int, shift: float, verdict: str, interop: ModuleType, subject: Any
) -> None:
    found = copy.deepcopy(WANTED)
    found["outputs"][0]["tokens"][place] = 99
    found["text_logprobs"][1] -= shift
    found["encoded"][1] = [4]
    row = interop.judge(subject, reader(interop), found, WANTED)
    assert (row.verdict, row.equal_prompts, row.texts_encoded_alike) == (verdict, 1, 1)
    assert row.max_abs_logprob_difference == pytest.approx(shift)
    assert (row.reason is not None) == (verdict == "DIFFERENT")


def test_an_answer_no_further_off_than_rounding_is_rounding(interop: ModuleType, subject: Any) -> None:
    found = copy.deepcopy(WANTED)
    found["outputs"][0]["tokens"][0] = 99  # where the expected token was 2 nats ahead
    found["text_logprobs"] = [-1.01, -1.99, -3.01]
    for shift, verdict in ((0.02, "rounding"), (0.001, "DIFFERENT")):
        rounded = {"text_logprobs": [value + shift for value in WANTED["text_logprobs"]]}
        assert interop.judge(subject, reader(interop), found, WANTED, [rounded]).verdict == verdict


@pytest.mark.parametrize(("is_same", "verdict"), [(True, "DIFFERENT"), (False, "requantized")])
def test_other_weights_are_no_tie(is_same: bool, verdict: str, interop: ModuleType, tmp_path: Path) -> None:
    found = copy.deepcopy(WANTED)
    found["outputs"][0]["tokens"][1] = 99
    found["text_logprobs"] = [value - 0.03 for value in WANTED["text_logprobs"]]
    row = interop.judge(interop.Subject("x", "onnx", tmp_path, "demo", 10, is_same), reader(interop), found, WANTED)
    assert row.verdict == verdict
    assert row.perplexity_ratio == pytest.approx(1.0305, abs=1e-4)
    assert row.reason is not None
    assert row.reason.startswith("the text's perplexity is +3.0% off")


def test_what_does_not_load_is_listed_with_its_reason(interop: ModuleType, subject: Any) -> None:
    row = interop.judge(subject, reader(interop), {"versions": {}, "error": "no such | format"}, WANTED)
    assert (row.verdict, row.loads, row.prompts) == ("does not load", False, None)
    assert "no such \\| format" in interop.markdown([row], "demo")


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("import json, sys; json.dump({'echo': json.load(open(sys.argv[1]))['text']}, open(sys.argv[2], 'w'))", None),
        ("import sys; print('first', file=sys.stderr); sys.exit('engine died')", "exit code 1: engine died"),
    ],
)
def test_a_reader_runs_in_a_python_of_its_own(
    script: str, error: str | None, interop: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake.py").write_text(script)
    monkeypatch.setattr(interop, "HERE", tmp_path)
    found = interop.ask(reader(interop, python=Path(sys.executable)), {"text": [1, 2]}, tmp_path)
    assert found == ({"echo": [1, 2]} if error is None else {"error": error})


def test_earlier_rows_stay_until_they_are_made_again(interop: ModuleType, subject: Any, tmp_path: Path) -> None:
    first = interop.judge(subject, reader(interop), {"error": "old"}, WANTED)
    other = interop.judge(subject, reader(interop, name="other"), {"error": "kept"}, WANTED)
    interop.write([first, other], "demo", tmp_path)
    interop.write([interop.judge(subject, reader(interop), {"error": "new"}, WANTED)], "demo", tmp_path)
    rows = json.loads((tmp_path / "interop.json").read_text())["rows"]
    assert sorted(row["reason"] for row in rows) == ["kept", "new"]
    interop.write([first], "another model", tmp_path)
    assert len(json.loads((tmp_path / "interop.json").read_text())["rows"]) == 1


@pytest.mark.parametrize(("kind", "step"), [("F16", 2e-3), ("BF16", 1.6e-2), ("Q4_0", 0.02), ("Q6_K", 0.02)])
def test_inputs_are_rounded_as_llama_cpp_rounds_them(kind: str, step: float, interop: ModuleType) -> None:
    import torch

    x = torch.linspace(-2, 3, 512).view(2, 256)
    seen = interop.interop_rounding.as_stored(x, kind)
    assert seen.shape == x.shape
    assert 0 < (seen - x).abs().max() < step
    assert torch.equal(interop.interop_rounding.as_stored(x, "F32"), x)
    zeros = torch.zeros(1, 256)
    assert torch.equal(interop.interop_rounding.as_stored(zeros, kind), zeros)
