"""Where the library comes from, and what is said where it cannot come."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from infopt.errors import MissingNeedError
from infopt.kernels import build, library


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that copies a file to where the library is wanted, and counts how often."""
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\necho x >> "$0.calls"\nwhile [ "$1" != -o ]; do shift; done\necho made > "$2"\n', encoding="utf-8"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that makes a library of the C interface's names alone, in no time."""
    names = " ".join(f"void {name}(void) {{}}" for name in library.FUNCTIONS if name != "infopt_isa")
    source = tmp_path / "small.cpp"
    source.write_text(f'extern "C" {{ const char* infopt_isa() {{ return ISA; }} {names} }}\n', encoding="utf-8")
    script = tmp_path / "small"
    script.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n'
        f'exec c++ -fPIC -shared "-DISA=\\"${{SMALL_ISA:-plain}}\\"" {source} -o "$2"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script


def test_it_is_built_once(own_cache: Path, compiler: Path) -> None:
    first = build.find("plain")
    assert first == own_cache / build.file_name("plain")
    assert build.find("plain") == first
    assert Path(f"{compiler}.calls").read_text().count("x") == 1
    assert [path.name for path in own_cache.iterdir()] == [first.name], "nothing is left behind"


def test_other_sources_have_another_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build.file_name("plain")
    (tmp_path / "infopt.cpp").write_text("int x;", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.file_name("plain") != before


def test_a_library_in_the_package_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    (tmp_path / build.file_name("plain")).write_bytes(sealed(b"prebuilt"))
    assert build.find("plain") == tmp_path / build.file_name("plain")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_that_cannot_be_written(own_cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(self: Path, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    found = build.find("plain")
    assert found.read_bytes().startswith(b"made\n")
    assert not found.is_relative_to(own_cache)


def test_a_file_where_the_cache_should_be(own_cache: Path, compiler: Path) -> None:
    own_cache.parent.write_text("no folder", encoding="utf-8")
    assert build.is_whole(build.find("plain"))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingNeedError, match="no C\\+\\+ compiler") as caught:
        build.find("plain")
    assert "engine: {name: transformers}" in str(caught.value.hint)


def test_a_compiler_that_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'x.h:1: fatal error: no such header' >&2\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(MissingNeedError, match="fatal error: no such header"):
        build.find("plain")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(MissingNeedError, match="cannot be run"):
        build.find("plain")
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(MissingNeedError, match="it wrote nothing"):
        build.find("plain")


def test_a_set_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "usable", lambda: ("plain",))
    monkeypatch.setattr(build, "find", lambda isa: pytest.fail("it was looked for"))
    monkeypatch.setenv("INFOPT_ISA", "avx2")
    for isa, named in (("avx512", "avx512"), (None, "avx2"), ("sse9", "sse9")):
        with pytest.raises(MissingNeedError, match=f"does not run {named}") as caught:
            library.load.__wrapped__(isa)
        assert caught.value.hint == "it runs plain"


def sealed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def foreign(content: bytes) -> bytes:
    """A library, whole, of a processor that there is none of."""
    return sealed(content[:18] + b"\xfe\xca" + content[20:-32])


@pytest.mark.parametrize(
    "damage", [lambda whole: b"", lambda whole: b"cut short", lambda whole: whole[: len(whole) // 2], foreign]
)
def test_a_damaged_library_is_built_again(own_cache: Path, small: Path, damage: Callable[[bytes], bytes]) -> None:
    kept = build.find("plain")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert library.load.__wrapped__("plain").infopt_isa() == b"plain"
    assert build.is_whole(kept)
    assert kept.read_bytes()[18:20] == whole[18:20], "of this processor"


def test_a_library_of_another_set(own_cache: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_ISA", "avx9")
    with pytest.raises(MissingNeedError, match="was built for avx9, not for plain") as caught:
        library.load.__wrapped__("plain")
    assert caught.value.hint == f"remove {own_cache / build.file_name('plain')}"


def test_a_library_that_cannot_be_loaded(compiler: Path) -> None:
    with pytest.raises(MissingNeedError, match="cannot be loaded") as caught:
        library.load.__wrapped__("plain")
    assert "INFOPT_CACHE" in str(caught.value.hint)


def test_features_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"x86_64": "flags\t: fpu avx2 fma f16c", "aarch64": "Features\t: fp asimd asimddp"}
    monkeypatch.setattr(build, "features", build.features.__wrapped__)
    for machine, line in lines.items():
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        monkeypatch.setattr(Path, "read_text", lambda self, line=line, **options: f"model\t: x\n{line}\n")
        assert build.usable.__wrapped__() == {"x86_64": ("avx2", "plain"), "aarch64": ("neon", "plain")}[machine]
