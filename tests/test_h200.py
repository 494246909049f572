"""The GPU benchmark, rehearsed on the CPU with a tiny shape: what it checks, times, predicts and leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_arms
import gpu_models
import gpu_report
import h200

from infopt.protocols import Sampling
from infopt.runtime.drafts import Wanted

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "h200.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("h200")
    command = [sys.executable, SCRIPT, "--device", "cpu", "--shape", "tiny", "--rounds", "2", "--out", folder]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for parts in (
        ("ceilings", "check", "decode"),
        ("batch", "small", "lookup", "formats", "bench"),
    ):  # the second keeps the first's
        done = subprocess.run([*command, "--part", *parts], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_kind_is_checked_against_float32(out: Path) -> None:
    arms = json.loads((out / "h200.json").read_text())["check"]["arms"]
    assert set(arms) == {"native bfloat16", "native int8", "native int4", "native float8"}
    for found in arms.values():
        assert 0 < found["error"] < 0.1
        assert found["kld"] < 1e-4
        assert found["top1_agreement"] > 0.9


def test_arms_are_timed_and_held_against_limit_and_prediction(out: Path) -> None:
    document = json.loads((out / "h200.json").read_text())
    assert document["ceilings"]["read"] > 1e8
    for found in (document["decode"], document["batch"], *document["small"].values()):
        for name, arm in found["arms"].items():
            assert len(arm["tok_per_s"]) >= 2
            assert 0 < arm["share_of_limit"] < 1
            assert arm["predicted_tok_per_s"] < arm["limit_tok_per_s"]
            assert (arm["launches"] is not None) == name.startswith("native")
    assert document["decode"]["stock_agrees"]["share"] > 0.9


def test_drafts_do_not_change_what_is_said_and_are_accepted_as_meant(out: Path) -> None:
    found = json.loads((out / "h200.json").read_text())["lookup"]
    assert found["same_text"]
    assert found["arms"]["prompt lookup"]["tokens_per_step"][0] > 4
    kept = [each["tokens_per_step"] for each in found["drafts"].values()]
    assert 1.2 < kept[0] < kept[1] < kept[2] < 9


def test_the_command_left_a_run_and_the_table_names_all_parts(out: Path) -> None:
    found = json.loads((out / "h200.json").read_text())["bench"]
    assert found["exit"] == 0
    assert found["said"][0].startswith("tiny: native engine: whole steps")
    assert list((out / "results").glob("*/run.json"))
    text = (out / "h200.md").read_text()
    for heading in ("decode: tiny", "batch: tiny", "lookup: tiny", "formats, 2 rows"):
        assert f"## {heading}" in text


class Fake:
    """An arm that takes a millisecond a token, or fails."""

    kind, weights_bytes = None, 1000

    def __init__(self, name: str, fails_in: int = 99) -> None:
        self.name, self.runs, self.fails_in = name, 0, fails_in

    def run(self, prompts: list[list[int]], new: int) -> Any:
        self.runs += 1
        if self.runs > self.fails_in:
            raise RuntimeError("out of memory")
        return gpu_arms.Timed(0.01, 1e-3 * (new - 1), 1e-3, (1, 2), 1.0)


def test_an_arm_that_fails_takes_no_other_with_it() -> None:
    bench = h200.Bench("cpu", "tiny", 3)
    found = bench.compare("tiny", [Fake("good"), Fake("late", 2), Fake("never", 0)], [[1, 2]], 11)
    assert found["good"]["tok_per_s"] == pytest.approx([1000] * 3)
    assert found["late"]["failed"] == found["never"]["failed"] == "RuntimeError: out of memory"
    text = gpu_report.markdown({"decode": {"shape": "tiny", "rows": 1, "prompt": 2, "arms": found}})
    assert "late failed: RuntimeError: out of memory" in text


def test_a_part_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "h200.json").write_text(json.dumps({"check": {"arms": {}}}))
    line = ["h200.py", "--device", "no-such", "--part", "decode", "ceilings", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*line, "--merge", str(tmp_path / "before")])
    assert h200.main() == 1
    assert json.loads((tmp_path / "out" / "h200.json").read_text())["check"] == {"arms": {}}


def test_drafts_of_a_text_that_was_left_are_empty() -> None:
    oracle = gpu_arms.Oracle([[1, 2, 3, 4]], 1.0, 2, 10)
    source, sampling = torch.Generator(), Sampling()
    wanted = [Wanted(None, ids, 3, source, sampling) for ids in ([1, 2], [1, 9])]
    assert [draft.tokens for draft in oracle.propose(wanted)] == [(3, 4), ()]


def test_bytes_of_other_libraries_are_those_they_hold() -> None:
    model = gpu_models.transformer(gpu_models.SHAPES["tiny"], "cpu")
    plain = gpu_arms.StockArm("eager", model, is_compiled=False).weights_bytes
    gpu_arms._bitsandbytes(model, "nf4")
    assert gpu_arms.StockArm("nf4", model, is_compiled=False).weights_bytes < 0.6 * plain
