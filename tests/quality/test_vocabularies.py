"""A candidate with a part of the reference's tokens: which numbers mean what, and fidelity on the same text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from infopt.errors import InputError
from infopt.quality.behaviour import Answer, compare_answers, retokenised
from infopt.quality.fidelity import compare_models, logits_of
from infopt.quality.vocabularies import Part, between, is_same

#: Of 300 tokens those that stay: all but every seventh from 14 on.
KEPT = [index for index in range(300) if index < 14 or index % 7]


class Tokens:
    """A tokenizer as far as vocabularies ask: tokens by number, and what others are spelled with."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.backend_tokenizer = self.model = self

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def tokenize(self, text: str) -> list[Any]:
        from types import SimpleNamespace

        return [SimpleNamespace(id=self.tokens.index(letter)) for letter in text if letter in self.tokens]


def spell(token: int) -> tuple[int, ...]:
    return (token % 5, token % 11, 3) if token % 2 else (token % 13,)


def trimmed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    small = copy.deepcopy(model)
    small.lm_head.weight.data = small.lm_head.weight.data[KEPT]
    small.model.embed_tokens.weight.data = small.model.embed_tokens.weight.data[KEPT]
    return small


def test_figures_equal_a_plain_float64_computation(tiny_llama: LlamaForCausalLM, changed_llama: LlamaForCausalLM) -> None:
    part, small = Part(KEPT, 300, spell), trimmed(changed_llama)
    windows = [[(11 * place + 5 * window + 14) % 300 for place in range(23)] for window in range(4)]
    assert part.lacking(windows) > 10
    assert windows[0][0] not in KEPT  # the first token in pieces, too
    result = compare_models(logits_of(tiny_llama), logits_of(small), windows, chunk=5, part=part)
    expected: list[tuple[float, float, float, bool]] = []
    for window in windows:
        with torch.no_grad():
            log_p = tiny_llama(torch.tensor([window])).logits[0].double().log_softmax(-1)
        read: list[int] = []
        for place, token in enumerate(window):
            pieces = [KEPT.index(token)] if token in KEPT else list(spell(token))
            if place:
                with torch.no_grad():
                    log_q = small(torch.tensor([read + pieces])).logits[0].double().log_softmax(-1)
                said = sum(float(log_q[len(read) - 1 + i, piece]) for i, piece in enumerate(pieces))
                shared, mine = log_p[place - 1, KEPT].log_softmax(-1), log_q[len(read) - 1]
                same = int(log_p[place - 1].argmax()) == KEPT[int(mine.argmax())]
                expected.append((float((shared.exp() * (shared - mine)).sum()), -float(log_p[place - 1, token]), -said, same))
            read += pieces
    kld, nll_reference, nll, same = (torch.tensor(column, dtype=torch.float64) for column in zip(*expected, strict=True))
    figures = {key: value.value for key, value in result.figures().items()}
    assert result.kld_mean is not None
    assert result.kld_mean.estimate == pytest.approx(float(kld.mean()), rel=1e-5)
    assert figures["ppl_ratio"] == pytest.approx(float((nll - nll_reference).mean().exp()), rel=1e-5)
    assert figures["top1_agreement"] == pytest.approx(float(same.mean()))
    assert figures["rms_dp"] == pytest.approx(float(((-nll).exp() - (-nll_reference).exp()).square().mean().sqrt()), rel=1e-5)
    assert all(figures[key] is None for key in figures if key.startswith("kld."))
    assert (
        result.figures()["kld.mean"].reason == f"KLD is over all of the reference's tokens; the candidate has {len(KEPT)} of 300"
    )


def test_a_model_that_lost_rows_alone_says_the_rest_as_before(tiny_llama: LlamaForCausalLM) -> None:
    windows = [[KEPT[(5 * place) % len(KEPT)] for place in range(20)]]
    result = compare_models(logits_of(tiny_llama), logits_of(trimmed(tiny_llama)), windows, part=Part(KEPT, 300, spell))
    assert result.kld_mean is not None
    assert result.kld_mean.estimate == pytest.approx(0, abs=1e-6)
    assert result.ppl_ratio is not None
    assert result.ppl_ratio.estimate < 1  # the lost tokens' share went to the others


def test_tokens_without_logits_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match="more tokens than its model has logits"):
        compare_models(logits_of(tiny_llama), logits_of(tiny_llama), [[1, 2]], part=Part([*KEPT, 300], 301, spell))


def test_how_vocabularies_lie_to_each_other() -> None:
    whole = Tokens([*"abcdefgh", "ab", "bcd"])
    assert between(whole, Tokens(whole.tokens)) is None  # type: ignore[arg-type]
    assert is_same(whole, Tokens([*whole.tokens, "more"]))  # type: ignore[arg-type]
    part = between(whole, Tokens([*"acbdefgh"]))  # type: ignore[arg-type]
    assert part is not None
    assert part.ids == (0, 2, 1, 3, 4, 5, 6, 7)
    assert [part.pieces(token) for token in (1, 8, 9)] == [(2,), (0, 2), (2, 1, 3)]
    assert part.lacking([[0, 8, 9], [9]]) == 3
    first = between(whole, Tokens([*"abcdefgh"]))  # type: ignore[arg-type] # the numbers agree, but too many are gone
    assert first is not None
    assert not is_same(whole, Tokens([*"abcdefgh"]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"of the candidate's 9 tokens 8 have another number in the reference, 1 are not there"):
        between(whole, Tokens(["z", *"abcdefgh"]))  # type: ignore[arg-type]
    assert not is_same(whole, Tokens(["z", *"abcdefgh"]))  # type: ignore[arg-type]
    lost = between(whole, Tokens([*"cdefgh"]))  # type: ignore[arg-type]
    assert lost is not None
    with pytest.raises(InputError, match="cannot read the reference's token 8"):
        lost.pieces(8)


def test_answers_are_told_in_the_references_tokens() -> None:
    from infopt.data.prompts import Prompt

    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    prompts = [Prompt("one", text="?"), Prompt("two", text="?")]
    reference = [Answer("one", (1,), (500, 98), "ab"), Answer("two", (1,), (97, 98), "ab")]
    candidate = [Answer("one", (9,), (7, 8, 9), "ab"), Answer("two", (9,), (7,), "ac")]
    told = retokenised(candidate, reference, tokenizer)  # type: ignore[arg-type]
    assert [answer.output_ids for answer in told] == [(500, 98), (97, 99)]
    assert [outcome.divergence for outcome in compare_answers(prompts, reference, told).outcomes] == [None, 1]
