"""The limits against the table they were published in: H200 at 4.3 TB/s and 790 TFLOP/s, KV in bf16, context 1,024."""

from __future__ import annotations

import pytest

from infopt.measure.roofline import decode_limit, prefill_limit, shares_of_limit, touched_weight_bytes
from infopt.protocols import Machine, Shapes
from infopt.result import Sample

H200 = Machine("cuda", 4.3e12, {"bfloat16": 790e12}, last_level_cache_bytes=60_000_000)
INT4 = 4.25 / 8


def shapes(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, *, head_dim: int, tied: bool
) -> Shapes:
    linear = {}
    for layer in range(layers):
        linear |= {
            f"{layer}.q": (heads * head_dim, hidden),
            f"{layer}.k": (kv_heads * head_dim, hidden),
            f"{layer}.v": (kv_heads * head_dim, hidden),
            f"{layer}.o": (hidden, heads * head_dim),
            f"{layer}.gate": (inner, hidden),
            f"{layer}.up": (inner, hidden),
            f"{layer}.down": (hidden, inner),
        }
    return Shapes(
        architecture="llama",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        context=131_072,
        linear=linear,
        head=(vocabulary, hidden),
        is_head_tied=tied,
        embedding=vocabulary * hidden,
        other=0,
    )


LLAMA_8B = shapes(4096, 14336, 32, 32, 8, 128256, head_dim=128, tied=False)
LLAMA_1B = shapes(2048, 8192, 16, 32, 8, 128256, head_dim=64, tied=True)
QWEN_06B = shapes(1024, 3072, 28, 16, 8, 151936, head_dim=128, tied=True)
LLAMA_70B = shapes(8192, 28672, 80, 64, 8, 128256, head_dim=128, tied=False)


@pytest.mark.parametrize(
    ("model", "linear_bytes", "head_bytes", "batch", "tokens_per_s"),
    [
        (LLAMA_8B, 2, 2, 1, 283),
        (LLAMA_8B, 2, 2, 8, 2138),
        (LLAMA_8B, 2, 2, 64, 11661),
        (LLAMA_8B, 1, 1, 1, 562),
        (LLAMA_8B, 1, 2, 1, 526),
        (LLAMA_8B, INT4, INT4, 1, 1043),
        (LLAMA_8B, INT4, 2, 1, 878),
        (LLAMA_8B, INT4, INT4, 64, 21881),
        (LLAMA_1B, 2, 2, 1, 1716),
        (LLAMA_1B, 1, 1, 64, 81342),
        (QWEN_06B, 2, 2, 1, 3283),
        (QWEN_06B, INT4, 2, 8, 23170),
        (LLAMA_70B, 1, 1, 1, 61),
        (LLAMA_70B, INT4, INT4, 8, 868),
    ],
)
def test_decode_limits_of_known_models(
    model: Shapes, linear_bytes: float, head_bytes: float, batch: int, tokens_per_s: int
) -> None:
    weights = model.linear_parameters * linear_bytes + model.head_parameters * head_bytes
    limit = decode_limit(model, H200, weights_bytes=weights, kv_element_bytes=2, batch=batch, context=1024, dtype="bfloat16")
    assert limit.seconds
    assert batch / limit.seconds == pytest.approx(tokens_per_s, rel=1e-3, abs=1)
    assert limit.bound == "memory"


@pytest.mark.parametrize(("context", "tokens_per_s"), [(8192, 267), (32768, 223), (131072, 134)])
def test_decode_limit_falls_with_context(context: int, tokens_per_s: int) -> None:
    limit = decode_limit(LLAMA_8B, H200, weights_bytes=15.01e9, kv_element_bytes=2, batch=1, context=context, dtype="bfloat16")
    assert limit.seconds
    assert int(1 / limit.seconds) == pytest.approx(tokens_per_s, abs=1)


def test_large_batches_are_bound_by_arithmetic() -> None:
    """Without KV the crossover is at bytes per weight · F/(2·BW) = 184 rows for bf16."""
    bounds = [
        decode_limit(LLAMA_8B, H200, weights_bytes=15.0093e9, kv_element_bytes=2, batch=batch, context=0, dtype="bfloat16").bound
        for batch in (183, 184)
    ]
    assert bounds == ["memory", "compute"]


