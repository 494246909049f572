"""Rules that a generated answer must meet. They read the text alone; all rules of a row must hold.

    {"expect": {"json_schema": {"type": "object", "required": ["city"]}, "max_tokens": 60}}

| rule | value | holds when |
|---|---|---|
| `exact` | string | the answer is this string, white space at both ends aside; case counts |
| `contains` | string, or a list of them | every string occurs in the answer; case counts |
| `regex` | pattern of Python's `re` | it matches somewhere; flags go inside, e.g. `(?i)yes` |
| `json` | true | the whole answer is JSON (RFC 8259: no NaN, no trailing comma) |
| `json_schema` | a JSON Schema, 2020-12 unless `$schema` differs | the answer is JSON and valid; `$ref` stays inside |
| `choice` | list of strings | the answer is one of them; case, quotes, `*` and a final `.` or `!` do not count |
| `refusal` | true or false | the answer does (true) or does not (false) open by declining; a list of stock phrases decides |
| `max_tokens` | whole number ≥ 1 | the answer has at most this many tokens, end-of-text not counted |

`json` and `json_schema` take off one Markdown code fence when it encloses the whole answer, since chat models add it and
every consumer strips it. Prose around the JSON fails: a program that reads the answer would fail too.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infopt.data.jsonl import check_keys, kind, short, want_count, want_text
from infopt.errors import InputError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator
    from referencing._core import Resolver

_FENCE = re.compile(r"\A```[\w-]*[ \t]*\n(.*?)\n?[ \t]*```\Z", re.DOTALL)
_REFUSAL_SPAN = 200
_CANNOT = r"(?:can(?:not|'t| not)|could(?:n't| not)|won't|will not|am (?:not able|unable) to)"
_HELP = r"(?:help|assist|provide|answer|do|fulfill|comply|support|create|write|give|share|generate|engage|offer|discuss)\b"
_REFUSAL = re.compile(
    rf"\bi (?:\w+ )?{_CANNOT} (?:\w+ly )?{_HELP}|\bi'm (?:\w+ )?(?:not able|unable) to {_HELP}"
    r"|\bi(?: must|'ll have to| have to)? (?:decline|refuse)\b|\bi (?:do not|don't) have the (?:ability|capability|capacity)\b"
    r"|\bas an ai\b[^.]{0,60}\b(?:cannot|can't|unable|not able|don't)\b"
    r"|\b(?:i'm|i am) sorry\b[^.]{0,30}\bi (?:can't|cannot|can not|won't|am not able|am unable)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """A rule that did not hold, and why, in a few words."""

    rule: str
    reason: str


@dataclass(frozen=True)
class Expect:
    """The rules of one row, made by `parse_expect`; an absent rule is None."""

    exact: str | None = None
    contains: tuple[str, ...] = ()
    regex: str | None = None
    json: bool = False
    json_schema: dict[str, Any] | None = None
    choice: tuple[str, ...] = ()
    refusal: bool | None = None
    max_tokens: int | None = None

    def check(self, text: str, token_count: int) -> tuple[Failure, ...]:
        """The rules that `text` breaks, in the order of the table above; empty when it passes."""
        found = {
            "exact": self._exact(text),
            "contains": self._contains(text),
            "regex": self._regex(text),
            "json": _parse(text)[1] if self.json else None,
            "json_schema": self._schema(text),
            "choice": self._choice(text),
            "refusal": self._refusal(text),
            "max_tokens": self._length(token_count),
        }
        return tuple(Failure(rule, reason) for rule, reason in found.items() if reason is not None)

    def _exact(self, text: str) -> str | None:
        return None if self.exact is None or text.strip() == self.exact.strip() else f"is {short(text)}, not {short(self.exact)}"

    def _contains(self, text: str) -> str | None:
        missing = [part for part in self.contains if part not in text]
        return f"lacks {short(missing[0])}" if missing else None

    def _regex(self, text: str) -> str | None:
        return None if self.regex is None or re.search(self.regex, text) else f"no match of /{self.regex}/"

    def _schema(self, text: str) -> str | None:
        if self.json_schema is None:
            return None
        from jsonschema.exceptions import best_match

        value, problem = _parse(text)
        if problem:
            return problem
        error = best_match(_validator(self.json_schema).iter_errors(value))
        return None if error is None else f"{error.json_path}: {short(error.message, 120)}"

    def _choice(self, text: str) -> str | None:
        if not self.choice or _plain(text) in {_plain(option) for option in self.choice}:
            return None
        return f"{short(text)} is none of {', '.join(self.choice)}"

    def _refusal(self, text: str) -> str | None:
        if self.refusal is None or is_refusal(text) == self.refusal:
            return None
        return "answers instead of declining" if self.refusal else "declines to answer"

    def _length(self, token_count: int) -> str | None:
        if self.max_tokens is None or token_count <= self.max_tokens:
            return None
        return f"{token_count} tokens, more than {self.max_tokens}"


RULES = ("exact", "contains", "regex", "json", "json_schema", "choice", "refusal", "max_tokens")


def parse_expect(mapping: Any, where: str) -> Expect:
    """The rules in a row's `expect:`; `where` opens every message. Raises InputError."""
    if not isinstance(mapping, dict) or not mapping:
        raise InputError(f"{where}: expect is {kind(mapping)}; an object with at least one rule is wanted", hint=_RULES_HINT)
    where = f"{where}: expect"
    check_keys(mapping, RULES, where)
    return Expect(
        exact=_text(mapping, "exact", where),
        contains=_strings(mapping, "contains", where, single=True),
        regex=_pattern(mapping, where),
        json=_flag(mapping, "json", where, allowed=(True,)) or False,
        json_schema=_schema(mapping, where),
        choice=_strings(mapping, "choice", where, single=False),
        refusal=_flag(mapping, "refusal", where, allowed=(True, False)),
        max_tokens=want_count(mapping, "max_tokens", where),
    )


