"""The architecture: imports point down, siblings stay apart, the spine is torch-free, every technique is complete."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "infopt"

#: From the ground up. A module may import its own unit and any unit of a lower level, never one of its own level.
LEVELS: list[list[str]] = [
    ["errors"],
    ["units"],
    ["figures", "stats"],
    ["shares"],
    ["gates", "result"],
    ["artifact", "checks", "findings", "judgement"],
    ["comparison", "verdict"],
    ["sections"],
    ["recipe", "report"],
    ["needs", "protocols", "settings"],
    ["data", "workload"],
    ["model"],
    ["kernels"],
    ["layers"],
    ["calibrate"],
    ["distil"],
    ["runtime"],
    ["backends"],
    ["techniques", "engines", "measure", "quality"],
    ["arms", "host", "judging", "process"],
    ["arm_run", "pipeline"],
    ["leakage", "step_log"],
    ["assess", "bench", "doctor", "forecast", "inspect", "models", "optimize", "results"],
    ["compare", "export", "generate", "worker"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
LEVEL_OF = {unit: number for number, units in enumerate(LEVELS) for unit in units}
#: May import torch when they are imported themselves; everything else only inside functions.
TORCH_AT_IMPORT = ("layers", "kernels", "calibrate", "distil", "runtime")
HEAVY = {"torch", "transformers", "bitsandbytes", "compressed_tensors", "optimum", "accelerate", "peft", "scipy"}
MODULES = sorted(path for path in ROOT.rglob("*.py"))


def unit_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.Module) -> list[tuple[str, bool]]:
    """(dotted module, whether it runs at import time) of every import, TYPE_CHECKING blocks left out."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        inner = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.extend((f"{node.module}.{alias.name}", at_import) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(tree, True)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        return
    assert unit in LEVEL_OF, f"{unit} has no level: say in LEVELS where it stands"
    for name, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] != "infopt" or len(parts) < 2 or parts[1] in (unit, "__version__"):
            continue
        assert LEVEL_OF[parts[1]] < LEVEL_OF[unit], f"{unit} imports {parts[1]}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_heavy_is_imported_at_import_time(path: Path) -> None:
    at_import = {name.split(".")[0] for name, now in imports(ast.parse(path.read_text(encoding="utf-8"))) if now}
    allowed = {"torch"} if unit_of(path) in TORCH_AT_IMPORT else set()
    assert not at_import & HEAVY - allowed


def test_the_whole_spine_imports_without_torch() -> None:
    units = [
        unit for unit in LEVEL_OF if unit not in TORCH_AT_IMPORT and ((ROOT / f"{unit}.py").exists() or (ROOT / unit).exists())
    ]
    code = (
        "import sys\n" + "\n".join(f"import infopt.{unit}" for unit in units) + f"\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_keep_their_size(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            signature = node.args.args + node.args.kwonlyargs  # a command's flags are its signature, one a line
            length = (node.end_lineno or 0) - node.lineno + 1 - (len(signature) if unit_of(path) == "cli" else 0)
            assert length <= 60, f"{node.name} has {length} lines"


def test_no_file_is_named_after_nothing() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "common", "misc"}


def test_every_technique_has_its_recipe_and_its_test() -> None:
    from infopt import recipe, techniques

    recipes = {path.stem: recipe.load(str(path), techniques.find) for path in recipe.shipped().values()}
    for name in techniques.names():
        assert any(step.name == name for found in recipes.values() for step in found.steps), f"no recipe uses {name}"
        assert any(stem == name or stem.startswith(f"{name}_") for stem in recipes), (
            f"no recipes/{name}.yaml or recipes/{name}_*.yaml"
        )
        assert (Path(__file__).parent / "techniques" / f"test_{name}.py").is_file(), f"no tests/techniques/test_{name}.py"
