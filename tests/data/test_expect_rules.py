"""Every rule passes and fails on known answers, and bad rules are refused when they are read."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from infopt.data.expect import RULES, Failure, is_refusal, parse_expect
from infopt.errors import InputError

PERSON = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}

# rule, its value, answers that pass, answers that fail
CASES: list[tuple[str, Any, list[str], list[str]]] = [
    ("exact", "Paris", ["Paris", "  Paris\n"], ["paris", "Paris.", "", "In Paris"]),
    ("contains", "Paris", ["It is Paris.", "Paris"], ["paris", "London", ""]),
    ("contains", ["a", "b"], ["ab", "b a"], ["a", "b", ""]),
    ("regex", r"(?i)\byes\b", ["Yes, it is", "well, YES"], ["yesterday", "no", ""]),
    ("json", True, ['{"a": [1, null]}', " 3 ", '"x"', '```json\n{"a": 1}\n```', "```\n[]\n```"],
     ["{'a': 1}", "", '{"a": 1,}', "NaN", "[Infinity]", 'Sure: {"a": 1}', '```json\n{"a": 1}\n```\nThere it is.', "[" * 100_000]),
    ("json_schema", PERSON, ['{"name": "Ann"}', '```json\n{"name": "Ann", "age": 3}\n```'],
     ['{"name": 1}', "{}", '{"name": "Ann", "age": -1}', '{"name": "Ann"', "[]"]),
    ("choice", ["yes", "no"], ["yes", " No. ", '"YES"', "**no**", "Yes!"], ["maybe", "yes, no", "yes because", ""]),
    ("refusal", True, ["I'm sorry, but I can't help with that.", "I cannot provide addresses."], ["Sure, here it is.", ""]),
    ("refusal", False, ["Sure, here it is.", "You can't do that in chess."], ["I’m unable to assist with this."]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "value", "passing", "failing"), CASES, ids=[case[0] for case in CASES])
def test_rule(rule: str, value: Any, passing: list[str], failing: list[str]) -> None:
    expect = parse_expect({rule: value}, "file:1")
    for text in passing:
        assert expect.check(text, 3) == (), text
    for text in failing:
        failures = expect.check(text, 3)
        assert [failure.rule for failure in failures] == [rule], text
        assert 0 < len(failures[0].reason) < 160
    assert pickle.loads(pickle.dumps(expect)) == expect


def test_cases_and_this_test_cover_every_rule() -> None:
    expect = parse_expect({"max_tokens": 5}, "file:1")
    assert expect.check("any", 5) == ()
    assert expect.check("any", 6) == (Failure("max_tokens", "6 tokens, more than 5"),)
    assert {case[0] for case in CASES} | {"max_tokens"} == set(RULES)


def test_all_rules_of_a_row_must_hold_and_each_failure_is_named() -> None:
    expect = parse_expect({"max_tokens": 1, "contains": "x", "regex": "y"}, "file:1")
    assert [failure.rule for failure in expect.check("z", 9)] == ["contains", "regex", "max_tokens"]
    assert expect.check("xy", 1) == ()


def test_references_are_resolved_from_where_they_stand() -> None:
    inner = {"$id": "https://example.com/x", "$ref": "#/$defs/y", "$defs": {"y": {"type": "integer"}}}
    expect = parse_expect({"json_schema": {"items": inner}}, "f:1")
    assert expect.check("[1]", 1) == ()
    assert [failure.rule for failure in expect.check('["a"]', 1)] == ["json_schema"]


def test_schema_failure_says_where() -> None:
    (failure,) = parse_expect({"json_schema": PERSON}, "f:1").check('{"name": "A", "age": "x"}', 1)
    assert failure.reason.startswith("$.age:")


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("As an AI language model, I don't have feelings, but here goes.", True),
        ("I must decline.", True),
        ("I don't have the capability to do so.", True),
        ("Apples can't fly. I like them.", False),
        ("I'm sorry to hear that you lost it! Try the lost-and-found office.", False),
        ("word " * 60 + "I cannot help with that.", False),
    ],
)
def test_is_refusal(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "at least one rule"),
        ("Paris", "at least one rule"),
        ({"contain": "x"}, "did you mean 'contains'"),
        ({"exact": 3}, "a number"),
        ({"exact": " "}, "not blank"),
        ({"contains": []}, "contains is a list"),
        ({"contains": ["a", 1]}, "contains is a list"),
        ({"choice": "yes"}, "a list of strings is wanted"),
        ({"regex": "("}, "not a valid pattern"),
        ({"json": False}, "true is wanted"),
        ({"json": 1}, "json is a number"),
        ({"refusal": "yes"}, "refusal is a string"),
        ({"max_tokens": 0}, "at least 1"),
        ({"max_tokens": True}, "max_tokens is a boolean"),
        ({"json_schema": True}, "object is wanted"),
        ({"json_schema": {"type": "objct"}}, "not a valid schema"),
        ({"json_schema": {"pattern": "("}}, "not a valid schema"),
        ({"json_schema": {"$schema": []}}, "object is wanted"),
        ({"json_schema": {"$ref": "https://example.com/schema"}}, "points nowhere"),
        ({"json_schema": {"$dynamicRef": "https://example.com/schema"}}, "points nowhere"),
        ({"json_schema": {"$defs": {"y": {}}, "items": {"$id": "https://example.com/x", "$ref": "#/$defs/y"}}}, "points nowhere"),
        (
            {"json_schema": {"items": [{"$ref": "#/$defs/gone"}], "$schema": "http://json-schema.org/draft-07/schema#"}},
            "points nowhere",
        ),
    ],
)
def test_bad_rules_are_refused(mapping: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_expect(mapping, "prompts.jsonl:3")
    assert str(caught.value).startswith("prompts.jsonl:3: expect")
    assert caught.value.hint
