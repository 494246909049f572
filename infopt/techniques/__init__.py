"""One file per recipe step; the folder is the registry.

The key of a step in a recipe is a file name here. Nothing is imported until a recipe asks for it.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from infopt.errors import RecipeError, unknown
from infopt.techniques.base import Technique


def names() -> list[str]:
    """Every technique there is, by file name."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "base"))


def find(name: str, path: str = "steps") -> type[Technique]:
    """The technique class in `techniques/<name>.py`. Raises RecipeError naming the nearest technique."""
    if name not in names():
        raise RecipeError(path, unknown("technique", name, names()), hint="infopt recipes list")
    module = importlib.import_module(f"{__name__}.{name}")
    technique: type[Technique] = module.TECHNIQUE
    return technique
