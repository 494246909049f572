"""optimum-quanto's own kernels: compiled once inside its package folder, at the first int4 product.

torch's extension builder waits for ever on a lock file that a killed build left behind, and finds ninja only on the
PATH, where a virtual environment that was never activated does not put it.
"""

from __future__ import annotations

import os
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from infopt.errors import InfoptError
from infopt.protocols import Progress

#: A build in progress touches its folder at least this often; an older lock belongs to a build that died.
STALE_S = 300.0
POLL_S = 1.0


def folder(device_type: str) -> Path:
    """Where the library builds the kernels for this kind of device."""
    from optimum.quanto.library import extensions

    kind = "cuda" if device_type == "cuda" else "cpp"
    return Path(extensions.__file__).parent / kind / "build"


def is_built(device_type: str = "cpu") -> bool:
    """Whether the kernels are there for the torch at hand, so that nothing is compiled at first use."""
    build = folder(device_type)
    stamp = build / "pytorch_version.txt"
    return any(build.glob("*.so")) and stamp.is_file() and stamp.read_text().strip() == torch.__version__


def ready(device: torch.device, progress: Progress) -> None:
    """Builds the kernels where they are missing, and runs one. Raises InfoptError when that fails."""
    build = folder(device.type)
    if not is_built(device.type):
        progress("compiling optimum-quanto's kernels, once; this takes minutes on a small machine")
    clear_stale_lock(build, progress)
    try:
        with ninja_on_path():
            torch.ops.quanto.unpack(torch.zeros(4, dtype=torch.uint8, device=device), 4)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InfoptError(f"optimum-quanto's kernels do not compile in {build}: {reason}", hint="infopt doctor") from error


def clear_stale_lock(build: Path, progress: Progress, stale_s: float = STALE_S) -> None:
    """Waits while another build is at work, and removes the lock of one that died."""
    lock = build / "lock"
    is_told = False
    while lock.exists():
        newest = max((path.stat().st_mtime for path in build.iterdir() if path.exists()), default=0.0)
        if time.time() - newest > stale_s:
            lock.unlink(missing_ok=True)
            progress(f"removed the lock that a killed build left in {build}")
            return
        if not is_told:
            progress("waiting for another build of optimum-quanto's kernels")
            is_told = True
        time.sleep(POLL_S)


@contextmanager
def ninja_on_path() -> Iterator[None]:
    """Puts this environment's scripts first on the PATH, and takes them off again."""
    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join(filter(None, (sysconfig.get_path("scripts"), before)))
    try:
        yield
    finally:
        with suppress(KeyError):
            del os.environ["PATH"]
        if before is not None:
            os.environ["PATH"] = before