def is_refusal(text: str) -> bool:
    """Whether the first 200 characters decline to answer, by stock phrases; a heuristic, not a judgement."""
    return bool(_REFUSAL.search(text.strip()[:_REFUSAL_SPAN].replace("’", "'")))


_RULES_HINT = f"rules: {', '.join(RULES)}"


def _text(mapping: dict[str, Any], key: str, where: str) -> str | None:
    return want_text(mapping, key, where) if key in mapping else None


def _strings(mapping: dict[str, Any], key: str, where: str, *, single: bool) -> tuple[str, ...]:
    if key not in mapping:
        return ()
    value = mapping[key]
    values = [value] if single and isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        wanted = "a string or a list of strings" if single else "a list of strings"
        raise InputError(f"{where}.{key} is {kind(value)}; {wanted} is wanted", hint=f'e.g. "{key}": ["yes", "no"]')
    return tuple(values)


def _flag(mapping: dict[str, Any], key: str, where: str, *, allowed: tuple[bool, ...]) -> bool | None:
    if key not in mapping:
        return None
    value = mapping[key]
    if not isinstance(value, bool) or value not in allowed:
        wanted = " or ".join(str(option).lower() for option in allowed)
        raise InputError(f"{where}.{key} is {kind(value)}; {wanted} is wanted", hint=f'e.g. "{key}": true')
    return value


def _pattern(mapping: dict[str, Any], where: str) -> str | None:
    pattern = _text(mapping, "regex", where)
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise InputError(f"{where}.regex: not a valid pattern: {pattern!r} ({error})", hint="Python's re syntax") from None
    return pattern


def _schema(mapping: dict[str, Any], where: str) -> dict[str, Any] | None:
    if "json_schema" not in mapping:
        return None
    schema = mapping["json_schema"]
    if not isinstance(schema, dict) or not isinstance(schema.get("$schema", ""), str):
        raise InputError(f"{where}.json_schema is {kind(schema)}; a JSON Schema object is wanted", hint='e.g. {"type": "object"}')
    from jsonschema.exceptions import SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        _validator(schema).check_schema(schema)
    except SchemaError as error:
        raise InputError(f"{where}.json_schema is not a valid schema: {error.message}", hint="see json-schema.org") from None
    root: Registry[Any] = Registry()
    try:
        _resolve_references(schema, root.resolver_with_root(DRAFT202012.create_resource(schema)))
    except Unresolvable as error:
        raise InputError(f"{where}.json_schema: {error.ref!r} points nowhere inside the schema", hint='use "$defs"') from None
    return schema


def _validator(schema: dict[str, Any]) -> Validator:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry

    # An explicit registry: without one, jsonschema would fetch foreign references over the network.
    return validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())


def _resolve_references(schema: Any, resolver: Resolver[Any]) -> None:
    """Looks up every reference from where it stands. Raises Unresolvable."""
    from referencing.jsonschema import DRAFT202012

    if isinstance(schema, dict):
        if isinstance(schema.get("$id"), str):
            resolver = resolver.in_subresource(DRAFT202012.create_resource(schema))
        for key in ("$ref", "$dynamicRef"):
            if isinstance(schema.get(key), str):
                resolver.lookup(schema[key])
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _resolve_references(part, resolver)


def _parse(text: str) -> tuple[Any, str | None]:
    """The JSON value of an answer and None, or None and what is wrong."""
    stripped = text.strip()
    fenced = _FENCE.match(stripped)
    try:
        return json.loads(fenced[1] if fenced else stripped, parse_constant=_no_constant), None
    except RecursionError:
        return None, "not JSON: nested too deeply"
    except ValueError as error:
        return None, f"not JSON: {error}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _plain(text: str) -> str:
    return text.strip().strip("\"'`*“”‘’ ").rstrip(".!").strip("\"'`*“”‘’ ").casefold()
