from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import pytest

from infopt.errors import InputError
from infopt.workload.prompts import PromptSet, prompt_set


@dataclass(frozen=True)
class Row:
    id: str
    length: int
    max_tokens: int | None = None


ROWS = (Row("a", 3), Row("b", 5, 7), Row("c", 2))


def build(rows: tuple[Row, ...] = ROWS, **options: object) -> PromptSet:
    fields: dict[str, object] = {"new_tokens": 10, "context": 20}
    return prompt_set("mine", rows, lambda row: range(1, row.length + 1), **(fields | options))  # type: ignore[arg-type]


def test_each_row_once_in_the_files_order() -> None:
    batches = build().batches(seed=4, block=9)
    assert [[row.id for row in batch] for batch in batches] == [["a"], ["b"], ["c"]]
    assert [batch[0].prompt_ids for batch in batches] == [(1, 2, 3), (1, 2, 3, 4, 5), (1, 2)]
    assert [batch[0].max_new_tokens for batch in batches] == [10, 7, 10]
    assert [batch[0].seed for batch in batches] == [4, 5, 6]
    assert not batches[0][0].ignore_eos


def test_static_batches_end_together() -> None:
    batches = build(batch=2, ignore_eos=True).batches(0, 0)
    assert [[row.max_new_tokens for row in batch] for batch in batches] == [[7, 7], [10]]


def test_batched_answers_may_not_stop_early() -> None:
    with pytest.raises(InputError, match="batched answers run to full length"):
        build(batch=2)


def test_warm_up_repeats_the_prompts() -> None:
    assert [batch[0].id for batch in islice(build().warmup(0, 0), 3)] == ["b", "c", "b"], "the first is measured next"
    assert [batch[0].id for batch in islice(build(ROWS[:1]).warmup(0, 0), 2)] == ["a", "a"]


def test_no_rows_empty_rows_and_long_rows_are_refused() -> None:
    with pytest.raises(InputError, match="mine: no prompts; at least 1"):
        build(())
    with pytest.raises(InputError, match="'x' has no tokens"):
        build((Row("x", 0),))
    with pytest.raises(InputError, match=r"'x': 15 prompt \+ 10 new tokens = 25; the model's context allows 20"):
        build((Row("x", 15),))
    with pytest.raises(InputError, match="max_tokens is 0"):
        build((Row("x", 1, 0),))


def test_the_hash_knows_prompts_limits_and_stop_rule() -> None:
    assert build().hash == build().hash
    others = [build(ROWS[:2]), build(new_tokens=9), build(ignore_eos=True), build((Row("a", 4), *ROWS[1:]))]
    assert len({build().hash, *(other.hash for other in others)}) == 5
