"""Where the library comes from, and what is said where it cannot come."""

from __future__ import annotations

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
    (tmp_path / build.file_name("plain")).write_text("prebuilt", encoding="utf-8")
    assert build.find("plain") == tmp_path / build.file_name("plain")


def test_a_cache_that_cannot_be_written(own_cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    found = build.find("plain")
    assert found.read_text() == "made\n"
    assert not found.is_relative_to(own_cache)


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


def test_a_set_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "usable", lambda: ("plain",))
    with pytest.raises(MissingNeedError, match="does not run avx512") as caught:
        library.load.__wrapped__("avx512")
    assert caught.value.hint == "it runs plain"


def test_a_file_that_is_no_library_is_built_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_cache.mkdir(parents=True)
    (own_cache / build.file_name("plain")).write_text("cut short", encoding="utf-8")
    monkeypatch.delenv("CXX", raising=False)
    assert library.load.__wrapped__("plain").infopt_isa() == b"plain"


def test_features_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"x86_64": "flags\t: fpu avx2 fma f16c", "aarch64": "Features\t: fp asimd asimddp"}
    for machine, line in lines.items():
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        monkeypatch.setattr(Path, "read_text", lambda self, line=line, **options: f"model\t: x\n{line}\n")
        assert build.usable.__wrapped__() == {"x86_64": ("avx2", "plain"), "aarch64": ("neon", "plain")}[machine]
