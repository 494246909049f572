"""`infopt env`: make an environment from its lock, list them, remove one."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from infopt.backends import child
from infopt.backends.environments import ENVIRONMENTS, STAMP, Environment, root
from infopt.errors import DiskFullError, InfoptError, InputError
from infopt.model import atomic, cache
from infopt.protocols import Progress
from infopt.result import write_atomic
from infopt.units import size


@dataclass(frozen=True)
class Listed:
    """One environment as `infopt env list` shows it. `bytes`: on this disk, what an older lock or a killed install left
    included; None where there is nothing."""

    name: str
    version: str
    is_installed: bool
    bytes: int | None
    path: Path
    about: str


def install(environment: Environment, progress: Progress = lambda line: None) -> Listed:
    """Makes the environment if it is not there. What an install that was killed left is swept away first.

    Raises InfoptError with pip's last words when it fails, InputError without a fitting Python, DiskFullError.
    """
    with cache.lock(environment.folder):
        if not environment.is_installed():
            python = _python(environment)
            shutil.rmtree(environment.folder, ignore_errors=True)
            if atomic.free_bytes(environment.folder) < environment.bytes:
                free = size(atomic.free_bytes(environment.folder))
                message = f"{environment.folder}: no space: {size(environment.bytes)} needed, {free} free"
                raise DiskFullError(message, hint="free some space, or set INFOPT_CACHE to a folder on another disk")
            try:
                _fill(environment, python, progress)
            except BaseException:
                shutil.rmtree(environment.folder, ignore_errors=True)
                raise
    return _listed(environment)


def listed() -> tuple[Listed, ...]:
    return tuple(_listed(environment) for environment in ENVIRONMENTS.values())


def require_something(environment: Environment) -> None:
    """Raises InputError where there is nothing to remove."""
    if not _folders(environment):
        raise InputError(f"{environment.name}: not installed", hint="infopt env list")


def remove(environment: Environment) -> int:
    """Deletes it, older locks' included; the bytes that are free again. Raises InputError where there is none, or a job
    runs in it."""
    require_something(environment)
    folders = _folders(environment)
    freed = sum(map(_bytes, folders))
    with cache.lock(environment.folder, wait=False):
        for folder in folders:
            (folder / STAMP).unlink(missing_ok=True)
            shutil.rmtree(folder)
    return freed


def _fill(environment: Environment, python: str, progress: Progress) -> None:
    name, inside = environment.name, str(environment.interpreter)
    log = environment.folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    total = sum(1 for line in environment.lock.read_text(encoding="utf-8").splitlines() if "==" in line)
    collected = 0

    def tell(line: str) -> None:
        nonlocal collected
        if line.startswith(("Collecting ", "Processing ")):  # from an index, from a file
            collected += 1
            progress(f"{name}: {min(collected, total)}/{total} {Path(line.split()[1]).name}")
        elif line.strip().startswith(("Downloading", "Installing collected")):
            progress(f"{name}: {line.strip()[:100]}")

    def run(what: str, *command: str) -> None:
        start = log.stat().st_size if log.exists() else 0
        code = child.stream(command, tell, log, child.plain_environment("PIP_TARGET", "PIP_USER", "PIP_PREFIX"))
        if code:
            said = child.last_words(log, start)
            index = "an index of CPU builds, which PIP_EXTRA_INDEX_URL can name, has it; " if "+cpu" in said else ""
            raise InfoptError(f"{name}: {what} failed: {said}", hint=f"{index}the whole of it: {log}")

    pip = (sys.executable, "-m", "pip", "--python", inside, "--disable-pip-version-check", "--no-input")
    progress(f"{name}: making {environment.folder}")
    with atomic.writing(environment.folder):
        run("making a virtual environment", python, "-m", "venv", "--without-pip", str(environment.folder))
    run("pip", *pip, "install", "-r", str(environment.lock))
    if environment.remove:
        run("pip", *pip, "uninstall", "--yes", *environment.remove)
    progress(f"{name}: trying it")
    run(environment.proof, inside, "-c", environment.proof)
    stamp = {"lock": environment.lock_hash, "bytes": _folder_bytes(environment.folder)}
    write_atomic(environment.folder / STAMP, json.dumps(stamp))
    log.unlink()


def _python(environment: Environment) -> str:
    """An interpreter of a version that the lock installs on: this one, or one on the PATH."""
    low, high = environment.python
    if low <= sys.version_info.minor <= high:
        return sys.executable
    for minor in range(high, low - 1, -1):
        if found := shutil.which(f"python3.{minor}"):
            return found
    message = f"{environment.name}: needs Python 3.{low} to 3.{high}; this one is 3.{sys.version_info.minor}"
    raise InputError(message, hint=f"put a python3.{high} on the PATH")


def _listed(environment: Environment) -> Listed:
    folders = _folders(environment)
    return Listed(
        name=environment.name,
        version=environment.version,
        is_installed=environment.is_installed(),
        bytes=sum(map(_bytes, folders)) if folders else None,
        path=environment.folder,
        about=environment.about,
    )


def _folders(environment: Environment) -> list[Path]:
    """Of this lock and of any other."""
    return sorted(folder for folder in root().glob(f"{environment.name}-*") if folder.is_dir())


def _bytes(folder: Path) -> int:
    """From the stamp where there is one: counting tens of thousands of files takes seconds."""
    try:
        return int(json.loads((folder / STAMP).read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return _folder_bytes(folder)


def _folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
