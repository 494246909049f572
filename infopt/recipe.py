"""Recipes: YAML in, a frozen, fully checked `Recipe` out, before any weight is read.

    version: 1
    name: int4-lookup
    extends: rtn_int4            # a shipped recipe's name, or a path relative to this file
    steps:                       # change the weights, in order; each key is a file in infopt/techniques/
      - rtn: {bits: 4, group_size: 64}
    speculative: {draft: prompt_lookup, tokens: auto}
    sampling:    {temperature: 0.0, top_p: 1.0, top_k: 0, candidates: 1, choose: null}
    cache:       {kind: dynamic, dtype: auto, prefix: false}
    engine:      {name: native, weights: auto, head: auto, dtype: auto}
    calibration: {text: bundled, samples: 128, tokens: 256, seed: 0}
    gates:       {ppl_ratio: {max: 1.02}}

Every refusal names the place (`steps[0].rtn.bits`), what was found, what is allowed, and the nearest name.
A recipe that extends another overrides its sections key by key; `steps` and `gates` are replaced whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from infopt.errors import InputError, RecipeError, shown, unknown
from infopt.figures import all_keys
from infopt.gates import CONDITIONS, Gate, UniqueKeys, parse_gates
from infopt.sections import SECTIONS, Cache, Calibration, EngineSection, SamplingSection, Speculative

SHIPPED = Path(__file__).parent / "recipes"


_KEYS = ("version", "name", "about", "extends", "steps", *SECTIONS, "gates")


class StepClass(Protocol):
    """What a recipe needs to know of a technique."""

    Options: type[BaseModel]


FindTechnique = Callable[[str, str], Any]
"""(technique's name, place in the recipe) → its class. Raises RecipeError for an unknown name."""


@dataclass(frozen=True)
class Step:
    name: str
    options: BaseModel

    def as_dict(self) -> dict[str, Any]:
        return {self.name: self.options.model_dump(mode="json")}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `source` is the file or name it came from."""

    name: str
    about: str = ""
    source: str = ""
    steps: tuple[Step, ...] = ()
    speculative: Speculative | None = None
    sampling: SamplingSection = field(default_factory=SamplingSection)
    cache: Cache = field(default_factory=Cache)
    engine: EngineSection = field(default_factory=EngineSection)
    calibration: Calibration = field(default_factory=Calibration)
    gates: tuple[Gate, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The resolved recipe: every default written out, loadable again."""
        document: dict[str, Any] = {"version": 1, "name": self.name, "about": self.about}
        document["steps"] = [step.as_dict() for step in self.steps]
        if self.speculative:
            document["speculative"] = self.speculative.model_dump(mode="json")
        for key in ("sampling", "cache", "engine", "calibration"):
            document[key] = getattr(self, key).model_dump()
        document["gates"] = _gates_dict(self.gates)
        return document

    def as_yaml(self) -> str:
        return str(yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True))

    def place(self, index: int) -> str:
        """Where step `index` stands, for messages."""
        return f"steps[{index}].{self.steps[index].name}"


def _gates_dict(gates: Sequence[Gate]) -> dict[str, dict[str, float]]:
    merged: dict[str, dict[str, float]] = {}
    for gate in gates:
        merged.setdefault(gate.figure, {})[gate.condition] = gate.limit
    return merged


def shipped() -> dict[str, Path]:
    """Recipes that come with infopt, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def locate(name: str, beside: Path | None = None) -> Path:
    """The file that `name` means: a path (relative to `beside` first), else a shipped recipe. Raises RecipeError."""
    for candidate in [*([beside / name] if beside else []), Path(name)]:
        if candidate.is_file():
            return candidate
    known = shipped()
    path = Path(name)
    if path.stem in known and str(path.parent) in (".", "recipes") and path.suffix in ("", ".yaml"):
        return known[path.stem]
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise RecipeError("", f"{name}: no such recipe file", hint="infopt recipes list")
    raise RecipeError("", unknown("recipe", name, known), hint="infopt recipes list")


def load(name: str, find: FindTechnique, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe in a file or of a shipped name, with `--set path=value` overrides. Raises RecipeError."""
    path = locate(name)
    document = _read(path, seen=())
    for override in overrides:
        _override(document, override)
    return parse(document, find, source=str(path), default_name=path.stem)


