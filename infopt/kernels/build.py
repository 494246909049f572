"""The kernel library as a file: the one in the package, one built before, or one that a C++ compiler makes now.

One library is built for each instruction set, and its name says which and from which sources, so that a cache shared by
several machines never hands one of them another's code.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from infopt.errors import MissingNeedError
from infopt.model.cache import cache_dir

SOURCES = Path(__file__).parent / "native"
PREBUILT = Path(__file__).parent / "prebuilt"
COMPILERS = ("c++", "g++", "clang++")
COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wno-ignored-attributes")
#: Instruction set → (features that /proc/cpuinfo must list, compiler flags), best first.
X86 = {
    "avx512": (
        {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
    ),
    "avx2": ({"avx2", "fma", "f16c"}, ("-mavx2", "-mfma", "-mf16c")),
    "plain": (set[str](), ()),
}
ARM = {"neon": ({"asimddp"}, ("-march=armv8.2-a+dotprod",)), "plain": (set[str](), ())}


def sets() -> dict[str, tuple[set[str], tuple[str, ...]]]:
    """The instruction sets that this kind of processor may have."""
    return {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}.get(platform.machine(), {"plain": (set(), ())})


@lru_cache(maxsize=1)
def usable() -> tuple[str, ...]:
    """The instruction sets that this processor has, best first."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ("plain",)
    found = next((set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set[str]())
    return tuple(name for name, (features, _) in sets().items() if features <= found)


def file_name(isa: str) -> str:
    """Of the library for an instruction set, from these sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join((*COMMON, *sets()[isa][1])).encode())
    return f"infopt-{isa}-{digest.hexdigest()[:16]}.so"


def find(isa: str) -> Path:
    """The library's file, built if need be. Raises MissingNeedError where there is neither a library nor a compiler."""
    name = file_name(isa)
    kept = cache_dir() / "kernels" / name
    for path in (PREBUILT / name, kept):
        if path.is_file():
            return path
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        return build(isa, kept)
    except PermissionError:
        return build(isa, Path(tempfile.mkdtemp(prefix="infopt-kernels-")) / name)


def build(isa: str, target: Path) -> Path:
    """Compiles the library into `target`. Raises MissingNeedError without a working compiler."""
    compiler = os.environ.get("CXX") or next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise MissingNeedError("the native engine needs its kernel library, and there is no C++ compiler to build it with",
                               hint="install g++, or set CXX; engine: {name: transformers} runs without")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [*compiler.split(), *COMMON, *sets()[isa][1], str(SOURCES / "infopt.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise MissingNeedError(f"{compiler} cannot be run: {error.strerror}", hint="set CXX to a C++ compiler") from None
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
            raise MissingNeedError(f"{compiler} cannot build the kernel library: {said}", hint="set CXX to a C++17 compiler")
        made.replace(target)
    return target
