"""Best-of-n as arithmetic: who is chosen, how ties end, and what is refused."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.data.candidates import Choice, choose, ranked, require_rules, said
from infopt.data.expect import parse_expect
from infopt.data.prompts import Prompt
from infopt.errors import InputError

NAN = math.nan
LEVELS = st.none() | st.floats(-9, 0) | st.just(NAN)
ROWS = st.lists(st.tuples(st.sampled_from(["yes", " YES\n", "no", "No ", "maybe", "", "  "]), LEVELS), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("texts", "levels", "answer", "choice"),
    [
        (["a", "b", "B "], None, None, Choice(1, "2 of 3 say 'b'")),
        (["a", "b", "b"], (-1, -3, -2), None, Choice(2, "2 of 3 say 'b'")),
        (["a", "b"], None, None, Choice(0, "1 of 2 say 'a'; 1 other answer had as many votes: the first")),
        (["a", "b", "c"], (-3, -2, -2), None, Choice(1, "1 of 3 say 'b'; 2 other answers had as many votes: the likeliest")),
        (["4 + 3 = 7", "so 8", "it is 7!"], None, r"\d+", Choice(0, "2 of 3 say '7'")),
        (["x: 1. Answer: 2", "Answer: 3, so\nAnswer: 2"], (-2, -1), r"Answer: (\d)", Choice(1, "2 of 2 say '2'")),
        (["none", "of", "these"], (-2, -1, -3), r"\d", Choice(1, "none of 3 says anything that counts: the likeliest")),
        (["", "", "x"], None, None, Choice(2, "1 of 3 say 'x'")),
    ],
)
def test_the_majority(texts: list[str], levels: tuple[float, ...] | None, answer: str | None, choice: Choice) -> None:
    assert choose(texts, "majority", mean_logprobs=levels, answer=answer) == choice


def test_the_likeliest() -> None:
    found = choose("abcd", "mean_logprob", mean_logprobs=(NAN, -2, -1.25, -1.25))
    assert found == Choice(2, "the likeliest of 4: mean log-probability -1.250 nats per token")
    assert choose("ab", "mean_logprob", mean_logprobs=(None, None)).index == 0


def test_the_likeliest_that_passes() -> None:
    levels = (-3, -1, -2)
    for passing, index, why in (
        ({0, 2}, 2, "the likeliest of 3 that passes, after 1 that did not"),
        ({1}, 1, "the likeliest of 3 that passes, after 0 that did not"),
        (set(), 1, "none of 3 passes: the likeliest"),
    ):
        assert choose("abc", "check", mean_logprobs=levels, passes=passing.__contains__) == Choice(index, why)
    assert choose("abc", "check", passes={1, 2}.__contains__) == Choice(1, "the first of 3 that passes, after 1 that did not")


@pytest.mark.parametrize(
    ("answer", "text", "vote"),
    [
        (None, " The\n Answer ", "the answer"), (None, " \n", None), (r"\d+", "1 or 22", "22"), (r"\d+", "none", None),
        (r"a(\d)?", "a1 a", None), (r"(\w) is (\w)", "x is y", "x"), ("", "text", None),
    ],
)  # fmt: skip
def test_what_a_candidate_says(answer: str | None, text: str, vote: str | None) -> None:
    assert said(text, answer) == vote


@given(rows=ROWS)
def test_ranks_are_all_candidates_by_likelihood(rows: list[tuple[str, float | None]]) -> None:
    levels = [level for _, level in rows]
    order = ranked(levels, len(levels))
    assert sorted(order) == list(range(len(levels)))
    known = [-math.inf if level is None or math.isnan(level) else level for level in (levels[index] for index in order)]
    assert known == sorted(known, reverse=True)
    assert all(a < b for a, b, x, y in zip(order, order[1:], known, known[1:], strict=False) if x == y)
    assert choose([text for text, _ in rows], "mean_logprob", mean_logprobs=levels).index == order[0]
    assert ranked(None, len(levels)) == list(range(len(levels)))


@given(rows=ROWS, is_known=st.booleans())
def test_a_majority_has_most_votes_and_no_likelier_equal(rows: list[tuple[str, float | None]], is_known: bool) -> None:
    texts, levels = [text for text, _ in rows], [level for _, level in rows]
    order = ranked(levels if is_known else None, len(rows))
    found = choose(texts, "majority", mean_logprobs=levels if is_known else None)
    votes = [said(text) for text in texts]
    counts = Counter(vote for vote in votes if vote)
    most = max(counts.values(), default=0)
    allowed = [index for index in order if counts[votes[index] or ""] == most] if counts else order
    assert found.index == allowed[0]


@given(rows=ROWS, passing=st.sets(st.integers(0, 8)))
def test_a_check_takes_the_likeliest_that_passes(rows: list[tuple[str, float | None]], passing: set[int]) -> None:
    texts, levels = [text for text, _ in rows], [level for _, level in rows]
    order = ranked(levels, len(rows))
    found = choose(texts, "check", mean_logprobs=levels, passes=passing.__contains__)
    assert found.index == next((index for index in order if index in passing), order[0])


def test_what_is_missing_is_refused() -> None:
    for asked in ({"texts": [], "how": "majority"}, {"texts": ["a"], "how": "majority", "mean_logprobs": (-1, -2)}):
        with pytest.raises(InputError, match="allowed: 1 or more of each"):
            choose(**asked)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no log-probabilities") as caught:
        choose(["a"], "mean_logprob")
    assert caught.value.hint == "engine: {name: native}, or choose: majority"
    with pytest.raises(InputError, match="no rules to check by"):
        choose(["a"], "check")


def test_prompts_without_rules_are_refused_only_for_a_check() -> None:
    ruled = Prompt("a", text="x", expect=parse_expect({"contains": "y"}, "f:1"))
    rows = [ruled, Prompt("b", text="x", where="f:2")]
    for how in (None, "majority", "mean_logprob"):
        require_rules(rows, how)  # type: ignore[arg-type]
    require_rules([ruled], "check")
    with pytest.raises(InputError, match=r"f:2: the prompt 'b' has no rules") as caught:
        require_rules(rows, "check")
    assert "--expect" in str(caught.value.hint)
