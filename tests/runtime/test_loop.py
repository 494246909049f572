"""Whatever is drafted, greedy text is that of plain decoding and sampled text has its distribution."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest_runtime import VOCABULARY, DoubleStep, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.errors import InputError
from infopt.protocols import Sampling
from infopt.runtime import sampling
from infopt.runtime.draft_length import FORGOTTEN, RETRY, DraftLength
from infopt.runtime.drafts import Draft, ModelDraft, PromptLookup, Wanted
from infopt.runtime.loop import MARGIN, Answer, Ask, Loop, Told
from infopt.runtime.sampling import accept, draw, generator, probabilities
from infopt.runtime.steps import Output, Room, Run


class Adversary:
    """Drafts that are right now and then, and otherwise whatever the seed says."""

    is_free = True

    def __init__(self, seed: int, right: Sequence[int] = ()) -> None:
        self.random, self.right = random.Random(seed), list(right)

    def open(self) -> None: ...

    def require(self, rooms: Sequence[Room], beside: float = 0) -> None: ...

    def catch_up(self, wanted: Sequence[Wanted]) -> None: ...

    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        return [self.draft(len(each.ids), each.most) for each in wanted]

    def draft(self, length: int, most: int) -> Draft:
        known = self.right[length : length + most]
        tokens = tuple(t if self.random.random() < 0.6 else self.random.randrange(VOCABULARY) for t in known)
        return Draft(tokens, (None,) * len(tokens))

    def close(self, state: None) -> None: ...


def plain(double: DoubleStep, ask: Ask) -> Answer:
    return Loop(double).run([ask])[0]


def random_ask(seed: int, new: int | None = None) -> Ask:
    source = random.Random(seed)
    stretch = [source.randrange(VOCABULARY) for _ in range(source.randint(1, 9))]
    prompt = (stretch * 4)[: source.randint(1, 30)]
    return Ask(tuple(prompt), new or source.randint(1, 14), stop_tokens=frozenset(source.sample(range(VOCABULARY), 6)))


def test_greedy_is_exact_over_hundreds_of_prompts_lengths_and_ends(double: DoubleStep) -> None:
    ended = drafted = accepted = 0
    other = DoubleStep(tiny("llama", num_hidden_layers=1, hidden_size=24, intermediate_size=16))  # wrong most of the time
    for seed in range(200):
        ask = random_ask(seed)
        wanted = plain(double, ask)
        right = [*ask.prompt_ids, *wanted.ids, *range(20)]
        for drafter in (PromptLookup(), Adversary(seed, right), ModelDraft(other)):
            told: list[Told] = []
            length = DraftLength(most=1 + seed % 7, is_fixed=seed % 2 == 0)
            found = Loop(double, drafter, length).run([ask], lambda each, _, told=told: told.append(each))[0]
            assert (found.ids, found.finish) == (wanted.ids, wanted.finish), f"seed {seed}"
            assert sum(each.tokens[0] for each in told) == len(wanted.ids)
            made = [draft for each in told for draft in each.drafts]
            drafted, accepted = drafted + sum(each for each, _ in made), accepted + sum(each for _, each in made)
        ended += wanted.finish == "token"
    assert ended > 15, "end tokens were met"
    assert drafted > accepted > 200, "both kept and refused drafts were met"


def test_rows_of_a_batch_are_what_each_is_alone(double: DoubleStep) -> None:
    asks = [random_ask(seed, new=3 + seed) for seed in range(6)]
    for drafter in (None, PromptLookup(), ModelDraft(double)):
        found = Loop(double, drafter, DraftLength(4, is_fixed=True)).run(asks)
        assert [answer.ids for answer in found] == [plain(double, ask).ids for ask in asks]
        assert [answer.ask for answer in found] == list(range(6))


def test_the_model_itself_as_draft_is_always_right(double: DoubleStep) -> None:
    ask = Ask((1, 2, 3), 13)
    told: list[Told] = []
    loop = Loop(double, ModelDraft(double), DraftLength(3, is_fixed=True))
    found = loop.run([ask], lambda each, _: told.append(each))[0]
    assert found.ids == plain(double, ask).ids
    assert [each.tokens for each in told] == [[1], [4], [4], [4]]
    assert [each.drafts for each in told] == [[], [(3, 3)], [(3, 3)], [(3, 3)]]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.8),
        Sampling(1.3, top_p=0.7),
        Sampling(1.0, top_k=3),
        Sampling(1.0, min_p=0.2),
        Sampling(0.0, repetition_penalty=1.5),
    ],
)
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(double: DoubleStep, sampling: Sampling) -> None:
    asks = [replace(random_ask(seed, new=8), sampling=sampling, seed=seed) for seed in (3, 4)]
    alone = [Loop(double).run([ask])[0].ids for ask in asks]
    assert [answer.ids for answer in Loop(double).run(asks)] == alone
    assert Loop(double).run([replace(asks[0], seed=99)])[0].ids != alone[0] or sampling.temperature == 0


def test_candidates_share_one_prompt(double: DoubleStep) -> None:
    before = double.tokens
    ask = Ask(tuple(range(40)), 5, Sampling(1.0, candidates=4), seed=5, keep_logprobs=True)
    found = Loop(double).run([ask])
    assert double.tokens - before == 40 + 4 * 4, "the prompt was computed once"
    assert [answer.candidate for answer in found] == [0, 1, 2, 3]
    assert len({tuple(answer.ids) for answer in found}) > 1
    logits = double.model(input_ids=torch.tensor([[*range(40), *found[2].ids]]), use_cache=False).logits[0, 39:-1].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(logits, found[2].ids, strict=True)]
    assert found[2].logprobs == pytest.approx(expected, abs=1e-9)
    assert found[2].mean_logprob == pytest.approx(sum(expected) / 5)


def test_stop_texts_end_an_answer(double: DoubleStep) -> None:
    ask = Ask((1, 2, 3), 12)
    ids = plain(double, ask).ids
    decode = lambda tokens: " ".join(map(str, tokens))  # noqa: E731
    found = plain(double, replace(ask, stop_texts=(f"{ids[4]} {ids[5]}",), decode=decode))
    assert (found.ids, found.finish) == (ids[:6], "text")
    with pytest.raises(InputError, match="need a tokenizer"):
        plain(double, replace(ask, stop_texts=("x",)))


def test_cancelled_rows_keep_what_they_have(double: DoubleStep) -> None:
    heard: list[int] = []
    found = Loop(double).run(
        [Ask((1, 2), 50)], lambda told, answers: heard.append(len(answers[0].ids)), is_cancelled=lambda: len(heard) >= 3
    )[0]
    assert (len(found.ids), found.finish, heard) == (3, "cancelled", [1, 2, 3])


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (Ask((), 5), "0 prompt and 5 new"), (Ask((1,), 0), "1 prompt and 0 new"), (Ask((1,), 512), "context allows 512"),
        (Ask((VOCABULARY,), 5), "allowed: 0 … 210"), (Ask((-1,), 5), "prompt token -1"),
    ],
)  # fmt: skip
def test_bad_asks(double: DoubleStep, ask: Ask, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plain(double, ask)


# Sampling

LOGITS = torch.tensor([2.0, 1.5, 1.4, 0.3, -0.2, -1.0, -3.0])


def test_filters_are_transformers_own() -> None:
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.tensor([[0, 3, 3, 5]])
    for temperature, top_k, top_p, min_p, penalty in (
        (0.7, 0, 1.0, 0.0, 1.0), (1.0, 3, 1.0, 0.0, 1.0), (1.4, 0, 0.8, 0.0, 1.0), (1.0, 0, 1.0, 0.3, 1.0),
        (0.9, 5, 0.9, 0.1, 1.7), (1.0, 0, 1e-6, 0.0, 1.0), (1.0, 99, 1.0, 0.0, 1.0),
    ):  # fmt: skip
        wanted = LOGITS[None].clone()
        steps = [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
        for step in steps:
            wanted = step(ids, wanted)
        wanted = wanted / temperature
        warpers = [TopKLogitsWarper(min(top_k, 7))] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        warpers += [MinPLogitsWarper(min_p)] if min_p else []
        for warper in warpers:
            wanted = warper(ids, wanted)
        found = probabilities(LOGITS, Sampling(temperature, top_p, top_k, 1, min_p, penalty), ids[0].tolist())
        assert torch.allclose(found, wanted[0].softmax(-1), atol=1e-6)


DRAWS = 100_000


def distance(counts: torch.Tensor, p: torch.Tensor) -> tuple[float, float]:
    """Total variation, and chi-squared over its degrees of freedom."""
    share, allowed = counts / counts.sum(), p > 0
    assert counts[~allowed].sum() == 0
    chi = ((counts - counts.sum() * p)[allowed] ** 2 / (counts.sum() * p)[allowed]).sum()
    return float((share - p).abs().sum() / 2), float(chi / (int(allowed.sum()) - 1))


@pytest.mark.parametrize("draft", ["one", "own", "other"])
def test_accepted_drafts_leave_the_distribution_alone(draft: str) -> None:
    p = probabilities(LOGITS, Sampling(0.9, top_k=6))
    second = probabilities(LOGITS.flip(0), Sampling(1.1))
    q = {"one": None, "own": p, "other": probabilities(LOGITS.roll(2), Sampling(1.0))}[draft]
    source, pairs = generator(7), torch.zeros(7, 7)
    for _ in range(DRAWS):
        token = 1 if q is None else draw(q, source)
        kept = accept([token], [q], [p, second].__getitem__, source)
        pairs[kept[0], kept[1] if len(kept) > 1 else draw(second, source)] += 1
    variation, chi = distance(pairs.sum(1), p)
    assert variation < 0.006
    assert chi < 2.8
    variation, chi = distance(pairs.flatten(), torch.outer(p, second).flatten())
    assert variation < 0.015
    assert chi < 1.7


def test_how_often_drafts_are_kept_is_what_the_distributions_share() -> None:
    p, q = probabilities(LOGITS, Sampling(1.0)), probabilities(LOGITS.roll(1), Sampling(1.0))
    source = generator(1)
    kept = sum(len(accept([draw(q, source)], [q], [p, p].__getitem__, source)) - 1 for _ in range(20_000))
    assert kept / 20_000 == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.012)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.99), st.sampled_from([1, 7, 4096]))
def test_the_nucleus_is_that_of_a_full_sort(seed: int, mass: float, first: int) -> None:
    logits = 3 * torch.randn(2000, generator=generator(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "LIKELIEST", first)
        found = probabilities(logits, Sampling(1.0, top_p=mass))
    ordered, ids = logits.softmax(-1).sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ids[before < mass]
    sure = ids[(before - mass).abs() > 1e-5]  # sums in another order may differ on the edge
    assert set(sure[torch.isin(sure, kept)].tolist()) == set(sure[found[sure] > 0].tolist())
    assert float(found.sum()) == pytest.approx(1)


def test_no_distribution_is_made_that_nobody_looks_at() -> None:
    asked: list[int] = []

    def target(index: int) -> torch.Tensor:
        asked.append(index)
        return torch.nn.functional.one_hot(torch.tensor(2), 5).float()

    assert accept([4, 4, 4], [None] * 3, target, generator(0)) == [2]
    assert asked == [0]


@pytest.mark.parametrize(
    "sampled", [Sampling(1.0, top_k=40, repetition_penalty=1.3), Sampling(0.8, top_p=0.7), Sampling(1.2, min_p=0.02)]
)
def test_the_loop_samples_as_without_a_draft(double: DoubleStep, sampled: Sampling) -> None:
    """Two tokens after a prompt, drafted by another model: 2,000 rows, held against the exact distribution of both."""
    rows, prompt = 2000, tuple(range(3, 9))
    ask = Ask(prompt, 2, replace(sampled, candidates=rows), seed=5)
    drafter = ModelDraft(DoubleStep(tiny(num_hidden_layers=1)))
    found = Loop(double, drafter, DraftLength(1, is_fixed=True)).run([ask])
    first = probabilities(logits_after(double, prompt), sampled, prompt)
    counts = torch.bincount(torch.tensor([each.ids[0] for each in found]), minlength=VOCABULARY).double()
    assert not counts[first == 0].any()
    likeliest = int(first.argmax())
    assert counts[likeliest] / rows == pytest.approx(float(first[likeliest]), abs=0.045)
    second = probabilities(logits_after(double, (*prompt, likeliest)), sampled, (*prompt, likeliest))
    after = [each.ids[1] for each in found if each.ids[0] == likeliest]
    seen = torch.bincount(torch.tensor(after), minlength=VOCABULARY).double() / len(after)
    assert not seen[second == 0].any()
    assert float((seen - second).abs().sum()) / 2 < 1.3 * math.sqrt(int((second > 0).sum()) / len(after))


def logits_after(step: DoubleStep, ids: Sequence[int]) -> torch.Tensor:
    found = step.run([Run(step.open(), ids)]).logits
    assert found is not None
    return found[0]


# When it ends


class Failing(DoubleStep):
    """Cannot run; says what was opened and closed."""

    def __init__(self, inner: DoubleStep) -> None:
        self.vocabulary, self.context, self.count = inner.vocabulary, inner.context, 0

    def open(self) -> list[int]:
        self.count += 1
        return []

    def close(self, sequence: list[int]) -> None:
        self.count -= 1

    def run(self, runs: Sequence[Run], want_logits: bool = True) -> Output:
        raise InputError("a logit is not finite")


def test_a_prompt_that_fails_leaves_nothing_open(double: DoubleStep) -> None:
    step = Failing(double)
    with pytest.raises(InputError, match="not finite"):
        Loop(step).run([Ask((1, 2), 3), Ask((4,), 3, Sampling(1.0, candidates=3))])
    assert step.count == 0


def test_cancelled_beforehand_nothing_is_computed(double: DoubleStep) -> None:
    before = double.tokens
    found = Loop(double).run([Ask((1, 2), 3), Ask((4,), 3, Sampling(1.0, candidates=2))], is_cancelled=lambda: True)
    assert [(each.ask, each.candidate, each.finish) for each in found] == [
        (0, 0, "cancelled"), (1, 0, "cancelled"), (1, 1, "cancelled"),
    ]  # fmt: skip
    assert double.tokens == before


def test_stop_texts_are_looked_for_among_the_last_tokens(double: DoubleStep) -> None:
    lengths: list[int] = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return "".join(chr(0x4E00 + token) for token in ids)

    ids = plain(double, Ask((5, 6, 7), 60)).ids
    end = next(i for i in range(40, 59) if (ids[i - 1], ids[i]) not in list(pairwise(ids[:i])))
    stop = "".join(chr(0x4E00 + token) for token in ids[end - 1 : end + 1])
    found = plain(double, Ask((5, 6, 7), 60, stop_texts=(stop,), decode=decode))
    assert (found.ids, found.finish) == (ids[: end + 1], "text")
    assert max(lengths) <= len(stop.encode()) + MARGIN


# Drafts and their length


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 6))
def test_lookup_continues_the_latest_of_the_longest_matches(ids: list[int], most: int) -> None:
    lookup = PromptLookup(longest=4, shortest=2)
    state = lookup.open()
    for end in range(1, len(ids) + 1):  # as it grows
        (found,) = lookup.propose([Wanted(state, ids[:end], most, generator(0), Sampling())])
    wanted: tuple[int, ...] = ()
    for size in (4, 3, 2):
        ends = [i for i in range(size, len(ids)) if ids[i - size : i] == ids[-size:]]
        if ends and size < len(ids):
            text = list(ids)
            for position in range(ends[-1], ends[-1] + most):  # as it was then; a loop goes on
                text.append(text[position])
            wanted = tuple(text[len(ids) :])
            break
    assert found.tokens == wanted


def test_a_loop_is_drafted_to_the_end() -> None:
    lookup = PromptLookup()
    for text, expected in ((([7] * 9), (7,) * 6), ([7, 8] * 5, (7, 8) * 3)):
        (found,) = lookup.propose([Wanted(lookup.open(), text, 6, generator(0), Sampling())])
        assert found.tokens == expected


def test_one_slow_step_is_forgotten() -> None:
    length = DraftLength(most=8)
    length.saw([(2, 0, 0)], 1.0)
    length.saw([(2, 8, 8)], 20.0)
    chosen = []
    for _ in range(2 * FORGOTTEN):
        count = length.choose(2)
        chosen.append(count)
        length.saw([(2, count, count)], 1 + 0.05 * count)
    assert chosen[-1] == 8
    assert chosen.count(0) <= 4


def test_a_kind_that_was_refused_is_tried_again_whatever_others_do() -> None:
    length = DraftLength(most=8)
    length.saw([(2, 0, 0)], 1.0)
    for _ in range(30):
        length.saw([(2, 4, 0)], 1.2)
    assert length.choose(2) == 0
    for _ in range(RETRY):
        length.saw([(2, 0, 0)], 1.0)
        length.saw([(5, 8, 8)], 1.3)
    assert length.choose(2) == 1


def test_rows_are_measured_apart() -> None:
    length = DraftLength(most=8)
    for _ in range(5):
        length.saw([(2, 0, 0)] * 8, 4.0)
        length.saw([(2, 0, 0)], 1.0)
    assert length.cost(8, rows=8) == 4.0
    assert length.cost(8) < 2.0


def test_lengths_follow_what_drafts_bring_and_cost() -> None:
    length = DraftLength(most=12)
    for _ in range(50):
        length.saw([(3, 0, 0)], 1.0)
        length.saw([(3, 4, 4)], 1.1)
        length.saw([(3, 8, 8)], 1.3)
    assert length.choose(3) >= 8
    for _ in range(200):
        length.saw([(3, 1, 0)], 1.2)
    assert length.choose(3) == 0, "a plain step is due"
    length.saw([(3, 0, 0)], 1.0)
    assert length.choose(3) == 0
    for _ in range(RETRY):
        length.saw([(0, 0, 0)], 1.0)
    assert length.choose(3) == 1, "now and then it tries again"


def test_a_dear_verification_is_not_asked_for() -> None:
    length = DraftLength(most=8)
    length.saw([(2, 0, 0)], 1.0)
    length.saw([(2, 1, 1)], 3.0)
    assert length.choose(2) == 0


def test_costs_lie_between_what_was_measured() -> None:
    length = DraftLength(most=8)
    length.saw([(0, 0, 0)], 1.0)
    length.saw([(0, 4, 4)], 2.0)
    assert [length.cost(n) for n in (1, 3, 5)] == [1.0, 1.5, 2.0]
    assert length.cost(9) > 2.0
    assert math.isclose(DraftLength(4).cost(1), 1.0)
    assert DraftLength(6, is_fixed=True).choose(0) == 6
