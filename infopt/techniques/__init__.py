"""One file per recipe step; the folder is the registry.

The key of a step in a recipe is a file name here. Nothing is imported until a recipe asks for it.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from infopt.errors import RecipeError, unknown
from infopt.recipe import Recipe
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


def check_order(chosen: Recipe) -> None:
    """Raises RecipeError for a step that would change weights after they are packed, or their KV scales recorded, and for one
    whose teacher has other tokens than the model by then."""
    last: Technique | None = None
    renumbered: str | None = None
    for index, step in enumerate(chosen.steps):
        place = chosen.place(index)
        technique = find(step.name, place)(step.options)
        if last is not None and not technique.at_load and (last.is_record or not technique.is_record):
            before = "whose KV scales would not fit then" if last.is_record else "after which the weights are packed"
            hint = "move kv_cache to the end" if last.is_record else "keep one quantizing step in the recipe"
            raise RecipeError(place, f"follows {chosen.steps[index - 1].name}, {before}", hint=hint)
        if renumbered and technique.holds_against_reference:
            message = f"follows {renumbered}, after which the model has other tokens than its teacher"
            raise RecipeError(place, message, hint=f"put {renumbered} behind {step.name}")
        if technique.packs or technique.is_record:
            last = technique
        if not technique.keeps_vocabulary:
            renumbered = step.name
