"""Multiple choice: scores by hand, padding without influence, and the comparison's counts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from infopt.data.choices import Item
from infopt.errors import InputError
from infopt.quality.tasks import ItemScore, compare_scores, majority, masked_logits_of, score_choices

ITEMS = [
    Item("a", "Birds can", ("fly", "read a newspaper", "né"), 0, "one"),
    Item("b", "Ice is ", (" cold", "hot"), 1, "two"),
]


def test_scores_equal_one_choice_at_a_time(tiny_llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """By hand, in float64, without padding: the byte tokenizer's tokens after "question " plus the space."""
    scores = score_choices(masked_logits_of(tiny_llama), byte_tokenizer, ITEMS)
    for item, score in zip(ITEMS, scores, strict=True):
        for choice, found, per_byte in zip(item.choices, score.log_likelihoods, score.per_byte, strict=True):
            question = byte_tokenizer(item.question.strip())["input_ids"]
            ids = question + byte_tokenizer(" " + choice.strip())["input_ids"]
            with torch.no_grad():
                log_probs = tiny_llama(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected = sum(float(log_probs[i - 1, ids[i]]) for i in range(len(question), len(ids)))
            assert found == pytest.approx(expected, rel=1e-5)
            assert per_byte == pytest.approx(expected / len(choice.encode()), rel=1e-5)
    assert [score.predicted for score in scores] == [max(range(len(s.per_byte)), key=s.per_byte.__getitem__) for s in scores]


def test_a_scripted_model_gives_known_scores(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Every token has probability ½ if it is the letter `x`, else 1/(2·256)."""
    x = byte_tokenizer("x")["input_ids"][0]
    logits = torch.full((257,), math.log(0.5 / 256))
    logits[x] = math.log(0.5)
    seen: list[list[int]] = []

    def model(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append(mask.sum(1).tolist())
        return logits.expand(*ids.shape, -1)

    (score,) = score_choices(model, byte_tokenizer, [Item("i", "Q", ("xx", "xy", "xxé"), 0, "s")])
    half, other = math.log(0.5), math.log(0.5 / 256)
    assert score.log_likelihoods == pytest.approx((other + 2 * half, 2 * other + half, 3 * other + 2 * half), rel=1e-6)
    assert score.per_byte[2] == pytest.approx((3 * other + 2 * half) / 4, rel=1e-6)
    assert score.is_correct
    assert seen == [[4, 4, 6]]


def test_items_beyond_the_context_are_refused(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    def unused(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise AssertionError("refused before the model runs")

    with pytest.raises(InputError, match="item 'a' has 26 tokens; the model's context is 25"):
        score_choices(unused, byte_tokenizer, ITEMS, context_tokens=25)


def test_a_choice_without_tokens_of_its_own_is_refused() -> None:
    def same_for_all(text: str) -> dict[str, list[int]]:
        return {"input_ids": [7]}

    with pytest.raises(InputError, match="item 'a': question and choice cannot be told apart"):
        score_choices(lambda ids, mask: ids, same_for_all, ITEMS)  # type: ignore[arg-type]


def score(name: str, *, right: bool) -> ItemScore:
    return ItemScore(name, 0, (-1.0, -2.0), (-1.0, -2.0) if right else (-2.0, -1.0))


def test_comparison_counts_flips_both_ways() -> None:
    before = [True] * 30 + [False] * 20
    now = [True] * 22 + [False] * 8 + [True] * 2 + [False] * 18
    old = [score(f"i{n}", right=right) for n, right in enumerate(before)]
    new = [score(f"i{n}", right=right) for n, right in enumerate(now)]
    result = compare_scores(old, new)
    assert result.broken == tuple(f"i{n}" for n in range(22, 30))
    assert result.fixed == ("i30", "i31")
    assert (result.total, result.correct_reference, result.correct) == (50, 30, 24)
    assert result.mcnemar_p == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    figures = result.figures()
    assert figures["mc.accuracy"].value == pytest.approx(0.48)
    assert figures["mc.delta"].value == pytest.approx(-0.12)
    assert figures["mc.flips_share"].value == pytest.approx(0.2)
    for key in ("mc.accuracy", "mc.delta", "mc.flips_share"):
        value = figures[key]
        assert value.low is not None
        assert value.high is not None
        assert value.low < value.value < value.high
    assert result.mde > 0.02  # fifty items cannot show two points


def test_equal_scores_are_no_proof_of_equality() -> None:
    same = [score(f"i{n}", right=n % 2 == 0) for n in range(50)]
    result = compare_scores(same, same)
    assert (result.broken, result.fixed, result.mcnemar_p) == ((), (), 1.0)
    delta = result.figures()["mc.delta"]
    assert delta.value == 0
    assert delta.low is not None
    assert delta.low < 0
    assert result.mde > 0


def test_a_score_that_is_nan_is_wrong_and_ties_take_the_first() -> None:
    broken = ItemScore("i", 0, (math.nan, -1.0), (math.nan, -1.0))
    assert (broken.predicted, broken.is_correct) == (None, False)
    assert ItemScore("i", 1, (-1.0, -1.0), (-1.0, -1.0)).predicted == 0
    result = compare_scores([score("i", right=True)], [broken])
    assert result.broken == ("i",)
    json.dumps({key: value.model_dump() for key, value in result.figures().items()}, allow_nan=False)


def test_other_items_are_refused() -> None:
    for candidate in ([score("j", right=True)], [], [score("i", right=True)] * 2):
        with pytest.raises(InputError, match="same items"):
            compare_scores([score("i", right=True)], candidate)
    with pytest.raises(InputError, match="same items"):
        compare_scores([], [])


@pytest.mark.parametrize(("answers", "share"), [((0, 1, 0, 0), 0.75), ((1, 1), 1.0)])
def test_the_majority_class_is_the_commonest_answer(answers: tuple[int, ...], share: float) -> None:
    items = [Item(f"i{n}", "q", ("yes", "no"), answer, "own") for n, answer in enumerate(answers)]
    assert majority(items) == share
    assert majority([*items, Item("other", "q", ("a", "b"), 0, "own")]) is None, "no classification"


def test_retention_is_the_lead_that_is_left() -> None:
    """40 of 60 by the reference, 35 by the candidate, 20 by who always says the commonest."""
    old = [score(f"i{n}", right=n < 40) for n in range(60)]
    new = [score(f"i{n}", right=2 <= n < 37) for n in range(60)]
    found = compare_scores(old, new, majority=1 / 3).figures()["mc.retention"]
    assert found.value == pytest.approx(15 / 20)
    assert found.low is not None
    assert found.high is not None
    assert 0.4 < found.low < 0.75 < found.high < 1.05
    for floor, reason in ((None, "choices of their own"), (0.7, "no more often than the commonest")):
        absent = compare_scores(old, new, majority=floor).figures()["mc.retention"]
        assert absent.value is None
        assert reason in (absent.reason or "")


def test_an_uncertain_lead_gives_no_bounds() -> None:
    old = [score(f"i{n}", right=n < 6) for n in range(10)]
    found = compare_scores(old, old, majority=0.5).figures()["mc.retention"]
    assert (found.value, found.low, found.high) == (1.0, None, None)
