"""optimum-quanto: its three weight types, its needs, and the extension that it compiles."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt import techniques
from infopt.errors import InfoptError
from infopt.layers import quanto_extension
from infopt.model.bundle import Bundle

WEIGHTS = pytest.mark.parametrize("weights", ["int8", "int4", "float8"])


@WEIGHTS
def test_linear_layers_and_nothing_else(weights: str, make: Callable[..., Any], build: Callable[..., Any]) -> None:
    from optimum.quanto import QLinear

    model = build(make("quanto", weights=weights, ignore=["lm_head", "k_proj"])).model
    names = {name for name, module in model.named_modules() if isinstance(module, QLinear)}
    assert len(names) == 12
    assert not any(name.endswith(("k_proj", "lm_head")) for name in names)
    assert all(model.get_submodule(name).frozen for name in names)


@WEIGHTS
def test_memory_falls_by_the_format(
    weights: str, make: Callable[..., Any], build: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    linear = sum(m.weight.numel() for m in tiny_bundle.model.modules() if isinstance(m, torch.nn.Linear)) - 320 * 64
    saved = tiny_bundle.resident_bytes() - build(make("quanto", weights=weights)).resident_bytes()
    per_weight = {"int8": 1, "float8": 1, "int4": 0.5}[weights]
    assert 0.88 * (4 - per_weight) * linear < saved <= (4 - per_weight) * linear


def test_more_bits_are_more_exact(
    make: Callable[..., Any], build: Callable[..., Any], logits: Callable[..., Any], tiny_bundle: Bundle
) -> None:
    exact = logits(tiny_bundle)
    int8, float8, int4 = (
        (logits(build(make("quanto", weights=weights))) - exact).square().sum() for weights in ("int8", "float8", "int4")
    )
    assert int8 < float8 < int4


def test_only_int4_needs_a_compiler() -> None:
    kind = techniques.find("quanto")
    assert kind(kind.Options(weights="int4")).needs.compiler
    assert not kind(kind.Options(weights="int8")).needs.compiler
    assert not kind(kind.Options(weights="float8")).needs.compiler


def test_a_lock_that_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    long_ago = time.time() - 1000
    os.utime(lock, (long_ago, long_ago))
    lines: list[str] = []
    quanto_extension.clear_stale_lock(tmp_path, lines.append)
    assert not lock.exists()
    assert lines == [f"removed the lock that a killed build left in {tmp_path}"]
    quanto_extension.clear_stale_lock(tmp_path / "never built", lines.append)


def test_a_build_in_progress_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    long_ago = time.time() - 1000
    os.utime(lock, (long_ago, long_ago))
    (tmp_path / "unpack.o").touch()  # written just now: someone is compiling
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            lock.unlink()

    monkeypatch.setattr(quanto_extension.time, "sleep", sleep)
    lines: list[str] = []
    quanto_extension.clear_stale_lock(tmp_path, lines.append)
    assert len(waits) == 3
    assert lines == ["waiting for another build of optimum-quanto's kernels"]


def test_the_path_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/somewhere")
    with quanto_extension.ninja_on_path():
        assert os.environ["PATH"].endswith(os.pathsep + "/somewhere")
    assert os.environ["PATH"] == "/somewhere"
    monkeypatch.delenv("PATH")
    with pytest.raises(ZeroDivisionError), quanto_extension.ninja_on_path():
        raise ZeroDivisionError
    assert "PATH" not in os.environ


def test_built_means_built_for_this_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quanto_extension, "folder", lambda device_type: tmp_path)
    assert not quanto_extension.is_built()
    (tmp_path / "quanto_cpp.so").touch()
    (tmp_path / "pytorch_version.txt").write_text("1.0")
    assert not quanto_extension.is_built()
    (tmp_path / "pytorch_version.txt").write_text(torch.__version__)
    assert quanto_extension.is_built()


def test_a_build_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("Error building extension 'quanto_cpp'\nmany lines of compiler output")

    monkeypatch.setattr(quanto_extension, "folder", lambda device_type: tmp_path)
    monkeypatch.setattr(torch.ops.quanto, "unpack", broken, raising=False)
    lines: list[str] = []
    with pytest.raises(InfoptError, match=r"do not compile in .*: Error building extension 'quanto_cpp'$"):
        quanto_extension.ready(torch.device("cpu"), lines.append)
    assert lines[0].startswith("compiling optimum-quanto's kernels, once")
