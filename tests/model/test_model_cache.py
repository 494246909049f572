from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from infopt.errors import InfoptError
from infopt.model import atomic, cache


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "own"))
    assert cache.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("INFOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / "infopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / ".cache" / "infopt"


def test_of_two_at_once_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    """flock holds per open file, so two threads stand for two processes."""
    built: list[str] = []
    started, go_on = threading.Event(), threading.Event()

    def build(target: Path) -> None:
        built.append(target.name)
        started.set()
        assert go_on.wait(20)
        (target / "file").write_text("x")

    found: list[bool] = []

    def make() -> None:
        found.append((cache.build_once(tmp_path / "made", build) / "file").is_file())

    first, second = threading.Thread(target=make), threading.Thread(target=make)
    first.start()
    assert started.wait(20)
    second.start()
    second.join(0.1)
    assert not (tmp_path / "made").exists()
    assert not found
    go_on.set()
    first.join(20)
    second.join(20)
    assert found == [True, True]
    assert len(built) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".made.lock", "made"]


def test_a_failed_build_leaves_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.build_once(tmp_path / "made", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".made.lock"]
    cache.build_once(tmp_path / "made", lambda target: None)
    assert (tmp_path / "made").is_dir()


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = [
        tmp_path / f".made.{dead.pid}.tmp",
        tmp_path / f".made.{dead.pid}.partial",
        tmp_path / f"..made.1.partial.{dead.pid}.tmp",
    ]
    kept = [tmp_path / f".made.{os.getpid()}.partial", tmp_path / f".other.{dead.pid}.tmp", tmp_path / ".made.notes.tmp"]
    for folder in stale + kept:
        folder.mkdir()
    atomic.sweep(tmp_path / "made")
    assert not any(folder.exists() for folder in stale)
    assert all(folder.exists() for folder in kept)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InfoptError, match="the cache cannot be written") as caught:
        cache.build_once(tmp_path / "file" / "made", lambda target: None)
    assert "INFOPT_CACHE" in str(caught.value.hint)


def test_file_hashes_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    path = tmp_path / "file"
    path.write_text("one")
    assert cache.file_hash(path) == hashlib.sha256(b"one").hexdigest()
    path = path.rename(tmp_path / "renamed")
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert cache.file_hash(path) == hashlib.sha256(b"one").hexdigest()
    path.write_text("two!")
    assert cache.file_hash(path) == hashlib.sha256(b"two!").hexdigest()


def test_a_cache_that_is_no_folder_still_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "file"))
    assert len(cache.file_hash(tmp_path / "file")) == 64
