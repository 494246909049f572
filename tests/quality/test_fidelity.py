"""Fidelity against a plain float64 computation, hand-made distributions, and models pushed to extremes."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from infopt.errors import InfoptError, InputError
from infopt.figures import FIGURES
from infopt.quality.fidelity import FIGURES as KEYS
from infopt.quality.fidelity import FidelityResult, common_vocabulary, compare_models, logits_of


def scripted(logits: torch.Tensor):  # type: ignore[no-untyped-def]
    """A model that answers every window with these logits, [tokens, vocabulary]."""
    return lambda ids: logits[None]


def token_windows(count: int = 4, length: int = 23) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(300) for _ in range(length)] for _ in range(count)]


def plain_float64(model: LlamaForCausalLM, windows: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([w])).logits[0, :-1].double().log_softmax(-1) for w in windows]


def test_figures_equal_a_plain_float64_computation(tiny_llama: LlamaForCausalLM, changed_llama: LlamaForCausalLM) -> None:
    windows = token_windows()
    result = compare_models(logits_of(tiny_llama), logits_of(changed_llama), windows, chunk=5)
    log_p = torch.cat(plain_float64(tiny_llama, windows))
    log_q = torch.cat(plain_float64(changed_llama, windows))
    true = torch.tensor([token for window in windows for token in window[1:]])[:, None]
    kld = (log_p.exp() * (log_p - log_q)).sum(-1)
    nll_p, nll_q = -log_p.gather(1, true)[:, 0], -log_q.gather(1, true)[:, 0]
    figures = {key: value.value for key, value in result.figures().items()}
    expected = {
        "kld.mean": kld.mean(),
        "kld.median": kld.quantile(0.5),
        "kld.p99": kld.quantile(0.99),
        "kld.max": kld.max(),
        "ppl_ratio": (nll_q - nll_p).mean().exp(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(),
        "rms_dp": ((-nll_q).exp() - (-nll_p).exp()).square().mean().sqrt(),
    }
    assert figures == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-5, abs=1e-7)
    assert result.ppl == pytest.approx(float(nll_q.mean().exp()), rel=1e-5)
    assert result.ppl_reference == pytest.approx(float(nll_p.mean().exp()), rel=1e-5)
    assert 0.2 < figures["top1_agreement"] < 1  # the noise must change something, or nothing was tested
    assert figures["kld.mean"] > 0.01
    assert set(KEYS) <= set(FIGURES)


def test_chunks_do_not_change_the_figures(tiny_llama: LlamaForCausalLM, changed_llama: LlamaForCausalLM) -> None:
    results = [
        compare_models(logits_of(tiny_llama), logits_of(changed_llama), token_windows(1), chunk=chunk)
        for chunk in (1, 7, 22, 500)
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result.windows[0].kld, results[0].windows[0].kld, rtol=1e-6)
        np.testing.assert_array_equal(result.windows[0].is_same_top, results[0].windows[0].is_same_top)


def test_a_model_against_itself_is_exactly_equal(tiny_llama: LlamaForCausalLM) -> None:
    result = compare_models(logits_of(tiny_llama), logits_of(tiny_llama), token_windows())
    figures = {key: (value.value, value.low, value.high) for key, value in result.figures().items()}
    assert figures["kld.max"][0] == 0
    assert figures["ppl_ratio"] == (1, 1, 1)
    assert figures["top1_agreement"] == (1, 1, 1)
    assert figures["rms_dp"][0] == 0


def test_hand_made_distributions() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    ids = [0, 2, 1]
    result = compare_models(scripted(p.log().repeat(3, 1)), scripted(q.log().repeat(3, 1)), [ids])
    (window,) = result.windows
    np.testing.assert_allclose(window.kld, [0.25 * math.log(2)] * 2, rtol=1e-6)  # ½·ln 2 − ¼·ln 2
    np.testing.assert_allclose(window.nll_reference, [math.log(4)] * 2, rtol=1e-6)
    np.testing.assert_allclose(window.nll, [math.log(2), math.log(4)], rtol=1e-6)
    np.testing.assert_allclose(window.delta_p, [0.25, 0], atol=1e-7)
    assert window.is_same_top.tolist() == [False, False]
    assert result.figures()["ppl_ratio"].value == pytest.approx(2**-0.5)
    assert result.figures()["ppl_ratio"].low is None  # one window has no spread
    assert result.positions == 2


def test_interval_counts_windows_not_tokens() -> None:
    """Ten equal positions per window add nothing: the interval is the t interval of the two windows' means."""
    rows = [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])]
    answers = iter(rows)
    result = compare_models(scripted(torch.zeros(11, 2)), lambda ids: next(answers).repeat(1, 11, 1), [[0] * 11, [0] * 11])
    deltas = [math.log(0.5) - math.log(1 / (1 + math.exp(-x))) for x in (3, 1)]
    half = 12.7062 * abs(deltas[0] - deltas[1]) / 2
    value = result.figures()["ppl_ratio"]
    assert value.value == pytest.approx(math.exp(sum(deltas) / 2), rel=1e-5)
    assert (math.log(value.low or 0), math.log(value.high or 0)) == pytest.approx(
        (sum(deltas) / 2 - half, sum(deltas) / 2 + half), rel=1e-3
    )


