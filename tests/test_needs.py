"""The one rule that says what a machine lacks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from infopt import demo, doctor, needs
from infopt.cli import app
from infopt.needs import Needs, missing_need


@pytest.fixture
def bare_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH without a compiler."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def program(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_nothing_is_needed_by_default() -> None:
    assert missing_need(Needs()) is None


def test_what_is_installed_is_not_missing() -> None:
    assert missing_need(Needs(modules=("pydantic", "yaml", "xml.dom"))) is None


@pytest.mark.parametrize(
    ("module", "package"), [("no_such_thing", "no-such-thing"), ("optimum.no_such", "optimum-no-such"), ("nope.x", "nope-x")]
)
def test_a_missing_package_comes_with_its_install_line(module: str, package: str) -> None:
    found = missing_need(Needs(modules=("pydantic", module)))
    assert found is not None
    assert found.message == f"needs the package {package}, which is not installed"
    assert found.hint == f"pip install {package}"


def test_asking_for_a_package_does_not_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    assert missing_need(Needs(modules=("wave",))) is None
    assert "wave" not in sys.modules
    assert importlib.util.find_spec("wave") is not None


def test_a_path_without_a_compiler_is_told(bare_path: Path) -> None:
    assert needs.compiler() is None
    found = missing_need(Needs(compiler=True))
    assert found is not None
    assert "C++ compiler" in found.message
    assert "infopt doctor" in found.hint


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_any_of_the_usual_compilers_will_do(bare_path: Path, name: str) -> None:
    path = program(bare_path, name)
    assert needs.compiler() == str(path)
    assert missing_need(Needs(compiler=True)) is None


def test_cxx_goes_first(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare_path, "g++")
    own = program(bare_path, "mycc")
    monkeypatch.setenv("CXX", "mycc")
    assert needs.compiler() == str(own)


def test_cuda_is_asked_of_torch_only_where_a_driver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "has_cuda", lambda: False)
    found = missing_need(Needs(cuda=True))
    assert found is not None
    assert "CUDA" in found.message
    monkeypatch.setattr(needs, "has_cuda", lambda: True)
    assert missing_need(Needs(cuda=True)) is None


@pytest.mark.parametrize(("device", "is_there", "lacks"), [
    ("auto", True, True), ("auto", False, False), ("cuda", True, True), ("cuda:1", True, True), ("cpu", True, False),
])  # fmt: skip
def test_cpu_only_is_about_the_device_asked_for(
    monkeypatch: pytest.MonkeyPatch, device: str, is_there: bool, lacks: bool
) -> None:
    monkeypatch.setattr(needs, "has_cuda", lambda: is_there)
    found = missing_need(Needs(cpu=True), device)
    assert (found is not None) == lacks
    assert found is None or (found.message, "--device cpu" in found.hint) == ("runs on the CPU only", True)


def test_a_gpu_that_is_there_does_not_help_a_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "has_cuda", lambda: True)
    assert "the CPU was asked for" in str(missing_need(Needs(cuda=True), "cpu"))


def test_doctor_and_recipes_check_say_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "has_cuda", lambda: True)
    (line,) = [each for each in doctor._recipes() if each.name == "recipe int8_naive"]
    assert line.text == "runs on the CPU only"
    found = CliRunner().invoke(app, ["recipes", "check", "int8_naive"])
    assert found.exit_code == 0
    assert found.stdout.startswith("int8_naive: ok\nnote: int8_naive: steps[0].int8_naive: runs on the CPU only: --device cpu")
    assert CliRunner().invoke(app, ["recipes", "check", "int8_naive", "--device", "cpu"]).stdout == "int8_naive: ok\n"


def test_the_demo_goes_on_without_an_arm_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "has_cuda", lambda: True)
    specs, lines = demo.arms("auto")
    assert lines == ["int8_naive is left out: runs on the CPU only"]
    assert [spec.label for spec in specs] == ["baseline", "int8", "nf4", "int4_lookup"]
    assert len(demo.arms("cpu")[0]) == 5


def test_has_cuda_imports_no_torch_on_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.os.path, "exists", lambda path: False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert needs.has_cuda() is False
    assert "torch" not in sys.modules


@pytest.mark.parametrize("available", [True, False])
def test_has_cuda_believes_torch(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    class Torch:
        class cuda:  # noqa: N801
            @staticmethod
            def is_available() -> bool:
                return available

    modules: dict[str, Any] = {"torch": Torch}
    monkeypatch.setitem(sys.modules, "torch", modules["torch"])
    assert needs.has_cuda() is available
