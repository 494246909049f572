from __future__ import annotations

import pytest

from infopt.errors import InputError
from infopt.measure.cost import cost_values, usd_per_mtok


def test_price_of_a_million_tokens() -> None:
    # $3.60 an hour is $0.001 a second; at 100 tok/s a token costs 1e-5 dollars.
    assert usd_per_mtok(3.60, 100.0) == pytest.approx(10.0)
    assert usd_per_mtok(3.60, 100.0, utilisation=0.5) == pytest.approx(20.0)


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan")])
def test_a_price_must_be_positive(price: float) -> None:
    with pytest.raises(InputError, match="price per hour"):
        usd_per_mtok(price, 100.0)


@pytest.mark.parametrize("utilisation", [0.0, 1.01, float("nan")])
def test_utilisation_is_a_share(utilisation: float) -> None:
    with pytest.raises(InputError, match="utilisation"):
        usd_per_mtok(1.0, 100.0, utilisation)


def test_input_and_output_are_priced_apart_when_both_phases_were_timed() -> None:
    found = cost_values(3.60, throughput_tok_per_s=50.0, decode_tok_per_s=100.0, prefill_tok_per_s=1000.0)
    assert found["usd_per_mtok_output"].value == pytest.approx(10.0)
    assert found["usd_per_mtok_input"].value == pytest.approx(1.0)


def test_otherwise_the_output_carries_everything() -> None:
    found = cost_values(3.60, throughput_tok_per_s=50.0, decode_tok_per_s=100.0)
    assert found["usd_per_mtok_output"].value == pytest.approx(20.0)
    assert found["usd_per_mtok_input"].value is None
    assert found["usd_per_mtok_input"].reason == "prefill and decode were not timed apart"


def test_no_price_is_no_cost() -> None:
    found = cost_values(None, throughput_tok_per_s=50.0)
    assert {value.reason for value in found.values()} == {"no price was given"}
    assert cost_values(1.0, throughput_tok_per_s=None)["usd_per_mtok_output"].value is None
