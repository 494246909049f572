from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from infopt.engines.transformers import TransformersEngine
from infopt.errors import InputError
from infopt.protocols import Request, Sampling

END = 2
REPETITIVE = [5, 6, 7, 8, 5, 6, 7, 9, 5, 6] * 3
#: Every setting that must not change a single greedy token of one request.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"cache": "static"},
    {"prefix": True},
    {"draft": "prompt_lookup", "draft_tokens": 4},
    {"prefix": True, "draft": "prompt_lookup", "draft_tokens": 4},
    {"compile": "auto"},
]


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    """Weights are widened so that greedy decoding does not settle on one token at once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    before = set(vars(model))
    yield model
    assert set(vars(model)) == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def request(prompt: list[int], new: int = 16, **rest: Any) -> Request:
    return Request(id="r", prompt_ids=tuple(prompt), max_new_tokens=new, **rest)


def plain(model: LlamaForCausalLM, prompt: list[int], new: int) -> tuple[int, ...]:
    """Greedy decoding as its definition says: the most likely token, again and again, without cache or `generate`."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_tokens_are_the_models_own(model: LlamaForCausalLM, settings: dict[str, Any]) -> None:
    engine = TransformersEngine(model, **settings)
    prompts = [REPETITIVE, [3, 9, 4], [*REPETITIVE, 11, 12], REPETITIVE, [17]]
    for prompt in prompts:
        trace = engine.generate([request(prompt)])
        assert trace.output_ids == (plain(model, prompt, 16),)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rows_of_an_uneven_batch_do_not_see_each_other(model: LlamaForCausalLM, cache: Any) -> None:
    prompts = [[3, 9, 4], REPETITIVE, [17]]
    trace = TransformersEngine(model, cache=cache).generate([request(prompt) for prompt in prompts])
    assert trace.output_ids == tuple(plain(model, prompt, 16) for prompt in prompts)
    assert trace.emission_tokens == (1,) * 16


def test_generate_itself_agrees(model: LlamaForCausalLM) -> None:
    stock = model.generate(
        torch.tensor([REPETITIVE]), max_new_tokens=16, min_new_tokens=0, do_sample=False, eos_token_id=63, pad_token_id=0
    )
    answer = tuple(stock[0, len(REPETITIVE) :].tolist())
    assert TransformersEngine(model).generate([request(REPETITIVE)]).output_ids[0][: len(answer)] == answer


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("new", [1, 16])
def test_every_token_is_emitted_once_and_in_time(model: LlamaForCausalLM, settings: dict[str, Any], new: int) -> None:
    ticks = count()
    engine = TransformersEngine(model, now=lambda: float(next(ticks)), **settings)
    trace = engine.generate([request(REPETITIVE, new)])
    assert sum(trace.emission_tokens) == new == len(trace.output_ids[0])
    assert len(trace.emission_s) == len(trace.emission_tokens)
    assert list(trace.emission_s) == sorted(set(trace.emission_s))
    # The clock is read at the start, before and after the prompt's forward pass, and at each emission: nothing between.
    assert trace.prefill_s == 1.0
    assert trace.emission_s[0] == 3.0
    assert trace.emission_s[-1] == 3.0 + len(trace.emission_s) - 1


def test_prompt_lookup_counts_its_drafts(model: LlamaForCausalLM) -> None:
    trace = TransformersEngine(model, draft="prompt_lookup", draft_tokens=4).generate([request(REPETITIVE, 20)])
    assert max(trace.emission_tokens) > 1
    assert trace.drafted
    # Each step emits one token of the model's own beside the accepted ones.
    assert trace.accepted == 20 - len(trace.emission_s)
    assert trace.accepted <= trace.drafted
    plain_trace = TransformersEngine(model).generate([request(REPETITIVE, 20)])
    assert (plain_trace.drafted, plain_trace.accepted) == (None, None)


