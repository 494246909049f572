from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt import figures
from infopt.errors import InputError
from infopt.measure import latency
from infopt.measure.latency import block_values, goodput, summarise
from infopt.result import Block, Sample


def sample(
    times: tuple[float, ...], tokens: tuple[int, ...] | None = None, *, batch: int = 1, block: int = 0, **rest: object
) -> Sample:
    tokens = tokens or (1,) * len(times)
    fields = {"prompt_tokens": 10, **rest}
    return Sample(
        arm="a",
        block=block,
        index=0,
        batch=batch,
        out_tokens=sum(tokens),
        emission_s=times,
        emission_tokens=tokens,
        **fields,  # type: ignore[arg-type]
    )


def block(index: int = 0, wall_s: float = 2.0, **rest: object) -> Block:
    return Block(arm="a", index=index, round=index, position=0, wall_s=wall_s, **rest)  # type: ignore[arg-type]


def test_each_latency_of_one_token_at_a_time() -> None:
    one = sample((0.5, 0.6, 0.8, 0.9), prefill_s=0.4, batch=3)
    assert latency.ttft_s(one) == 0.5
    assert latency.e2e_s(one) == 0.9
    assert latency.tpot_s(one) == pytest.approx(0.4 / 3)
    assert latency.itl_s(one) == pytest.approx([0.1, 0.2, 0.1])
    assert latency.tokens_per_step(one) == 1
    assert latency.decode_tok_per_s(one) == pytest.approx(3 * 3 / 0.4)
    assert latency.prefill_tok_per_s(one) == pytest.approx(3 * 10 / 0.4)


def test_emissions_of_several_tokens() -> None:
    drafted = sample((0.5, 0.8, 1.0), (1, 3, 2))
    assert latency.tpot_s(drafted) == pytest.approx(0.5 / 5)
    assert latency.itl_s(drafted) == pytest.approx([0.1, 0.1])
    assert latency.step_gaps_s(drafted) == pytest.approx([0.3, 0.2])
    assert latency.tokens_per_step(drafted) == pytest.approx(5 / 2)


@pytest.mark.parametrize("single", [sample((0.5,)), sample((0.5,), (4,))])
def test_without_a_second_emission_the_decode_figures_are_undefined(single: Sample) -> None:
    assert latency.tpot_s(single) is None
    assert latency.tokens_per_step(single) is None
    assert latency.decode_tok_per_s(single) is None
    assert latency.itl_s(single) == []
    found = summarise([single], [block()])
    assert found["tpot_s.p50"].value is None
    assert found["tpot_s.p50"].reason == "no request had a second emission"
    assert found["ttft_s.p50"].value == 0.5


def test_scheduled_latency_counts_the_wait() -> None:
    late = sample((0.2, 0.5), scheduled_s=1.0, submitted_s=3.0)
    assert latency.scheduled_latency_s(late) == pytest.approx(3.0 + 0.5 - 1.0)
    assert latency.scheduled_latency_s(sample((0.2, 0.5))) is None


def test_warm_up_and_failures_stay_out_of_the_statistics() -> None:
    samples = [
        sample((9.0, 99.0), warmup=True),
        sample((1.0, 2.0)),
        sample((3.0, 5.0)),
        sample((), (), error="OutOfMemoryError: no room"),
    ]
    found = summarise(samples, [block(wall_s=4.0)])
    assert found["ttft_s.p50"].value == 2.0
    assert found["ttft_s.max"].value == 3.0
    assert found["ttft_s.p50"].samples == 2
    assert found["throughput_tok_per_s"].value == pytest.approx(4 / 4.0)


def test_summary_holds_every_statistic_of_every_sampled_figure_with_unit_and_id() -> None:
    found = summarise([sample((0.5, 0.6))], [block()])
    sampled = [figure for figure in figures.FIGURES.values() if figure.sampled]
    for figure in sampled:
        for statistic in figures.STATISTICS:
            assert found[f"{figure.name}.{statistic}"].id == figure.id
    assert all(value.value is not None or value.reason for value in found.values())


def test_no_answer_at_all_is_null_with_that_reason() -> None:
    found = summarise([sample((), (), error="boom")], [block()])
    assert {value.value for value in found.values()} == {None}
    assert found["ttft_s.p50"].reason == found["throughput_tok_per_s"].reason == "no request was answered"


