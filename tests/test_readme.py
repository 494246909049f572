"""The README tells the truth: its tables are the stored results, its commands exist and run, its messages are the real ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from readme_tables import PAGES, ROOT
from typer.main import get_command
from typer.testing import CliRunner

from infopt import recipe, techniques
from infopt.cli import app

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.split("  #")[0].split(" > ")[0] for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line]


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_stored_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert PAGES[page](text) == text, "run: python tests/readme_tables.py"


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("infopt")])
def test_every_command_and_flag_exists(line: str) -> None:
    group = get_command(app)
    name, *rest = shlex.split(line)[1:]
    command = group.commands[name]  # type: ignore[attr-defined]
    while rest and hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context(name, [arg for arg in rest if arg not in ("DIR",)] or rest)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make")])
def test_every_make_target_exists(line: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert shlex.split(line)[1] in targets


def test_the_recipe_shown_is_a_recipe() -> None:
    (text,) = [text for kind, text in BLOCKS if kind == "yaml"]
    document = yaml.safe_load(text)
    assert recipe.locate(document.pop("extends")).is_file()
    assert recipe.parse(document, techniques.find).gates


def test_the_refusal_shown_is_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = [text for kind, text in BLOCKS if kind == "console"]
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("version: 1\nsteps:\n  - rtn: {bit: 4}\n", encoding="utf-8")
    done = CliRunner().invoke(app, shlex.split(shown.splitlines()[0].removeprefix("$ infopt ")))
    assert done.exit_code == 2
    assert done.stderr.splitlines() == shown.splitlines()[1:]


def test_files_that_the_readme_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
