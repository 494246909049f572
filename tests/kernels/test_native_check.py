"""What `native_check.cpp` prints is the same for every instruction set: lanes, products of all kinds, whole steps.

The sets of this processor are compared with plain C++. NEON is compared too where Debian's g++-aarch64-linux-gnu and
qemu-user-static are installed, on the library that goes into the wheel for arm64.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest

from infopt.kernels import build, library

SOURCE = Path(__file__).with_name("native_check.cpp")
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
STATIC = ("-static-libstdc++", "-static-libgcc")
#: How far numbers of a case may lie apart, in shares of its largest; the products of one row may cancel. Steps round keys and
#: values to halves, and inputs of integer weights to bytes: a last bit decides which way, and the next layer shows it. What is
#: wrong is off by its own size.
TOLERANCES = (
    ("lanes", 4e-7), ("multiply", 1e-4), ("step float32, float", 4e-6), ("step bfloat16, float", 4e-6),
    ("step float32, half", 1e-3), ("step bfloat16, half", 1e-3), ("step not", 0.0), ("step", 0.05),
)  # fmt: skip

Numbers = dict[str, list[float]]


def compiler() -> str:
    found = next((found for name in build.COMPILERS if (found := shutil.which(name))), None)
    if found is None:
        pytest.skip("no C++ compiler is installed")
    return found


def numbers(run: list[str], isa: str) -> Numbers:
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.rstrip().split("\t") for line in done.stdout.splitlines()]
    assert lines[0] == ["isa", f"{isa} {isa}"]
    return {name: [float(number) for number in found.split()] for name, found in lines[1:]}


def compile_check(target: Path, cxx: str, isa: str, kind: str) -> str:
    flags = [flag for flag in build.COMMON if flag not in ("-O3", "-fPIC", "-shared")] + [*build.sets(kind)[isa][1], *STATIC]
    command = [cxx, *flags, "-O1", f"-I{build.SOURCES}", str(SOURCE), "-ldl", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(target)


def here(folder: Path, isa: str) -> Numbers:
    return numbers([compile_check(folder / isa, compiler(), isa, build.machine()), library.load(isa)._name], isa)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    return here(tmp_path_factory.mktemp("plain"), "plain")


def compare(found: Numbers, wanted: Numbers) -> None:
    assert found.keys() == wanted.keys()
    far = {name: off for name in wanted if (off := distance(name, found[name], wanted[name])) > tolerance(name)}
    assert not far


def tolerance(name: str) -> float:
    return next((allowed for start, allowed in TOLERANCES if name.startswith(start)), 0.0)


def distance(name: str, found: list[float], wanted: list[float]) -> float:
    """The largest difference, in shares of the largest number; of the number itself for functions that span many sizes."""
    finite = [abs(x) for x in wanted if math.isfinite(x)]
    most = 0.0
    for x, y in zip(found, wanted, strict=True):
        if x == y or (math.isnan(x) and math.isnan(y)):
            continue
        off = abs(x - y) / (abs(y) if name == "lanes exp" else max(finite))
        most = max(most, off if math.isfinite(off) else math.inf)
    return most


@pytest.mark.parametrize("isa", [isa for isa in build.usable() if isa != "plain"])
def test_a_set_of_this_processor(isa: str, plain: Numbers, tmp_path: Path) -> None:
    compare(here(tmp_path, isa), plain)


def test_neon_under_an_emulator(plain: Numbers, tmp_path: Path) -> None:
    missing = [name for name in (CROSS, EMULATOR) if shutil.which(name) is None]
    if missing or build.machine() == "aarch64":
        pytest.skip("NEON is here" if not missing else f"{' and '.join(missing)} not installed: NEON is not compared")
    target = build.build("neon", tmp_path / build.file_name("neon", "aarch64"), "aarch64", CROSS, STATIC)
    loader = subprocess.run([CROSS, "-print-file-name=ld-linux-aarch64.so.1"], capture_output=True, text=True, check=True).stdout
    program = compile_check(tmp_path / "neon", CROSS, "neon", "aarch64")
    root = str(Path(loader.strip()).resolve().parents[1])
    compare(numbers([EMULATOR, "-L", root, program, str(target)], "neon"), plain)
