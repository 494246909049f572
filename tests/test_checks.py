"""Each check at both sides of its limit, and with nothing measured."""

from __future__ import annotations

import json

import pytest

from infopt import checks
from infopt.result import Block, dump


def block(cores: float | None) -> Block:
    return Block(arm="a", index=0, round=0, position=0, wall_s=1.0, other_cpu_cores=cores)


def test_other_load_counts_the_loaded_blocks() -> None:
    assert checks.other_load([block(0.15), block(None)]) is None
    assert checks.other_load([]) is None
    check = checks.other_load([block(0.16), block(0.9), block(0.0), block(None)])
    assert check is not None
    assert (check.level, "up to 0.90 cores during 2 of 3 blocks" in check.message) == ("warning", True)


def test_warm_up_cap() -> None:
    assert checks.warm_up(False, 5) is None
    check = checks.warm_up(True, 30)
    assert check is not None
    assert "cap of 30" in check.message


@pytest.mark.parametrize(
    ("pairs", "alpha", "is_gated", "level", "step"),
    [
        (5, 0.05, False, "warning", "at least 6"),
        (7, 0.01, True, "warning", "at least 8"),
        (10, 0.05, True, "note", "20 pairs"),
        (10, 0.05, False, None, ""),
        (20, 0.05, True, None, ""),
    ],
)
def test_few_pairs(pairs: int, alpha: float, is_gated: bool, level: str | None, step: str) -> None:
    check = checks.few_pairs(pairs, alpha, is_gated)
    assert (check.level if check else None) == level
    assert step in (check.next_step if check else "")


def test_undefined_tpot() -> None:
    assert checks.undefined_tpot(0, 8) is None
    some, every = checks.undefined_tpot(2, 8), checks.undefined_tpot(8, 8)
    assert some is not None
    assert every is not None
    assert (some.level, every.level) == ("note", "warning")
    assert "2 of 8" in some.message


def test_found_keeps_what_has_something_to_say_and_is_json() -> None:
    kept = checks.found([None, checks.warm_up(True, 9), None])
    assert len(kept) == 1
    assert json.loads(dump(kept[0]))["level"] == "warning"
