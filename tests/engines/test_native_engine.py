"""The native engine gives stock greedy text, and its traces count what was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest_runtime import VOCABULARY, tiny

from infopt import arms, pipeline
from infopt.engines import find
from infopt.engines.native import NativeEngine
from infopt.engines.transformers import TransformersEngine
from infopt.errors import InputError
from infopt.model.bundle import Bundle
from infopt.protocols import Request, Sampling
from infopt.runtime.native_model import NativeModel, Settings, open_native

PROMPTS = [[(7 * i * i + 3) % VOCABULARY for i in range(length)] for length in (5, 31, 70, 1)]


@pytest.fixture
def opened() -> Callable[..., NativeModel]:
    def make(way: Any = "auto") -> NativeModel:
        return open_native(tiny(), Settings(2, "float32", "float32", "float32", way))

    return make


def request(prompt: list[int], new: int, **more: Any) -> Request:
    return Request("0", tuple(prompt), new, **more)


@pytest.mark.parametrize("way", ["whole", "swapped"])
@pytest.mark.parametrize("settings", [{}, {"draft": "prompt_lookup"}, {"draft": "prompt_lookup", "draft_tokens": 4}], ids=str)
def test_greedy_text_is_that_of_stock_generate(opened: Callable[..., NativeModel], way: Any, settings: dict[str, Any]) -> None:
    engine, stock = NativeEngine(opened(way), **settings), TransformersEngine(tiny())
    for prompt in PROMPTS:
        found, wanted = engine.generate([request(prompt, 40)]), stock.generate([request(prompt, 40)])
        assert found.output_ids == wanted.output_ids
        assert sum(found.emission_tokens) == 40
        assert list(found.emission_s) == sorted(found.emission_s)
        assert (found.drafted is None) == (not settings)


def test_requests_of_unequal_length_share_a_batch(opened: Callable[..., NativeModel]) -> None:
    engine = NativeEngine(opened())
    requests = [request(prompt, new) for prompt, new in zip(PROMPTS, (4, 9, 2, 7), strict=True)]
    found = engine.generate(requests)
    assert found.output_ids == tuple(engine.generate([each]).output_ids[0] for each in requests)
    assert len(found.emission_s) == 9


def test_what_a_step_found_out_is_noted_once(opened: Callable[..., NativeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    engine = NativeEngine(model, notes=("native engine",))
    monkeypatch.setattr(type(model.step), "remarks", ("2 graphs in 3.0 s",))
    for _ in range(2):
        engine.generate([request(PROMPTS[0], 2)])
        assert engine.notes == ("native engine", "2 graphs in 3.0 s")


def test_the_end_token_ends_unless_told_otherwise(opened: Callable[..., NativeModel]) -> None:
    model = opened()
    ids = NativeEngine(model).generate([request(PROMPTS[1], 12)]).output_ids[0]
    model.generation_config.eos_token_id = [ids[5]]
    first = ids.index(ids[5]) + 1
    assert NativeEngine(model).generate([request(PROMPTS[1], 12, ignore_eos=False)]).output_ids[0] == ids[:first]
    assert NativeEngine(model).generate([request(PROMPTS[1], 12)]).output_ids[0] == ids


def test_candidates_are_rows_of_their_own(opened: Callable[..., NativeModel]) -> None:
    engine = NativeEngine(opened(), sampling=Sampling(1.2, candidates=3))
    found = engine.generate([request(PROMPTS[0], 8, seed=3), request(PROMPTS[1], 8, seed=4)])
    assert len(found.output_ids) == 6
    assert len(set(found.output_ids)) > 2
    assert engine.generate([request(PROMPTS[0], 8, seed=3)]).output_ids == found.output_ids[:3]


@pytest.mark.parametrize("settings", [{}, {"draft": "prompt_lookup"}], ids=str)
def test_mean_log_probabilities_are_the_models_own(opened: Callable[..., NativeModel], settings: dict[str, Any]) -> None:
    model, sampling = opened(), Sampling(1.2, top_k=20, candidates=3, choose="majority")
    prompts = PROMPTS[:2]
    found = NativeEngine(model, sampling=sampling, **settings).generate([request(prompt, 8, seed=3) for prompt in prompts])
    assert found.mean_logprobs is not None
    for row, (ids, level) in enumerate(zip(found.output_ids, found.mean_logprobs, strict=True)):
        prompt = prompts[row // 3]
        logits = tiny()(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert level == pytest.approx(float(logits.gather(1, torch.tensor(ids)[:, None]).mean()), abs=1e-3)


def test_log_probabilities_cost_nothing_where_nobody_asked(opened: Callable[..., NativeModel]) -> None:
    engine = NativeEngine(opened(), sampling=Sampling(1.2, candidates=2))
    assert engine.generate([request(PROMPTS[0], 4)]).mean_logprobs is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampling": Sampling(0.0, candidates=2)}, "greedy decoding has exactly 1"),
        ({"prefix": True}, "keeps no prefix"),
        ({"compile": "auto"}, "compiles nothing"),
    ],
)
def test_settings_that_do_not_go_together(opened: Callable[..., NativeModel], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        NativeEngine(opened(), **settings)


def test_stock_generate_in_its_place_chooses_by_no_log_probabilities(tiny_bundle: Bundle) -> None:
    bundle = replace(tiny_bundle, notes=("stock generate of transformers; the native engine does not fit: a reason",))
    for choose in ("mean_logprob", "majority"):
        sets = ["sampling.temperature=1.0", "sampling.candidates=2", f"sampling.choose={choose}"]
        chosen = arms.spec("tiny", "native_exact", sets).recipe
        if choose == "majority":
            assert pipeline.engine(bundle, chosen).name == "transformers"
            continue
        with pytest.raises(InputError, match=r"found mean_logprob, but this is stock generate .* a reason; allowed: majority"):
            pipeline.engine(bundle, chosen)


def test_no_requests(opened: Callable[..., NativeModel]) -> None:
    with pytest.raises(InputError, match="no requests"):
        NativeEngine(opened()).generate([])


def test_it_is_found_by_its_name() -> None:
    assert find("native") is NativeEngine