@pytest.mark.parametrize(
    ("model", "weights", "prompt", "milliseconds"),
    [
        (LLAMA_8B, 15.01e9, 1024, 18.4),
        (LLAMA_8B, 15.01e9, 8192, 167),
        (LLAMA_8B, 15.01e9, 32768, 935),
        (LLAMA_1B, 2.47e9, 1024, 2.6),
        (QWEN_06B, 1.19e9, 8192, 18.9),
    ],
)
def test_prefill_limits_of_known_models(model: Shapes, weights: float, prompt: int, milliseconds: float) -> None:
    limit = prefill_limit(model, H200, weights_bytes=weights, batch=1, prompt=prompt, dtype="bfloat16")
    assert limit.seconds
    assert limit.seconds * 1e3 == pytest.approx(milliseconds, rel=0.02)
    assert limit.bound == "compute"


def test_prefill_never_beats_reading_the_weights_once() -> None:
    limit = prefill_limit(LLAMA_8B, H200, weights_bytes=15e9, batch=1, prompt=1, dtype="bfloat16")
    assert limit.seconds == 15e9 / 4.3e12


def test_a_tied_head_is_read_once_and_an_embedding_not_at_all() -> None:
    assert touched_weight_bytes(LLAMA_1B, 1000, 2) == 1000
    stored = (LLAMA_8B.linear_parameters + LLAMA_8B.head_parameters + LLAMA_8B.embedding) * 2
    assert touched_weight_bytes(LLAMA_8B, stored, 2) == (LLAMA_8B.linear_parameters + LLAMA_8B.head_parameters) * 2


def timed(step_s: float, prefill_s: float | None = 0.1) -> Sample:
    times = (1.0, 1.0 + step_s, 1.0 + 2 * step_s)
    return Sample(
        arm="a", block=0, index=0, batch=1, prompt_tokens=1024, out_tokens=3, emission_s=times,
        emission_tokens=(1, 1, 1), prefill_s=prefill_s,
    )  # fmt: skip


def shares(samples: list[Sample], machine: Machine = H200, weights: float = 15.0093e9, dtype: str = "bfloat16"):  # type: ignore[no-untyped-def]
    return shares_of_limit(samples, LLAMA_8B, machine, weights_bytes=weights, kv_element_bytes=2, dtype=dtype)


def test_shares_are_limit_over_measured() -> None:
    found, details = shares([timed(0.01), timed(0.02), timed(0.005)])
    assert found["mbu"].value == pytest.approx((15.0093e9 + 131_072 * 1025.5) / 4.3e12 / 0.01, rel=1e-4)
    assert found["mfu"].value == pytest.approx(0.01844 / 0.1, rel=1e-3)
    assert details["decode_bound"] == "memory"
    assert details["prefill_bound"] == "compute"
    assert details["decode_step_s"] == pytest.approx(0.01)


def test_a_step_that_verifies_drafts_is_one_step() -> None:
    drafted = timed(0.01).model_copy(update={"out_tokens": 9, "emission_tokens": (1, 4, 4)})
    assert shares([drafted])[0]["mbu"].value == pytest.approx(shares([timed(0.01)])[0]["mbu"].value, rel=1e-3)


def test_tokens_that_a_prefix_cache_held_are_no_work() -> None:
    whole = shares([timed(0.01)])[0]["mfu"].value
    half = shares([timed(0.01).model_copy(update={"reused_tokens": 512})])[0]["mfu"].value
    assert half / whole == pytest.approx(0.51, abs=0.01)


def test_weights_that_fit_in_the_cache_have_no_memory_limit() -> None:
    found, _ = shares([timed(0.01)], weights=50_000_000)
    assert found["mbu"].value is None
    assert "fit in the last-level cache" in (found["mbu"].reason or "")


def test_more_than_the_limit_is_never_printed() -> None:
    found, _ = shares([timed(0.001, prefill_s=0.001)])
    assert found["mbu"].value is None
    assert found["mfu"].value is None
    assert "3.52 of the limit" in (found["mbu"].reason or "")


def test_unmeasured_rates_give_reasons() -> None:
    found, _ = shares([timed(0.01)], machine=Machine("cpu", None))
    assert found["mbu"].reason == "no read rate was measured"
    assert found["mfu"].reason == "no bfloat16 matrix-multiply rate was measured"
    nothing, _ = shares([timed(0.01).model_copy(update={"emission_s": (1.0,), "emission_tokens": (1,), "prefill_s": None})])
    assert nothing["mbu"].reason == nothing["mfu"].reason == "no request timed this phase"
