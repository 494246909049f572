"""Commands that must feel instant import nothing heavy; how long they take is measured by benchmarks/start_up.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infopt.errors import Exit

HEAVY = ("torch", "transformers", "scipy", "bitsandbytes", "compressed_tensors", "optimum")
#: The command in a process of its own, which tells on leaving what it had imported.
CODE = f"""
import atexit, sys
atexit.register(lambda: print(sorted({set(HEAVY)!r} & set(sys.modules)), file=sys.stderr))
from infopt.cli import main
main()
"""
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command", [(), ("bench",), ("compare",), ("optimize",), ("recipes",), ("models",), ("results",), ("data",)]
)
def test_help(command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert done.returncode == Exit.OK
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    "command",
    [
        ("optimize", "demo", "-r"),
        ("bench", "demo", "-r"),
        ("generate", "demo", "hi", "-r"),
        ("recipes", "check"),
        ("compare", "demo", "demo:"),
    ],
)
def test_a_refused_recipe(tmp_path: Path, command: tuple[str, ...]) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("version: 1\nsteps:\n  - rtn: {bit: 4}\n", encoding="utf-8")
    *first, last = command
    arguments = [*first, last + str(recipe)] if last.endswith(":") else [*command, str(recipe)]
    done = run(*arguments)
    assert done.returncode == Exit.USAGE
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_refused_recipe_needs_no_numpy_either(tmp_path: Path) -> None:
    code = CODE.replace("'torch'", "'torch', 'numpy', 'jinja2'")
    assert "numpy" in code
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", "demo", "demo:no-such-recipe"], capture_output=True, text=True, check=False
    )
    assert done.returncode == Exit.USAGE
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_stored_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import start_up

    folders = [str(start_up.write_run(tmp_path / "results" / label, label)) for label in ("before", "after")]
    done = run("compare", *folders)
    assert done.returncode == Exit.OK
    assert "PASS" in done.stdout
    assert done.stderr == "[]\n"
