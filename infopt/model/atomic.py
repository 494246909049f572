"""Folders that are complete or absent, and a disk that runs full in one line."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infopt.errors import DiskFullError, InfoptError, InputError
from infopt.units import size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(target: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well and is gone when it does not.

    Everything is on the disk before the rename, so a `target` that exists is complete. `needed_bytes` is checked
    against the free space first. Raises DiskFullError, and InfoptError for any other failure to write.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            sweep(target)
        if needed_bytes is not None and free_bytes(target) < needed_bytes:
            raise _full(target, needed_bytes)
        with writing(target, needed_bytes):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_file(target: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """As `new_folder`, for one file: yields where to write it; it gets the name `target` when the block ends well."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with writing(target, needed_bytes):
            target.parent.mkdir(parents=True, exist_ok=True)
            sweep(target)
            if needed_bytes is not None and free_bytes(target) < needed_bytes:
                raise _full(target, needed_bytes)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary / target.name
            _flush(temporary)
            (temporary / target.name).replace(target)
            _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def sole(lock: Path, target: Path) -> Iterator[None]:
    """For one process at a time, by the file `lock`, which names it and may be removed inside the block.

    Raises InputError where another process makes `target` already.
    """
    with lock.open("a+", encoding="ascii") as stream:
        try:
            is_ours = flock(stream.fileno()) and os.path.samestat(os.fstat(stream.fileno()), lock.stat())
        except FileNotFoundError:  # the other one has ended, and removed it, in between
            is_ours = False
        if not is_ours:
            stream.seek(0)
            raise InputError(
                f"{target}: process {stream.read() or '?'} is writing it", hint="wait for that one, or choose another name"
            )
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def flock(descriptor: int, *, shared: bool = False) -> bool:
    """Takes the lock, which ends with the file's closing; False where another process holds it. `shared`: with any others."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def publish(folder: Path, target: Path) -> None:
    """Renames `folder` to `target` once all of it is on the disk. `target` must not exist, or be an empty folder."""
    with writing(target):
        _flush(folder)
        folder.replace(target)
        _sync(target.parent)


@contextmanager
def writing(target: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns a failure to write into DiskFullError where the disk is full, else InfoptError."""
    try:
        yield
    except Exception as error:
        code = _error_number(error)
        if code is None:
            raise
        if code in _FULL:
            raise _full(target, needed_bytes) from error
        raise InfoptError(f"{target}: cannot be written: {os.strerror(code)}", hint="choose another folder") from error


def free_bytes(path: Path) -> int:
    """Free space for this user where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _full(target: Path, needed_bytes: int | None) -> DiskFullError:
    needed = "" if needed_bytes is None else f"{size(needed_bytes)} needed, "
    return DiskFullError(
        f"{target}: no space left: {needed}{size(free_bytes(target))} free",
        hint="free some space or choose a folder on another disk",
    )


def _error_number(error: BaseException) -> int | None:
    """The errno of a failed write. safetensors has its own exception and puts the number in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def sweep(target: Path) -> None:
    """Removes the unfinished folders (`.tmp`, `.partial`) that writers of `target` left when they were killed."""
    name = glob.escape(target.name)
    for stale in [*target.parent.glob(f".{name}.*"), *target.parent.glob(f"..{name}.*")]:
        number = stale.name.split(".")[-2]
        if stale.suffix not in (".tmp", ".partial"):
            continue
        if number.isdigit() and not _runs(int(number)):
            shutil.rmtree(stale, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush(folder: Path) -> None:
    """Writes every file through to the disk, and gives it the mode any new file would have (safetensors makes 0600)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~mask)
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
