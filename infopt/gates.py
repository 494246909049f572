"""Gates: what a change must not cost, as written in a recipe's `gates` section or a `--gates` file.

    gates:
      tpot_s.p50:    {max_regress: 3%}    # at most 3 % worse than the baseline, whichever way worse is
      weights_bytes: {min_improve: 40%}   # at least 40 % better than the baseline
      kld.mean:      {max: 0.05}          # never above, in the figure's unit
      mc.accuracy:   {max_drop: 2%}       # at most 2 points below the baseline, for shares of quality

Relative conditions are relative to the baseline's value: 3 % worse is 1.03 × the seconds, or 0.97 × the tokens per
second. Several conditions on one figure are several gates. `infopt.verdict` decides them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict

from infopt import figures, units
from infopt.errors import InputError, RecipeError, shown, unknown

Condition = Literal["max_regress", "min_improve", "max_drop", "max", "min"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
_EXAMPLE = "e.g. tpot_s.p50: {max_regress: 3%}"


class Gate(BaseModel):
    """One condition on one figure. `limit`: a share for the relative ones and `max_drop`, else in the figure's unit."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    figure: str
    condition: Condition
    limit: float

    @property
    def is_absolute(self) -> bool:
        """Needs no baseline."""
        return self.condition in ("max", "min")

    @property
    def tau(self) -> float:
        """Largest harm relative to the baseline that passes: negative when an improvement is demanded."""
        return -self.limit if self.condition == "min_improve" else self.limit

    @property
    def text(self) -> str:
        if self.is_absolute:
            return f"{self.condition} {units.figure(self.limit, figures.find(self.figure)[0].unit)}"
        return f"{self.condition} {units.percent(self.limit)}"


def parse_gates(mapping: Mapping[Any, Any] | None, where: str) -> tuple[Gate, ...]:
    """The gates of a recipe section or file; `where` opens every message. Raises RecipeError."""
    if mapping is None:
        return ()
    if not isinstance(mapping, Mapping):
        raise RecipeError(where, f"found {shown(mapping)}; allowed: figures with their conditions", hint=_EXAMPLE)
    return tuple(gate for key, conditions in mapping.items() for gate in _parse_figure(key, conditions, f"{where}.{key}"))


def load_gates(path: Path) -> tuple[Gate, ...]:
    """The gates of a YAML file: figures at the top level, or under `gates:`. Raises InputError."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except FileNotFoundError:
        raise InputError(f"{path}: no such gates file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})", hint=_EXAMPLE) from None
    where = str(path)
    if isinstance(data, dict) and "gates" in data:
        others = [str(key) for key in data if key != "gates"]
        if others:
            raise InputError(f"{path}: found {others[0]!r} beside 'gates'; allowed: 'gates' alone, or figures at the top level")
        data, where = data["gates"], f"{path}: gates"
    if not data:
        raise InputError(f"{path}: holds no gate, so nothing could ever fail", hint=_EXAMPLE)
    return parse_gates(data, where)


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key written twice: plain YAML keeps the last, and a gate would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _parse_figure(key: Any, conditions: Any, path: str) -> list[Gate]:
    if not isinstance(key, str):
        raise RecipeError(path, f"found {shown(key)}; allowed: the name of a figure", hint=_EXAMPLE)
    try:
        figure, _ = figures.find(key)
    except InputError as error:
        raise RecipeError(path, str(error), hint=error.hint) from None
    if not isinstance(conditions, Mapping) or not conditions:
        raise RecipeError(path, f"found {shown(conditions)}; allowed: {', '.join(CONDITIONS)} and a number", hint=_EXAMPLE)
    return [_parse_condition(figure, key, name, value, f"{path}.{name}") for name, value in conditions.items()]


def _parse_condition(figure: figures.Figure, key: str, name: Any, value: Any, path: str) -> Gate:
    if name not in CONDITIONS:
        raise RecipeError(path, unknown("condition", str(name), CONDITIONS), hint=_EXAMPLE)
    condition: Condition = name
    if condition in ("max_regress", "min_improve") and figure.kind == "quality":
        raise RecipeError(
            path, f"{key} is measured against the reference already; allowed: max, min, max_drop", hint=f"{key}: {{max: …}}"
        )
    if condition == "max_drop" and not (figure.kind == "quality" and figure.unit == "share" and figure.better == "higher"):
        raise RecipeError(path, f"{key} is not a share of quality; allowed: max_regress, min_improve, max, min", hint=_EXAMPLE)
    if condition in ("max", "min"):
        return Gate(figure=key, condition=condition, limit=_absolute(value, figure.unit, path))
    limit = _share(value, path)
    falls_by = (condition == "max_regress") == (figure.better == "higher")
    if condition != "max_drop" and falls_by and limit >= 1:
        raise RecipeError(path, f"found {shown(value)}, but {key} cannot fall by 100 % or more; allowed: less than 100%")
    return Gate(figure=key, condition=condition, limit=limit)


def _share(value: Any, path: str) -> float:
    """A share ≥ 0 of the baseline."""
    share = _plain_share(value, path, largest=math.nextafter(1, 0))
    if share < 0:
        raise RecipeError(path, f"found {shown(value)}; allowed: 0 or more", hint=_EXAMPLE)
    return share


def _plain_share(value: Any, path: str, largest: float) -> float:
    """A share; beyond `largest` only when written with a percent sign, since `3` may mean 3 % or 300 %."""
    share = _number(value, path, "a percentage or a share", units.parse_share)
    if abs(share) > largest and "%" not in str(value):
        raise RecipeError(
            path, f"found {shown(value)}, which may mean {share:g} % or {share * 100:g} %", hint=f"write {share:g}%"
        )
    return share


def _absolute(value: Any, unit: units.Unit, path: str) -> float:
    if unit == "bytes" and isinstance(value, str):
        return _number(value, path, "a size such as 4GiB", units.parse_size)
    if unit == "share":
        return _plain_share(value, path, largest=1.0)
    if isinstance(value, str):
        raise RecipeError(path, f"found {shown(value)}; allowed: a number in {unit}", hint="e.g. 0.05")
    return _number(value, path, f"a number in {unit}", float)


def _number(value: Any, path: str, allowed: str, parse: Any) -> float:
    """`value` through `parse`; refuses booleans, NaN and everything that is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise RecipeError(path, f"found {shown(value)}; allowed: {allowed}", hint=_EXAMPLE)
    try:
        number = float(parse(value))
    except (InputError, ValueError, OverflowError):
        raise RecipeError(path, f"found {shown(value)}; allowed: {allowed}", hint=_EXAMPLE) from None
    if not math.isfinite(number):
        raise RecipeError(path, f"found {shown(value)}; allowed: {allowed}", hint=_EXAMPLE)
    return number
