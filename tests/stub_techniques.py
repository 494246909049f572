"""Techniques made up for tests, and recipes with them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, Literal

import pytest
from pydantic import Field

from infopt import recipe, techniques
from infopt.recipe import Recipe
from infopt.techniques.base import Modules, Options, Technique

#: Eight windows of 64 byte tokens of a text that is neither bundled nor random.
CALIBRATION = tuple(
    tuple(3 + (17 * position + 29 * window * window + position * position % 23) % 250 for position in range(64))
    for window in range(8)
)


class RoundOptions(Options):
    bits: Literal[4, 8] = 4
    group_size: int | None = Field(default=64, ge=8)
    exact: bool = True
    ignore: Modules = ("lm_head",)


class Round(Technique):
    """A technique whose options these tests know."""

    Options = RoundOptions


def find(name: str, path: str) -> type[Technique]:
    return Round if name == "round" else techniques.find(name, path)


def chosen(*steps: Any, **sections: Any) -> Recipe:
    """A recipe of registered techniques."""
    return recipe.parse({"version": 1, "name": "own", "steps": list(steps), **sections}, techniques.find)


def register(technique: type[Technique], patch: pytest.MonkeyPatch) -> None:
    """Puts a technique into the registry under its class name."""
    name = technique.__name__.lower()
    module = ModuleType(name)
    module.TECHNIQUE = technique  # type: ignore[attr-defined]
    known = techniques.names()
    patch.setattr(techniques, "names", lambda: [*known, name])
    patch.setitem(sys.modules, f"infopt.techniques.{name}", module)
