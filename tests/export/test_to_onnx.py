from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from infopt import artifact, needs, recipe, techniques
from infopt.errors import InputError, LoadBackError, MissingNeedError
from infopt.export import export, to_onnx
from infopt.export.source import open_source, unrounded
from infopt.optimize import optimize
from infopt.settings import LoadOptions

OPTIONS = LoadOptions(device="cpu")


@pytest.fixture
def built() -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs the onnx extra")
    pytest.importorskip("onnx_ir", reason="needs the onnx extra")


@pytest.mark.usefixtures("built")
def test_fp32_answers_in_the_sources_tokens(tmp_path: Path) -> None:
    made = export("tiny", "onnx", "fp32", tmp_path / "out", OPTIONS)
    (check,) = made.checks
    assert check.max_abs_logit_difference < 1e-4
    assert (check.answers, check.same_answers, check.top1_agreement) == (len(to_onnx.PROMPTS), len(to_onnx.PROMPTS), 1)
    assert made.notes == ()
    assert json.loads((tmp_path / "out" / to_onnx.REPORT).read_text()) == json.loads(made.model_dump_json())
    assert {"model.onnx", "genai_config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("built")
def test_what_is_rounded_already_is_quantized_from_its_reference(tmp_path: Path) -> None:
    chosen = recipe.load("rtn_int8", techniques.find)
    folder = tmp_path / "artifact"
    optimize("tiny", chosen, folder, OPTIONS)
    made = export(str(folder), "onnx", "int4", tmp_path / "out", OPTIONS)
    assert made.notes[0] == f"{folder} is rounded already: this starts from its reference, tiny, instead"
    assert made.notes[1].startswith("quantized to int4, the head in 8 by onnxruntime-genai's builder")
    assert made.source_description == "tiny, random weights, seed 0"
    assert made.checks[0].top1_agreement >= to_onnx.TOP1_FLOORS["int4"]
    assert made.checks[0].tolerance is None
    assert made.bytes < 300_000


@pytest.mark.parametrize("change", [{"reference": "gone/"}, {"reference_hash": "0" * 64}])
def test_without_its_reference_it_is_quantized_a_second_time_and_says_so(change: dict[str, str], tmp_path: Path) -> None:
    optimize("tiny", recipe.load("rtn_int8", techniques.find), tmp_path / "artifact", OPTIONS)
    path = tmp_path / "artifact" / artifact.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    source = unrounded(open_source(str(tmp_path / "artifact"), OPTIONS, print), OPTIONS, print)
    assert source.notes == [
        "14 layers of the source are packed: they were dequantized first",
        "quantized a second time: the source's weights are rounded already, and its reference is not here",
    ]


@pytest.mark.usefixtures("built")
def test_nonsense_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = to_onnx.probe
    monkeypatch.setattr(to_onnx, "probe", lambda bundle, ids: real(bundle, ids).flip(-1))
    with pytest.raises(LoadBackError, match=r"likeliest token at \d+% of the positions \(at least 80% is asked for\)"):
        export("tiny", "onnx", "int8", tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("built")
def test_what_the_builder_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho 'a traceback' >&2; echo 'NotImplementedError: no such model' >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(InputError, match="builder does not convert this model: NotImplementedError: no such model"):
        export("tiny", "onnx", "int4", tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_without_the_extra_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "_is_installed", lambda module: module != "onnx_ir")
    with pytest.raises(MissingNeedError, match="--to onnx needs the package onnx-ir") as caught:
        export("tiny", "onnx", "int4", tmp_path / "out", OPTIONS)
    assert caught.value.hint == "pip install 'infopt[onnx]'"


@pytest.mark.parametrize(
    ("kind", "message"), [("q4_0", "unknown ONNX type 'q4_0'; known: fp32, int4, int8"), ("int4", "exists and")]
)
def test_unknown_types_and_targets_in_use_are_refused(kind: str, message: str, tmp_path: Path, built: Any) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match=message):
        export("tiny", "onnx", kind, tmp_path, OPTIONS)
    assert (tmp_path / "mine").read_text() == "mine"
