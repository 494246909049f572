from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.errors import InputError
from infopt.workload.shapes import FixedShape

TEXT = tuple(range(1000))


def shape(**changes: object) -> FixedShape:
    fields: dict[str, object] = {
        "name": "s", "prompt_tokens": 16, "new_tokens": 4, "batch": 3, "requests": 5, "text_ids": TEXT, "context": 64,
    }  # fmt: skip
    return FixedShape(**(fields | changes))  # type: ignore[arg-type]


def test_a_block_has_its_static_batches_of_exact_prompts() -> None:
    batches = shape().batches(seed=1, block=0)
    assert [len(batch) for batch in batches] == [3] * 5
    rows = [row for batch in batches for row in batch]
    assert {len(row.prompt_ids) for row in rows} == {16}
    assert {row.max_new_tokens for row in rows} == {4}
    assert all(row.ignore_eos for row in rows)
    assert len({row.id for row in rows}) == 15


@given(st.integers(0, 10**6), st.integers(0, 100))
def test_prompts_follow_from_seed_and_block_and_share_no_prefix(seed: int, block: int) -> None:
    one = shape()
    assert one.batches(seed, block) == shape().batches(seed, block)
    starts = [row.prompt_ids[0] for batch in one.batches(seed, block) for row in batch]
    assert len(set(starts)) == 15
    assert one.batches(seed, block) != one.batches(seed, block + 1)
    assert one.batches(seed, block) != one.batches(seed + 1, block)


def test_windows_are_the_texts_own_and_wrap_at_its_end() -> None:
    for batch in shape(text_ids=tuple(range(20)), requests=6).batches(0, 0):
        for row in batch:
            assert list(row.prompt_ids) == [(row.prompt_ids[0] + i) % 20 for i in range(16)]


def test_warm_up_goes_on_for_ever_with_prompts_of_its_own() -> None:
    turns = list(islice(shape().warmup(seed=1, block=0), 8))
    assert [len(batch) for batch in turns] == [3] * 8
    assert len({batch[0].prompt_ids for batch in turns}) > 4
    assert turns == list(islice(shape().warmup(seed=1, block=0), 8))


def test_the_hash_knows_the_requests_and_not_the_name() -> None:
    assert shape(name="other").hash == shape().hash
    for change in ({"batch": 2}, {"prompt_tokens": 17}, {"new_tokens": 5}, {"requests": 4}, {"text_ids": TEXT[1:]}):
        assert shape(**change).hash != shape().hash
    assert shape().as_dict()["name"] == "s"


def test_what_does_not_fit_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"61 prompt \+ 4 new tokens = 65; the model's context allows 64"):
        shape(prompt_tokens=61)
    assert shape(prompt_tokens=60).batches(0, 0)


@pytest.mark.parametrize("field", ["prompt_tokens", "new_tokens", "batch", "requests"])
def test_counts_below_one_are_refused(field: str) -> None:
    with pytest.raises(InputError, match="is 0; allowed: 1 or more"):
        shape(**{field: 0})


def test_one_token_outputs_are_allowed() -> None:
    assert shape(new_tokens=1).batches(0, 0)[0][0].max_new_tokens == 1


def test_a_text_too_short_for_different_prompts_is_refused() -> None:
    with pytest.raises(InputError, match="has 14 tokens; 15 different prompts"):
        shape(text_ids=tuple(range(14)))