def test_drafting_hidden_by_the_library_is_not_counted(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden:
        """The model as seen by a feature test that finds nothing."""

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    from infopt.engines import transformers as module

    with module._recorded_drafts(Hidden()) as drafts:  # type: ignore[arg-type]
        assert drafts is None


def test_the_prefix_cache_reuses_the_common_prefix_and_counts_it(model: LlamaForCausalLM) -> None:
    engine = TransformersEngine(model, prefix=True)
    assert TransformersEngine(model).generate([request(REPETITIVE, 4)]).reused_tokens is None
    assert engine.generate([request(REPETITIVE, 4)]).reused_tokens == 0
    # The whole prompt is known, but its last token must run.
    first = engine.generate([request(REPETITIVE, 4)])
    assert first.reused_tokens == len(REPETITIVE) - 1
    # A conversation goes on: prompt and answer are known, except the answer's last token, which was never run.
    assert engine.generate([request([*REPETITIVE, *first.output_ids[0], 9], 4)]).reused_tokens == len(REPETITIVE) + 3
    assert engine.generate([request([60, 61], 4)]).reused_tokens == 0


def test_a_failed_call_leaves_no_prefix_and_no_hooks_behind(model: LlamaForCausalLM) -> None:
    engine = TransformersEngine(model, prefix=True, draft="prompt_lookup", draft_tokens=4)
    engine.generate([request(REPETITIVE, 4)])
    with pytest.raises(IndexError):
        engine.generate([request([*REPETITIVE, 1000], 4)])
    again = engine.generate([request(REPETITIVE, 8)])
    assert (again.output_ids, again.reused_tokens) == ((plain(model, REPETITIVE, 8),), 0)
    assert model.generation_config.eos_token_id == END


def test_the_end_token_ends_the_answer_unless_ignored(model: LlamaForCausalLM) -> None:
    answer = plain(model, REPETITIVE, 16)
    model.generation_config.eos_token_id = [answer[9], 63]
    try:
        cut = answer[: answer.index(answer[9]) + 1]
        for settings in SETTINGS:
            engine = TransformersEngine(model, **settings)
            trace = engine.generate([request(REPETITIVE, ignore_eos=False)])
            assert trace.output_ids == (cut,)
            assert sum(trace.emission_tokens) == len(cut)
            assert engine.generate([request(REPETITIVE)]).output_ids == (answer,)
    finally:
        model.generation_config.eos_token_id = END


def test_rows_that_end_early_are_cut(model: LlamaForCausalLM) -> None:
    prompts = [[3, 9, 4], REPETITIVE, [17]]
    answers = [plain(model, prompt, 16) for prompt in prompts]
    model.generation_config.eos_token_id = answers[0][3]
    try:
        trace = TransformersEngine(model).generate([request(prompt, ignore_eos=False) for prompt in prompts])
    finally:
        model.generation_config.eos_token_id = END
    for row, answer in zip(trace.output_ids, answers, strict=True):
        end = answer.index(answers[0][3]) + 1 if answers[0][3] in answer else 16
        assert row == answer[:end]


def test_sampling_follows_the_seed_and_leaves_the_global_one_alone(model: LlamaForCausalLM) -> None:
    engine = TransformersEngine(model, sampling=Sampling(temperature=2.0))
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    one, again, other = (engine.generate([request(REPETITIVE, seed=seed)]).output_ids for seed in (7, 7, 8))
    assert one == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_top_k_of_one_is_greedy_at_any_temperature(model: LlamaForCausalLM) -> None:
    engine = TransformersEngine(model, sampling=Sampling(temperature=5.0, top_k=1))
    assert engine.generate([request(REPETITIVE)]).output_ids == (plain(model, REPETITIVE, 16),)


def test_the_models_own_sampling_advice_is_not_taken(model: LlamaForCausalLM) -> None:
    model.generation_config.repetition_penalty = 5.0
    try:
        assert TransformersEngine(model).generate([request(REPETITIVE)]).output_ids == (plain(model, REPETITIVE, 16),)
    finally:
        model.generation_config.repetition_penalty = None


def test_candidates_are_rows_of_their_own(model: LlamaForCausalLM) -> None:
    engine = TransformersEngine(model, sampling=Sampling(temperature=2.0, candidates=3))
    trace = engine.generate([request(REPETITIVE), request([3, 9, 4])])
    assert len(trace.output_ids) == 6
    assert len(set(trace.output_ids)) > 2
    assert trace.emission_tokens == (1,) * 16


def test_a_static_cache_is_sized_for_its_call_alone(model: LlamaForCausalLM) -> None:
    engine = TransformersEngine(model, cache="static")
    engine.generate([request(REPETITIVE, 60)])
    assert "_previous_max_cache_length" not in vars(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "static", "prefix": True}, "prefix cache needs the dynamic cache"),
        ({"cache": "static", "draft": "prompt_lookup", "draft_tokens": 4}, "prompt lookup needs the dynamic cache"),
        ({"draft": "prompt_lookup", "draft_tokens": 0}, "allowed: 1 or more"),
        ({"sampling": Sampling(candidates=2)}, "greedy decoding has exactly 1"),
        ({"sampling": Sampling(1.0, candidates=2), "draft": "prompt_lookup", "draft_tokens": 4}, "one row at a time"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(model: LlamaForCausalLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TransformersEngine(model, **settings)


@pytest.mark.parametrize(
    ("settings", "requests", "message"),
    [
        ({}, [], "at least 1"),
        ({}, [request([])], "0 prompt and 16 new tokens"),
        ({}, [request([1], 0)], "1 prompt and 0 new tokens"),
        ({}, [request([1], 4), request([1], 5)], "must be equal"),
        ({}, [request([1] * 120, 9)], "129 tokens; the model's context allows 128"),
        ({"prefix": True}, [request([1]), request([1])], "prefix cache takes 1 request"),
        ({"draft": "prompt_lookup", "draft_tokens": 4}, [request([1]), request([1])], "prompt lookup takes 1 request"),
    ],
)
def test_requests_that_cannot_run_are_refused(
    model: LlamaForCausalLM, settings: dict[str, Any], requests: list[Request], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TransformersEngine(model, **settings).generate(requests)


def test_a_sliding_window_cannot_be_cut_back() -> None:
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = Gemma3ForCausalLM(config).eval()
    with pytest.raises(InputError, match="Gemma3ForCausalLM has DynamicSlidingWindowLayer"):
        TransformersEngine(model, prefix=True)
    trace = TransformersEngine(model).generate([request([5, 6, 7], 12)])
    assert trace.output_ids == (plain(model, [5, 6, 7], 12),)


def test_closing_gives_the_model_up(model: LlamaForCausalLM) -> None:
    engine = TransformersEngine(model, prefix=True)
    engine.generate([request([1, 2, 3], 2)])
    engine.close()
    assert not hasattr(engine, "model")
