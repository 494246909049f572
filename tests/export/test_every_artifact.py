"""Every recipe whose result a file can hold, as a source of exports: it is written and read back, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from infopt import leakage, recipe, techniques
from infopt.errors import InputError
from infopt.export import export
from infopt.export.source import open_source
from infopt.needs import missing_need
from infopt.optimize import optimize
from infopt.settings import LoadOptions

OPTIONS = LoadOptions(device="cpu")
SMALL = ("calibration.samples=4", "calibration.tokens=64")
WEIGHTS = [
    name
    for name in recipe.shipped()
    if (steps := recipe.load(name, techniques.find).steps) and not any(techniques.find(step.name).at_load for step in steps)
]
#: What recipes for larger models want of a model of two blocks and 320 tokens.
DROP = "steps.0.drop_layers.count=1"
TINY: dict[str, tuple[str, ...]] = {
    "drop_layers": (DROP,), "distil_heal": (DROP,), "trim_vocab": ("steps.0.trim_vocab.keep=300",),
    "make_draft": (DROP, "steps.1.distil.answer_tokens=8"), "finetune": ("steps.0.distil.data={rows}",),
    "distil_classify": (DROP, "steps.2.distil.data={rows}", "steps.2.distil.teacher=tiny", "steps.2.distil.filter=false"),
    "distil_extract": (DROP, "steps.2.distil.data={rows}", "steps.2.distil.teacher=tiny", "steps.2.distil.filter=false"),
}  # fmt: skip
ROWS = "".join(f'{{"prompt": "Is {n} even?", "response": "{"no" if n % 2 else "yes"}"}}\n' for n in range(8))
#: No plain weights: adapters beside them, and a library that does not dequantize.
REFUSED = {"qlora_nf4": "its adapters lie beside its weights", "quanto_": "has no plain weight to export"}
Artifact = Callable[[str], Path]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """`artifact(recipe)`: that of tiny, made once."""
    root = tmp_path_factory.mktemp("artifacts")

    @cache
    def make(name: str) -> Path:
        rows = root / "rows.jsonl"
        rows.write_text(ROWS, encoding="utf-8")
        chosen = recipe.load(name, techniques.find, [*SMALL, *(each.format(rows=rows) for each in TINY.get(name, ()))])
        lacking = [missing_need(techniques.find(step.name)(step.options).needs, "cpu") for step in chosen.steps]
        if any(lacking):
            pytest.skip(f"{name} {lacking[0].message}")  # type: ignore[union-attr]
        optimize("tiny", chosen, root / name, OPTIONS)
        return root / name

    return make


@pytest.mark.parametrize("name", WEIGHTS)
def test_to_gguf(name: str, artifact: Artifact, tmp_path: Path) -> None:
    refused = next((message for prefix, message in REFUSED.items() if name.startswith(prefix)), None)
    if refused is not None:
        with pytest.raises(InputError, match=refused):
            export(str(artifact(name)), "gguf", "q8_0", tmp_path / "model.gguf", OPTIONS)
        return
    made = export(str(artifact(name)), "gguf", "q8_0", tmp_path / "model.gguf", OPTIONS)
    assert made.against_source.top1_agreement > 0.9
    assert json.loads((tmp_path / "model.gguf.json").read_text()) == json.loads(made.model_dump_json())


@pytest.mark.parametrize("name", ["nf4", "bnb_int8", "rtn_w8a8", "kv_cache_fp8"])
def test_to_onnx(name: str, artifact: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs the onnx extra")
    pytest.importorskip("onnx_ir", reason="needs the onnx extra")
    made = export(str(artifact(name)), "onnx", "fp32", tmp_path / "out", OPTIONS)
    assert made.source == str(artifact(name))
    assert made.against_source.top1_agreement > 0.99


def test_recorded_kv_scales_are_left_out_and_nothing_else_is_said(artifact: Artifact) -> None:
    source = open_source(str(artifact("kv_cache_fp8")), OPTIONS, lambda line: None)
    assert source.notes == ["the source's scales of keys and values are left out: the format has no place for them"]
    assert not source.is_rounded
    assert not [name for name, _ in source.bundle.model.named_parameters() if name.endswith("_scale")]


def test_what_it_was_calibrated_on_goes_with_it(artifact: Artifact, tmp_path: Path) -> None:
    folder, out = artifact("gptq_int4"), tmp_path / "model.gguf"
    made = export(str(folder), "gguf", "q4_0", out, OPTIONS)
    assert made.calibration_hash == json.loads((folder / "infopt.json").read_text())["calibration_hash"] is not None
    fingerprint = tmp_path / f"model.gguf.{leakage.FILE}"
    assert fingerprint.read_bytes() == (folder / leakage.FILE).read_bytes()
    again = export(str(out), "gguf", "f16", tmp_path / "again.gguf", OPTIONS)
    assert again.calibration_hash == made.calibration_hash
    assert (tmp_path / f"again.gguf.{leakage.FILE}").read_bytes() == fingerprint.read_bytes()
    assert export("tiny", "gguf", "q8_0", tmp_path / "plain.gguf", OPTIONS).calibration_hash is None
    assert {path.name for path in tmp_path.glob("plain.*")} == {"plain.gguf", "plain.gguf.json"}
