"""The GPU benchmark, rehearsed on the CPU with a tiny shape: what it checks, times, predicts and leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "h200.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("h200")
    command = [sys.executable, SCRIPT, "--device", "cpu", "--shape", "tiny", "--rounds", "2", "--out", folder]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for parts in (("ceilings", "check", "decode"), ("batch", "lookup", "formats", "bench")):  # the second keeps the first's
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
    for part in ("decode", "batch"):
        for arm in document[part]["arms"].values():
            assert len(arm["tok_per_s"]) == 2
            assert 0 < arm["share_of_limit"] < 1
            assert arm["predicted_tok_per_s"] < arm["limit_tok_per_s"]
    assert document["decode"]["arms"]["native bfloat16"]["same_tokens"] == 8


def test_drafts_do_not_change_what_is_said(out: Path) -> None:
    found = json.loads((out / "h200.json").read_text())["lookup"]
    assert found["same_text"]
    assert all(each["same_text"] for each in found["drafts"].values())
    assert found["drafts"]["0.9"]["predicted"] > 1


def test_the_command_left_a_run_and_the_table_names_all_parts(out: Path) -> None:
    assert json.loads((out / "h200.json").read_text())["bench"]["exit"] == 0
    assert list((out / "results").glob("*/run.json"))
    text = (out / "h200.md").read_text()
    for heading in ("decode: tiny", "batch: tiny", "lookup: tiny", "formats, 2 rows"):
        assert f"## {heading}" in text