def test_goodput_against_objectives() -> None:
    samples = [
        sample((0.4, 0.5, 0.6), batch=2),  # meets both
        sample((0.6, 0.7)),  # first token late
        sample((0.4,)),  # no time per token to judge
        sample((0.9,)),  # late all the same
        sample((), (), error="boom"),
        sample((9.0,), warmup=True),
    ]
    limits = {"ttft_s": 0.5, "tpot_s": 0.15}
    counts = goodput(samples, limits)
    assert (counts.met, counts.missed, counts.undetermined, counts.errors) == (2, 2, 1, 1)
    found = summarise(samples, [block(wall_s=4.0)], limits)
    assert found["goodput_share"].value == pytest.approx(2 / 6)
    assert found["goodput_req_per_s"].value == pytest.approx(2 / 4.0)


def test_goodput_is_null_when_an_objective_is_undefined_throughout_or_none_is_given() -> None:
    single = [sample((0.4,))]
    assert summarise(single, [block()], {"tpot_s": 1.0})["goodput_share"].value is None
    assert "undefined for every" in (summarise(single, [block()], {"tpot_s": 1.0})["goodput_share"].reason or "")
    assert summarise(single, [block()])["goodput_share"].reason == "no objectives were given"


@pytest.mark.parametrize("name", ["tpot", "decode_tok_per_s", "tokens_per_step"])
def test_an_objective_that_is_no_latency_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        goodput([], {name: 1.0})


def test_acceptance_pools_drafts() -> None:
    samples = [sample((0.1, 0.2), drafted=10, accepted=4), sample((0.1, 0.2), drafted=30, accepted=6)]
    assert summarise(samples, [block()])["acceptance"].value == pytest.approx(10 / 40)
    assert summarise([sample((0.1, 0.2))], [block()])["acceptance"].value is None
    assert summarise([sample((0.1, 0.2), drafted=0, accepted=0)], [block()])["acceptance"].reason == "nothing was drafted"


def test_energy_per_token_gross_and_net() -> None:
    samples = [sample((0.1, 0.2), block=0), sample((0.1, 0.2), block=1)]
    blocks = [block(0, wall_s=5.0, energy_j=100.0, idle_power_w=4.0), block(1, wall_s=5.0, energy_j=140.0, idle_power_w=4.0)]
    found = summarise(samples, blocks)
    assert found["energy_j_per_token"].value == pytest.approx(240 / 4)
    assert found["energy_net_j_per_token"].value == pytest.approx((240 - 40) / 4)
    assert found["power_w"].value == pytest.approx(24.0)


def test_one_block_without_energy_makes_the_run_say_why() -> None:
    blocks = [block(0, energy_j=100.0), block(1, flags=("energy.missing: no counter",))]
    found = summarise([sample((0.1, 0.2))], blocks)
    assert found["energy_j_per_token"].value is None
    assert found["power_w"].reason == "no counter"


def test_block_values_are_one_number_per_block() -> None:
    samples = [
        sample((1.0, 1.5), block=0),
        sample((2.0, 2.1), block=0),
        sample((9.0, 9.1), block=0),
        sample((4.0, 4.3), block=1, batch=2),
        sample((4.0,), block=2),
    ]
    assert block_values(samples, "ttft_s.p50") == {0: 2.0, 1: 4.0, 2: 4.0}
    assert block_values(samples, "ttft_s.max") == {0: 9.0, 1: 4.0, 2: 4.0}
    assert block_values(samples, "tpot_s.p50") == pytest.approx({0: 0.1, 1: 0.3})
    blocks = [block(0, wall_s=3.0), block(1, wall_s=2.0)]
    assert block_values(samples, "throughput_tok_per_s", blocks) == pytest.approx({0: 2.0, 1: 2.0})
    assert block_values(samples, "throughput_tok_per_s") == {}


def test_block_values_refuse_what_requests_do_not_have() -> None:
    with pytest.raises(InputError, match=r"did you mean 'tpot_s\.p50'"):
        block_values([], "tpots.p50")
    with pytest.raises(InputError, match="no value per block"):
        block_values([sample((0.1,))], "kld.mean", [block()])


@given(
    st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=30),
    st.integers(1, 8),
    st.data(),
)
def test_time_per_token_is_the_token_weighted_mean_of_the_gaps(gaps: list[float], batch: int, data: st.DataObject) -> None:
    times, total = [], 0.0
    for gap in gaps:
        total += gap
        times.append(total)
    tokens = data.draw(st.lists(st.integers(1, 5), min_size=len(gaps), max_size=len(gaps)).filter(lambda t: sum(t) > 1))
    one = sample(tuple(times), (1, *tokens[1:]), batch=batch)
    weighted = sum(gap * count for gap, count in zip(latency.itl_s(one), tokens[1:], strict=True))
    assert latency.tpot_s(one) == pytest.approx(weighted / sum(tokens[1:]))
    assert latency.decode_tok_per_s(one) == pytest.approx(batch / latency.tpot_s(one))
