"""Where infopt keeps what it made or fetched, and how two processes make a thing once."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infopt.errors import InfoptError, InputError
from infopt.model.atomic import flock, new_folder
from infopt.result import write_atomic

_WAIT_S = 0.1


def cache_dir() -> Path:
    """`$INFOPT_CACHE`, else `$XDG_CACHE_HOME/infopt`, else `~/.cache/infopt`. It may not exist yet."""
    own = os.environ.get("INFOPT_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "infopt"


def build_once(
    folder: Path,
    builder: Callable[[Path], None],
    needed_bytes: int | None = None,
    is_whole: Callable[[Path], bool] = lambda folder: True,
) -> Path:
    """`folder`, which `builder` fills under a temporary name if it does not exist yet, or not as it was made.

    A second process waits for the first and finds the folder made. Raises DiskFullError, InfoptError, and whatever
    `builder` raises; then nothing is left behind.
    """
    if folder.is_dir() and is_whole(folder):
        return folder
    with lock(folder):
        if folder.is_dir() and not is_whole(folder):
            shutil.rmtree(folder)
        if not folder.is_dir():
            with new_folder(folder, needed_bytes) as temporary:
                builder(temporary)
    return folder


def file_hash(path: Path) -> str:
    """sha256 of a file's content, remembered in the cache.

    The note goes by device, inode, size and modification time, so that it outlives the rename that ends a save.
    """
    state = path.stat()
    key = f"{state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns}"
    note = cache_dir() / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    try:
        known = note.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    except (OSError, UnicodeDecodeError):
        pass
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, digest)
    except OSError:  # a cache that cannot be written costs time, not the answer
        pass
    return digest


@contextmanager
def lock(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """For making or removing `folder` by one process at a time, or, `shared`, for using it by several; the others wait.

    Raises InfoptError, and, without `wait`, InputError where others use it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stream = folder.with_name(f".{folder.name}.lock").open("w")
    except OSError as error:
        raise InfoptError(
            f"{folder.parent}: the cache cannot be written: {error.strerror}", hint="set INFOPT_CACHE to a folder you may write"
        ) from error
    with stream:
        while not flock(stream.fileno(), shared=shared):
            if not wait:
                raise InputError(f"{folder}: in use by another process", hint="wait until it has ended")
            time.sleep(_WAIT_S)
        yield
