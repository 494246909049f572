"""An arm: one model, one recipe, one engine. Parsed from `MODEL[:RECIPE]`, checked before any process starts.

Torch-free: comparing needs to know what an arm is, only its worker opens it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infopt import artifact, engines, recipe, techniques
from infopt.errors import InputError, RecipeError, unknown
from infopt.recipe import Recipe

#: The recipe of a model that is named without one.
DEFAULT = "as_stored"


@dataclass(frozen=True)
class ArmSpec:
    """What a worker needs to open an arm. `recipe` is resolved; an artifact's own run-time half is already in it.

    `made_from`: what the user named, when `model` is the artifact that the cache holds for it.
    """

    label: str
    model: str
    recipe: Recipe
    is_artifact: bool = False
    made_from: str | None = None

    @property
    def named(self) -> str:
        """The model as the user named it."""
        return self.made_from or self.model

    def as_dict(self) -> dict[str, Any]:
        return {"label": self.label, "model": self.model, "recipe": self.recipe.as_dict(), "is_artifact": self.is_artifact}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ArmSpec:
        document = recipe.parse(data["recipe"], techniques.find)
        return ArmSpec(data["label"], data["model"], document, data["is_artifact"])


def split(text: str) -> tuple[str, str | None]:
    """`demo:recipes/int8.yaml` → (`demo`, `recipes/int8.yaml`)."""
    model, colon, name = text.rpartition(":")
    return (model, name) if colon and model and not Path(text).exists() else (text, None)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe of a file or name, its engine included. Raises RecipeError."""
    chosen = recipe.load(name, techniques.find, overrides)
    if chosen.engine.name not in engines.names():
        raise RecipeError("engine.name", unknown("engine", chosen.engine.name, engines.names()))
    if chosen.sampling.choose == "mean_logprob" and chosen.engine.name not in engines.WITH_LOGPROBS:
        raise RecipeError(
            "sampling.choose",
            f"found mean_logprob with engine {chosen.engine.name}; allowed with engine {', '.join(engines.WITH_LOGPROBS)}",
            hint="engine: {name: native}, or choose: majority",
        )
    techniques.check_order(chosen)
    return chosen


def spec(model: str, recipe_name: str | None, overrides: Sequence[str] = (), dtype: str | None = None) -> ArmSpec:
    """The arm of a model and a recipe (default: `as_stored`, or an artifact's own). Raises InputError.

    An artifact is already optimized: a recipe given for it may only change how it runs.
    """
    overrides = [*overrides, f"engine.dtype={dtype}"] if dtype else list(overrides)
    folder = Path(model).expanduser()
    model = str(folder) if model.startswith("~") else model
    if not artifact.is_artifact(folder):
        chosen = load_recipe(recipe_name or DEFAULT, overrides)
        label = chosen.name if recipe_name else _short(model)
        return ArmSpec(label, model, chosen)
    if recipe_name is None:
        own = load_recipe(str(folder / "recipe.yaml"), overrides)
        if overrides and own.steps != load_recipe(str(folder / "recipe.yaml")).steps:
            raise _already(folder, "--set would change its weights again", "")
        return ArmSpec(folder.name, model, own, is_artifact=True)
    chosen = load_recipe(recipe_name, overrides)
    if chosen.steps:
        raise _already(folder, f"recipe {chosen.name!r} would change its weights again", f":{recipe_name}")
    return ArmSpec(f"{folder.name}:{chosen.name}", model, chosen, is_artifact=True)


def _already(folder: Path, problem: str, suffix: str) -> InputError:
    source = artifact.read_artifact(folder).reference
    return InputError(f"{folder} is already optimized; {problem}", hint=f"give the reference model instead: {source}{suffix}")


def parse(texts: Sequence[str], overrides: Sequence[str] = (), dtype: str | None = None) -> tuple[ArmSpec, ...]:
    """Arms with labels that differ, also as names of files; the first is the baseline."""
    arms = [spec(*split(text), overrides, dtype) for text in texts]
    labels: list[str] = []
    for arm in arms:
        label, number = arm.label, 2
        while file_name(label) in map(file_name, labels):
            label, number = f"{arm.label} ({number})", number + 1
        labels.append(label)
    return tuple(ArmSpec(label, arm.model, arm.recipe, arm.is_artifact) for label, arm in zip(labels, arms, strict=True))


def is_stored(texts: Sequence[str]) -> bool:
    """Whether the arguments are results folders. Raises InputError when results and models are mixed."""
    stored = [text for text in texts if (Path(text) / "run.json").is_file()]
    models = [text for text in texts if text not in stored and not _looks_stored(text, is_beside_stored=bool(stored))]
    if stored and models:
        raise InputError(
            f"{stored[0]} is a stored result and {models[0]} a model; compare results with results, or models with models",
            hint="bench the model first, then compare the two results folders",
        )
    return not models


def _looks_stored(text: str, is_beside_stored: bool) -> bool:
    """A results folder without its `run.json`: cut off, a comparison, or a baseline that is gone."""
    folder = Path(text)
    if ":" in text or (folder / "config.json").is_file():
        return False
    return is_begun(folder) or folder.parent.name == "results" or (is_beside_stored and "/" in text and not folder.exists())


def is_begun(folder: Path) -> bool:
    """Whether anything was ever measured into this folder."""
    return any((folder / name).is_file() for name in ("run.json", "samples.jsonl", "compare.json"))


def way(document: Mapping[str, Any]) -> dict[str, Any]:
    """The run-time half of a resolved recipe: how a model is run, whatever was done to its weights."""
    return {key: document.get(key) for key in ("speculative", "sampling", "cache", "engine")}


def file_name(label: str) -> str:
    """A label as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", label).strip("-.") or "arm"


def _short(model: str) -> str:
    return Path(model).name or model