def parse(document: Any, find: FindTechnique, *, source: str = "", default_name: str = "recipe") -> Recipe:
    """A `Recipe` from a YAML document that extends nothing more. Raises RecipeError."""
    if not isinstance(document, Mapping):
        raise RecipeError(
            "", f"{source or 'recipe'}: found {shown(document)}; allowed: a mapping", hint="infopt recipes show baseline"
        )
    for key in document:
        if key not in _KEYS:
            raise RecipeError(str(key), unknown("key", str(key), _KEYS), hint="infopt recipes schema prints the grammar")
    if type(document.get("version")) is not int or document["version"] != 1:
        raise RecipeError(
            "version", f"found {shown(document.get('version'))}; allowed: 1", hint="start the file with `version: 1`"
        )
    for key in ("name", "about"):
        if not isinstance(document.get(key, ""), str):
            raise RecipeError(key, f"found {shown(document[key])}; allowed: text")
    sections: dict[str, Any] = {
        key: section(document[key], model, key) for key, model in SECTIONS.items() if document.get(key) is not None
    }
    return Recipe(
        name=document.get("name") or default_name,
        about=document.get("about", ""),
        source=source,
        steps=_steps(document.get("steps"), find),
        gates=parse_gates(document.get("gates"), "gates"),
        **sections,
    )


S = TypeVar("S", bound=BaseModel)


def section(value: Any, model: type[S], path: str) -> S:
    """`value` as `model`; the first mistake is raised as RecipeError with its place."""
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise RecipeError(path, f"found {shown(value)}; allowed: {{{', '.join(model.model_fields)}}}")
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if not first["loc"]:  # not one field, but how they go together
            raise RecipeError(path, first["msg"].removeprefix("Value error, ") + more) from None
        key = str(first["loc"][0])
        where = f"{path}.{key}"
        if first["type"] in ("extra_forbidden", "invalid_key"):
            raise RecipeError(where, unknown("key", key, model.model_fields) + more) from None
        if first["type"] == "missing":
            raise RecipeError(where, f"is missing{more}", hint=f"allowed: {_allowed(model, key)}") from None
        raise RecipeError(
            where, f"found {shown(first['input'])}; allowed: {_allowed(model, key) or first['msg']}{more}"
        ) from None


def _allowed(model: type[BaseModel], key: str) -> str:
    """What a field takes, in words, from its JSON Schema."""
    schema = model.model_json_schema().get("properties", {}).get(key, {})
    options = schema.get("anyOf", [schema])
    words = []
    for option in options:
        if "enum" in option or "const" in option:
            words.append(", ".join(str(v) for v in option.get("enum", [option.get("const")])))
            continue
        text = {
            "integer": "a whole number",
            "number": "a number",
            "boolean": "true or false",
            "string": "text",
            "array": "a list",
            "null": "null",
        }.get(option.get("type", ""), str(option.get("type", "a value")))
        bounds = [(k, s) for k, s in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))]
        text += "".join(f" {sign} {option[k]:g}" for k, sign in bounds if k in option)
        words.append(text)
    return " or ".join(words)


