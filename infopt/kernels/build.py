"""The kernel library as a file: the one in the package, one built before, or one that a C++ compiler makes now.

One library is built for each instruction set, and its name says which, for which kind of processor and from which sources, so
that a cache shared by several machines never hands one of them another's code. Behind the library lies a hash of it: a file
that was cut short can be loaded, and ends the process only when the part that is missing is touched.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from infopt.errors import MissingNeedError
from infopt.model.cache import cache_dir

SOURCES = Path(__file__).parent / "native"
PREBUILT = Path(__file__).parent / "prebuilt"
COMPILERS = ("c++", "g++", "clang++")
COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wno-ignored-attributes")
HINT = "engine: {name: transformers} runs without"
#: Instruction set → (features that /proc/cpuinfo must list, compiler flags), best first.
AVX512 = (
    {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
)
AMX = ("-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
X86 = {
    "amx": (AVX512[0] | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}, (*AVX512[1], *AMX)),
    "avx512": AVX512,
    "avx2": ({"avx2", "fma", "f16c"}, ("-mavx2", "-mfma", "-mf16c")),
    "plain": (set[str](), ()),
}
ARM = {"neon": ({"asimddp"}, ("-march=armv8.2-a+dotprod",)), "plain": (set[str](), ())}
MACHINES = {"x86_64": X86, "aarch64": ARM}


def machine() -> str:
    """The kind of processor, as Linux calls it."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def sets(kind: str | None = None) -> dict[str, tuple[set[str], tuple[str, ...]]]:
    """The instruction sets that a kind of processor, this one by default, may have."""
    return MACHINES.get(kind or machine(), {"plain": (set(), ())})


@lru_cache(maxsize=1)
def features() -> frozenset[str]:
    """What this processor has, by Linux's names; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), []))


@lru_cache(maxsize=1)
def usable() -> tuple[str, ...]:
    """The instruction sets that this processor has, best first."""
    return tuple(name for name, (needed, _) in sets().items() if needed <= features())


def file_name(isa: str, kind: str | None = None) -> str:
    """Of the library for an instruction set of a kind of processor, from these sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join((*COMMON, *sets(kind)[isa][1])).encode())
    return f"infopt-{kind or machine()}-{isa}-{digest.hexdigest()[:16]}.so"


def find(isa: str) -> Path:
    """The library's file, built if need be. Raises MissingNeedError where there is neither a library nor a compiler."""
    name = file_name(isa)
    for path in (PREBUILT / name, cache_dir() / "kernels" / name):
        if is_whole(path):
            return path
    return rebuilt(isa)


def is_whole(path: Path) -> bool:
    """Whether a file is there, and all that was built."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def rebuilt(isa: str) -> Path:
    """The library built into the cache, or, where that cannot be written, for this process alone."""
    kept = cache_dir() / "kernels" / file_name(isa)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        return build(isa, kept)
    except OSError:
        folder = tempfile.mkdtemp(prefix="infopt-kernels-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return build(isa, Path(folder) / kept.name)


def build(isa: str, target: Path, kind: str | None = None, compiler: str | None = None, link: Sequence[str] = ()) -> Path:
    """Compiles the library into `target`. `compiler` and `link`, which changes nothing that is computed, are for other machines.

    Raises MissingNeedError without a working compiler, and OSError where `target` cannot be written.
    """
    compiler = compiler or os.environ.get("CXX") or next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise MissingNeedError("the native engine needs its kernel library, and there is no C++ compiler to build it with",
                               hint=f"install g++, or set CXX; {HINT}")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [*compiler.split(), *COMMON, *sets(kind)[isa][1], str(SOURCES / "infopt.cpp"), *link, "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise MissingNeedError(
                f"{compiler} cannot be run: {error.strerror}", hint=f"set CXX to a C++ compiler; {HINT}"
            ) from None
        if done.returncode or not made.is_file():
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
            raise MissingNeedError(f"{compiler} cannot build the kernel library: {said or 'it wrote nothing'}",
                                   hint=f"set CXX to a C++17 compiler; {HINT}")  # fmt: skip
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.replace(target)
    return target
