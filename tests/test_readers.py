"""What `optimize` says about readers: who opened the artifact, and who cannot and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stub_techniques import chosen
from typer.testing import CliRunner

from infopt import arms, host, optimize, pipeline
from infopt.artifact import Artifact, read_artifact
from infopt.cli import app
from infopt.errors import InputError
from infopt.model import compressed, load
from infopt.model.plan import LoadPlan
from infopt.settings import LoadOptions

CPU = LoadOptions(device="cpu")
MXFP4 = chosen({"mxfp4": {}})


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    """4-bit floats of a float32 model: infopt opens them, plain transformers does not."""
    out = tmp_path_factory.mktemp("readers") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFOPT_CACHE", str(out.parent / "cache"))
        return out, optimize.optimize("tiny", MXFP4, out, CPU)


def test_a_refusal_is_recorded_with_its_reason(refused: tuple[Path, Artifact]) -> None:
    out, document = refused
    plain, own = read_artifact(out).load_back
    assert document.load_back == (plain, own)
    assert plain.reader == f"plain transformers {host.versions()['transformers']}"
    assert plain.refusal is not None
    assert plain.refusal.endswith("load it with dtype=bfloat16")
    assert (plain.max_abs_logit_difference, plain.top1_agreement) == (None, None)
    assert own.reader is not None
    assert own.reader.startswith("infopt ")
    assert (own.refusal, own.top1_agreement) == (None, 1.0)
    assert f"- **{plain.reader} does not read it**: {plain.refusal}" in (out / "README.md").read_text(encoding="utf-8")


def test_what_the_reason_advises_helps(refused: tuple[Path, Artifact]) -> None:
    import torch

    out, _ = refused
    plain = load.load(pipeline.resolve(str(out), CPU), LoadPlan(dtype="bfloat16", is_plain=True))
    opened = pipeline.open_arm(arms.spec(str(out), None, ["engine.name=transformers"]), "cpu", CPU)
    ids = optimize.probe_ids(opened)
    difference = (optimize.probe(opened, ids) - optimize.probe(plain, ids)).abs().max()
    assert opened.model.dtype is torch.float32
    assert difference < 0.5


def test_the_command_warns(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(MXFP4.as_yaml(), encoding="utf-8")
    command = ["optimize", "tiny", "-r", str(tmp_path / "own.yaml"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "warning: plain transformers" in found.output
    assert "does not read it: compressed-tensors unpacks 4-bit floats to bfloat16" in " ".join(found.output.split())


def test_zero_points_are_read_or_refused_but_never_wrong(tmp_path: Path) -> None:
    document = optimize.optimize("tiny", chosen({"rtn": {"symmetric": False}}), tmp_path / "out", CPU)
    plain, own = document.load_back
    assert own.refusal is None
    assert plain.refusal is None or "dequantize=True" in plain.refusal
    assert plain.refusal is not None or plain.max_abs_logit_difference == pytest.approx(0, abs=1e-4)


def test_a_refusal_that_nobody_foresaw_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loading(ref: Any, plan: Any = None, *given: Any) -> Any:
        if plan is not None and plan.is_plain:
            raise InputError("cannot be loaded")
        return original(ref, plan, *given)

    original = load.load
    monkeypatch.setattr(load, "load", loading)
    with pytest.raises(InputError, match="cannot be loaded"):
        optimize.optimize("tiny", chosen("rtn"), tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(compressed, "gap", lambda config, dtype: "a known reason")
    assert optimize.optimize("tiny", chosen("rtn"), tmp_path / "out", CPU).load_back[0].refusal == "a known reason"
