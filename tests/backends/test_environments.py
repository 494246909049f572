"""Environments: made from a lock or not at all, listed, removed; installed for real once, from a wheel made here."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infopt import needs, techniques
from infopt.backends import child, environments, install, work
from infopt.backends.environments import STAMP, Environment
from infopt.cli import app
from infopt.errors import DiskFullError, InfoptError, InputError
from infopt.model import cache
from infopt.model.cache import cache_dir
from infopt.needs import Needs, missing_need

OWN = Environment("own", "made up", package="nothing", proof="import nothing", bytes=1)


@pytest.fixture
def lock(locks: Path) -> Path:
    """Of the environment `own`."""
    path = locks / "own.txt"
    path.write_text("nothing==1.0\n", encoding="utf-8")
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds the wheels in this folder, and nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "nothing", "VERSION = 1\n")
    wheel(folder, "superfluous", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path, name: str, code: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", code)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


# --- For real ----------------------------------------------------------------------------------------------------------


def test_installs_what_the_lock_says_and_removes_it(lock: Path, wheels: Path) -> None:
    lock.write_text("nothing==1.0\nsuperfluous==1.0\n", encoding="utf-8")
    environment = Environment("own", "made up", package="nothing", proof="import nothing", bytes=1, remove=("superfluous",))
    lines: list[str] = []
    made = install.install(environment, lines.append)
    assert made.is_installed
    assert made.version == "1.0"
    assert made.bytes is not None
    assert any(line.startswith("own: 2/2 superfluous") for line in lines)
    assert lines[-1] == "own: trying it"
    python = str(environment.interpreter)
    log = environment.folder / "log"
    tried = "import nothing, sys; print(sys.prefix)"
    assert child.stream([python, "-c", tried], lines.append, log, child.plain_environment()) == 0
    assert lines[-1] == str(environment.folder)
    assert child.stream([python, "-c", "import superfluous"], lines.append, log, child.plain_environment()) == 1
    again: list[str] = []
    assert install.install(environment, again.append).bytes == made.bytes
    assert again == []
    assert install.remove(environment) == made.bytes
    assert not environment.folder.exists()
    with pytest.raises(InputError, match="own: not installed"):
        install.remove(environment)


def test_a_lock_that_pip_cannot_satisfy_is_told_with_its_words(lock: Path, wheels: Path) -> None:
    lock.write_text("nothing==2.0\n", encoding="utf-8")
    with pytest.raises(InfoptError, match=r"own: pip failed: .*No matching distribution found for nothing==2\.0") as caught:
        install.install(OWN)
    log = Path(str(caught.value.hint).removeprefix("the whole of it: "))
    assert "nothing==2.0" in log.read_text(encoding="utf-8")
    assert not OWN.folder.exists()
    assert not OWN.is_installed()


def test_where_cpu_builds_come_from_is_told(lock: Path, wheels: Path) -> None:
    lock.write_text("nothing==1.0+cpu\n", encoding="utf-8")
    with pytest.raises(InfoptError, match=r"nothing==1\.0\+cpu") as caught:
        install.install(OWN)
    assert str(caught.value.hint).startswith("an index of CPU builds, which PIP_EXTRA_INDEX_URL can name, has it; the whole")


def test_what_the_user_set_for_python_and_pip_changes_nothing(
    lock: Path, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    for name, value in (("PYTHONSAFEPATH", "1"), ("PYTHONPATH", str(tmp_path)), ("PYTHONSTARTUP", "x")):
        monkeypatch.setenv(name, value)
    install.install(OWN)
    assert OWN.is_installed()
    assert not (tmp_path / "elsewhere").exists()
    assert [name for name in child.plain_environment() if name.startswith("PYTHON")] == ["PYTHONNOUSERSITE"]


def test_an_environment_in_use_is_not_removed(lock: Path, filled: None) -> None:
    install.install(OWN)
    with cache.lock(OWN.folder, shared=True), cache.lock(OWN.folder, shared=True):  # two jobs
        with pytest.raises(InputError, match="in use by another process"):
            install.remove(OWN)
        assert OWN.is_installed()
    assert install.remove(OWN)


def test_what_does_not_import_is_not_installed(lock: Path, wheels: Path) -> None:
    broken = Environment("own", "", package="nothing", proof="import nothing.at_all", bytes=1)
    with pytest.raises(InfoptError, match=r"import nothing\.at_all failed: ModuleNotFoundError"):
        install.install(broken)
    assert not broken.folder.exists()


# --- With installing left out ------------------------------------------------------------------------------------------


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for venv and pip: every command succeeds, and the folder gets a file."""

    def stream(command: list[str], on_line: object, log: Path, environment: object) -> int:
        log.touch()
        OWN.folder.mkdir(parents=True, exist_ok=True)
        (OWN.folder / "library").write_bytes(b"x" * 1000)
        return 0

    monkeypatch.setattr(child, "stream", stream)


