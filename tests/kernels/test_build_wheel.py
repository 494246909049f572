"""A wheel for a kind of processor has its libraries in it and needs nothing but glibc; any other build compiles nothing."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from infopt.kernels import build, library

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a wheel is built from, so that nothing is written into the checkout."""
    folder = tmp_path / "tree"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder)
    (folder / "infopt").mkdir()
    for name in ("kernels", "model", "data"):
        shutil.copytree(
            ROOT / "infopt" / name, folder / "infopt" / name, ignore=shutil.ignore_patterns("__pycache__", "prebuilt")
        )
    for path in (ROOT / "infopt").glob("*.py"):
        shutil.copy(path, folder / "infopt")
    return folder


def wheel(tree: Path, **environment: str) -> zipfile.ZipFile:
    pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools, which `make wheel` calls")
    command = [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('dist')"]
    done = subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next((tree / "dist").iterdir()))


def test_any_other_build_compiles_nothing(tree: Path) -> None:
    with wheel(tree, CXX="/no/such/compiler", INFOPT_WHEEL="") as made:
        assert str(made.filename).endswith("-py3-none-any.whl")
        assert "infopt/kernels/native/infopt.cpp" in made.namelist()
        assert not [name for name in made.namelist() if name.endswith(".so")]


def test_a_wheel_has_each_set_of_its_processor(tree: Path, tmp_path: Path) -> None:
    """The compiler is a stand-in that is quick: it makes one library, for each set as it is asked, and optimizes nothing."""
    compiler = tmp_path / "quick"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n', encoding="utf-8")
    compiler.chmod(0o755)
    with wheel(tree, CXX=str(compiler), INFOPT_WHEEL=build.machine()) as made:
        assert "-py3-none-manylinux_2_" in str(made.filename)
        assert str(made.filename).endswith(f"_{build.machine()}.whl")
        found = {name for name in made.namelist() if name.endswith(".so")}
        assert found == {f"infopt/kernels/prebuilt/{build.file_name(isa)}" for isa in build.sets()}
        made.extractall(tmp_path / "installed")
    for isa in build.usable():
        path = tmp_path / "installed" / "infopt" / "kernels" / "prebuilt" / build.file_name(isa)
        assert build.is_whole(path)
        check_library(path, isa)


def check_library(path: Path, isa: str) -> None:
    content = path.read_bytes()
    assert b"libstdc++.so" not in content
    assert b"libgcc_s.so" not in content
    loaded = ctypes.CDLL(str(path))
    loaded.infopt_isa.restype = ctypes.c_char_p
    assert loaded.infopt_isa().decode() == isa
    assert all(hasattr(loaded, name) for name in library.FUNCTIONS)
    assert not hasattr(loaded, "_ZSt9terminatev"), "only the C interface can be seen"