def test_agreement_bounds_stay_shares() -> None:
    agree, differ = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    answers = iter([agree, agree, differ])
    reference = scripted(agree[0].repeat(5, 1))
    value = compare_models(reference, lambda ids: next(answers).repeat(1, 5, 1), [[0] * 5] * 3).figures()["top1_agreement"]
    assert (value.value, value.low, value.high) == (pytest.approx(2 / 3), 0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_may_differ(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = compare_models(scripted(logits), scripted(logits.float()), [list(range(9))])
    assert result.figures()["kld.max"].value == pytest.approx(0, abs=1e-6)


def test_padding_of_the_vocabulary_is_left_out() -> None:
    logits = torch.randn(6, 250, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([logits, torch.full((6, 6), 9.0)], dim=1)
    for reference, candidate in ((logits, padded), (padded, logits)):
        assert compare_models(scripted(reference), scripted(candidate), [[1, 2, 3, 4, 5, 6]]).figures()["kld.max"].value == 0
    with pytest.raises(InputError, match="token id 251 is outside"):
        compare_models(scripted(padded), scripted(logits), [[1, 251, 3, 4, 5, 6]])


@pytest.mark.parametrize(
    ("sizes", "common"), [((49152, 49152), 49152), ((50257, 50304), 50257), ((32064, 32000), None), ((100, 99), None)]
)
def test_only_padding_is_allowed_between_vocabularies(sizes: tuple[int, int], common: int | None) -> None:
    if common is not None:
        assert common_vocabulary(*sizes) == common_vocabulary(*sizes[::-1]) == common
        return
    with pytest.raises(InputError, match=f"vocabularies differ: reference {sizes[0]}, candidate {sizes[1]}"):
        common_vocabulary(*sizes)


def test_rounding_makes_no_divergence_negative() -> None:
    logits = 4 * torch.randn(40, 5000, generator=torch.Generator().manual_seed(0))
    nearly = logits + 1e-6 * torch.randn(40, 5000, generator=torch.Generator().manual_seed(1))
    (window,) = compare_models(scripted(logits), scripted(nearly), [list(range(40))]).windows
    assert window.kld.min() >= 0
    assert window.kld.max() < 1e-5


def test_masked_tokens_are_no_difference() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]]).repeat(4, 1)
    assert compare_models(scripted(logits), scripted(logits), [[0, 1, 0, 1]]).figures()["kld.max"].value == 0


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_logits_that_are_not_finite_make_figures_null_with_a_reason(bad: float) -> None:
    good = torch.zeros(5, 4)
    broken = good.clone()
    broken[1, 2] = bad
    result = compare_models(scripted(good), scripted(broken), [[0, 1, 2, 3, 0]])
    assert {value.value for value in result.figures().values()} == {None}
    assert {value.reason for value in result.figures().values()} == {"logits not finite at 1 of 4 positions"}
    assert result.ppl is None
    assert result.delta_nll is None
    assert result.ppl_ratio is None


def test_a_ruined_model_overflows_nothing() -> None:
    sure = torch.full((5, 4), 0.0)
    sure[:, 0] = 2000.0
    result = compare_models(scripted(torch.zeros(5, 4)), scripted(sure), [[1, 2, 3, 1, 2], [1, 2, 3, 1, 2]])
    figures = result.figures()
    assert figures["kld.mean"].value == pytest.approx(1500 - math.log(4))
    assert (figures["ppl_ratio"].value, figures["ppl_ratio"].reason) == (None, "not finite (inf)")
    assert result.ppl is None


def test_windows_and_logits_that_do_not_fit_are_refused() -> None:
    model = scripted(torch.zeros(3, 4))
    with pytest.raises(InputError, match="no windows"):
        compare_models(model, model, [])
    with pytest.raises(InputError, match="window 2 has 1 tokens"):
        compare_models(model, model, [[0, 1, 2], [0]])
    with pytest.raises(InfoptError, match=r"shape \(1, 3, 4\) for 2 tokens"):
        compare_models(model, model, [[0, 1]])


def test_progress_is_told_once_per_window() -> None:
    lines: list[str] = []
    model = scripted(torch.zeros(3, 4))
    result = compare_models(model, model, [[0, 1, 2]] * 2, lines.append)
    assert lines == ["fidelity: window 1 of 2", "fidelity: window 2 of 2"]
    assert isinstance(result, FidelityResult)