def _steps(value: Any, find: FindTechnique) -> tuple[Step, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RecipeError("steps", f"found {shown(value)}; allowed: a list of `- technique: {{options}}`")
    steps = []
    for index, item in enumerate(value):
        path = f"steps[{index}]"
        if isinstance(item, str):
            item = {item: {}}
        if not isinstance(item, Mapping) or len(item) != 1:
            raise RecipeError(path, f"found {shown(item)}; allowed: one technique with its options, `- rtn: {{bits: 4}}`")
        name, options = next(iter(item.items()))
        technique = find(str(name), path)
        steps.append(Step(str(name), section(options, technique.Options, f"{path}.{name}")))
    return tuple(steps)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The document of a file, merged over the one it extends."""
    if path.resolve() in seen:
        raise RecipeError("extends", f"{path} extends itself through {' → '.join(p.name for p in seen)}")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("", f"{path}: cannot be read as text ({error})") from None
    except yaml.YAMLError as error:
        raise RecipeError("", f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise RecipeError("", f"{path}: found {shown(document)}; allowed: a mapping", hint="infopt recipes show baseline")
    base = document.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise RecipeError("extends", f"found {shown(base)}; allowed: a recipe's name or path")
    parent = _read(locate(base, beside=path.parent), (*seen, path.resolve()))
    for key in ("name", "about"):
        parent.pop(key, None)
    for key, value in document.items():
        inherited = parent.get(key)
        if key in SECTIONS and isinstance(value, Mapping) and isinstance(inherited, Mapping):
            value = {**inherited, **value}
        parent[key] = value
    return parent


def _override(document: dict[str, Any], text: str) -> None:
    """Applies `steps.0.nf4.double_quant=true`; the value is read as YAML. New section keys may be set, steps must exist."""
    path, equals, raw = text.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set {text!r}: allowed: path=value", hint="e.g. --set steps.0.nf4.double_quant=true")
    try:
        value = raw.strip() if raw.rstrip().endswith(":") else yaml.safe_load(raw)  # `hub:` is a text, no key without a value
    except yaml.YAMLError:
        raise InputError(f"--set {text!r}: the value is not valid YAML") from None
    if parts[0] == "gates" and len(parts) > 1:
        if value is None:
            return _drop_gate(document.get("gates"), ".".join(parts[1:]), text)
        # Figure keys hold a dot: gates.tpot_s.p50.max_regress=3%, gates.tpot_s.p50={max: 1}
        end = len(parts) if isinstance(value, dict) else max(2, len(parts) - 1)
        parts = ["gates", ".".join(parts[1:end]), *parts[end:]]
    if parts[0] == "steps" and len(parts) > 1 and document.get("steps") is None:
        document["steps"] = []
    node: Any = document
    for depth, part in enumerate(parts[:-1]):
        where = ".".join(parts[: depth + 1])
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise InputError(f"--set {text!r}: {where}: no such step; the recipe has {len(node)}")
            if isinstance(node[int(part)], str):
                node[int(part)] = {node[int(part)]: {}}
            node = node[int(part)]
        elif isinstance(node, dict):
            if depth == 2 and parts[0] == "steps" and part not in node:
                raise InputError(f"--set {text!r}: {unknown('step', part, map(str, node))}")
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise InputError(f"--set {text!r}: {where} is {shown(node)}, which has no keys")
    if not isinstance(node, dict | list):
        raise InputError(f"--set {text!r}: {'.'.join(parts[:-1])} is {shown(node)}, which has no keys")
    if isinstance(node, list):
        raise InputError(
            f"--set {text!r}: names a whole step; name one of its options", hint="e.g. --set steps.0.nf4.double_quant=true"
        )
    node[parts[-1]] = value


def _drop_gate(gates: Any, name: str, text: str) -> None:
    """Takes `tpot_s.p50` away whole, or only its condition of `tpot_s.p50.max_regress`."""
    gates = gates if isinstance(gates, dict) else {}
    figure, _, condition = name.rpartition(".")
    if name in gates:
        del gates[name]
    elif isinstance(gates.get(figure), dict) and condition in gates[figure]:
        rest = {key: limit for key, limit in gates[figure].items() if key != condition}
        gates.update({figure: rest}) if rest else gates.pop(figure)
    else:
        raise InputError(f"--set {text!r}: {unknown('gate', name, map(str, gates))}")


def schema(techniques: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema of a recipe, for editors. `techniques`: every technique class by name."""
    properties: dict[str, Any] = {
        "version": {"const": 1},
        "name": {"type": "string"},
        "about": {"type": "string"},
        "extends": {"type": "string"},
    }
    step_schemas: dict[str, Any] = {
        name: {**t.Options.model_json_schema(), "description": (t.__doc__ or "").strip()} for name, t in techniques.items()
    }
    properties["steps"] = {
        "type": "array",
        "items": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
            "properties": step_schemas,
        },
    }
    properties.update({key: model.model_json_schema() for key, model in SECTIONS.items()})
    condition = {"type": ["number", "string"]}
    properties["gates"] = {
        "type": "object",
        "additionalProperties": {
            "type": "object",
            "additionalProperties": False,
            "properties": dict.fromkeys(CONDITIONS, condition),
        },
        "propertyNames": {"enum": all_keys()},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "infopt recipe",
        "type": "object",
        "required": ["version"],
        "additionalProperties": False,
        "properties": properties,
    }