def test_a_killed_install_is_none_and_is_done_again(lock: Path, filled: None) -> None:
    (OWN.folder / "bin").mkdir(parents=True)
    (OWN.folder / "bin" / "python").touch()
    assert not OWN.is_installed()
    assert missing_need(Needs(environment=OWN)) is not None
    install.install(OWN)
    assert OWN.is_installed()
    assert not (OWN.folder / "bin").exists(), "what was there before is not trusted"
    assert missing_need(Needs(environment=OWN)) is None


def test_an_interrupted_install_leaves_nothing(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(command: list[str], on_line: object, log: Path, environment: object) -> int:
        OWN.folder.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(child, "stream", stream)
    with pytest.raises(KeyboardInterrupt):
        install.install(OWN)
    assert not OWN.folder.exists()


def test_another_lock_is_another_environment(lock: Path, filled: None) -> None:
    install.install(OWN)
    first = OWN.folder
    lock.write_text("nothing==1.1\n", encoding="utf-8")
    assert not OWN.is_installed()
    assert OWN.version == "1.1"
    assert OWN.folder != first
    found = install._listed(OWN)
    assert (found.is_installed, found.bytes is not None) == (False, True)
    install.remove(OWN)
    assert not first.exists()


def test_a_full_disk_is_told_before_anything_is_fetched(lock: Path) -> None:
    huge = Environment("own", "", package="nothing", proof="", bytes=10**18)
    with pytest.raises(DiskFullError, match="no space"):
        install.install(huge)


def test_a_python_that_the_lock_does_not_know_is_refused(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    future = Environment("own", "", package="nothing", proof="", bytes=1, python=(90, 91))
    with pytest.raises(InputError, match=r"own: needs Python 3\.90 to 3\.91"):
        install.install(future)
    assert install._python(OWN) == sys.executable


# --- What is shipped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", environments.ENVIRONMENTS.values(), ids=lambda each: each.name)
def test_locks_pin_every_package_and_torch_first(environment: Environment) -> None:
    lines = environment.lock.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("torch==")
    assert all(line.count("==") == 1 for line in lines)
    assert environment.version


def test_every_technique_out_of_process_has_its_worker_script() -> None:
    needed = {name: environment for name in techniques.names() if (environment := _needs(name).environment)}
    assert {"llmcompressor", "autoround"} <= set(needed)
    for environment in needed.values():
        assert environments.find(environment.name) is environment
        assert (work.SCRIPTS / f"{environment.name}_worker.py").is_file()


def _needs(name: str) -> Needs:
    kind = techniques.find(name)
    return kind(kind.Options()).needs


def test_a_missing_environment_is_told_with_the_line_that_makes_it() -> None:
    found = missing_need(Needs(environment=environments.LLMCOMPRESSOR))
    assert found == needs.Missing(
        "needs the environment llmcompressor, which is not installed", hint="infopt env install llmcompressor"
    )
    shown = CliRunner().invoke(app, ["recipes", "check", "llmcompressor_gptq"])
    assert shown.exit_code == 0
    assert "note: llmcompressor_gptq: steps[0].llmcompressor: needs the environment llmcompressor" in shown.stdout
    assert shown.stdout.endswith("which is not installed: infopt env install llmcompressor\n")


# --- The command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def registered(lock: Path, filled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"own": OWN})
    monkeypatch.setattr(install, "ENVIRONMENTS", {"own": OWN})


def invoke(*arguments: str, code: int = 0, answer: str = "") -> str:
    found = CliRunner().invoke(app, ["env", *arguments], input=answer)
    assert found.exit_code == code, found.output
    return found.stdout if code == 0 else found.stderr


def test_the_command_installs_lists_and_removes(registered: None) -> None:
    assert "–" in invoke("list")
    made = json.loads(invoke("install", "own", "--yes", "--json"))
    assert made["is_installed"]
    assert made["bytes"] >= 1000
    (listed,) = json.loads(invoke("list", "--json"))["environments"]
    assert listed == {key: made[key] for key in listed}
    assert "installed" in invoke("list")
    assert invoke("install", "own").startswith("own: nothing 1.0, ")
    assert "removed own" in invoke("rm", "own", "--yes")
    assert not OWN.is_installed()


def test_the_command_asks_and_takes_silence_for_a_no(registered: None) -> None:
    assert "own: not installed" in (said := invoke("rm", "own", code=2))
    assert "Remove" not in said
    assert "own: not installed" in invoke("install", "own", code=2)
    assert "own: not installed" in invoke("install", "own", code=2, answer="n\n")
    invoke("install", "own", answer="y\n")
    assert "own: kept" in invoke("rm", "own", code=2)
    assert json.loads(invoke("rm", "own", "--yes", "--json"))["removed"] == "own"


def test_the_command_names_the_nearest_environment() -> None:
    assert "did you mean 'llmcompressor'" in invoke("install", "llm-compressor", "--yes", code=2)


def test_a_broken_stamp_costs_time_not_the_answer(lock: Path, filled: None) -> None:
    install.install(OWN)
    (OWN.folder / STAMP).write_text("{", encoding="utf-8")
    found = install._listed(OWN)
    assert found.bytes is not None
    assert found.bytes >= 1000
    assert cache_dir() in found.path.parents
