"""The frontier of a budget is all cuts that fit and can have no more, by brute force over small shapes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.layers import frontier, width
from infopt.layers.frontier import Cut
from infopt.protocols import Shapes


def made_up(layers: int, kv_heads: int, queries: int, mlp: int, biased: tuple[str, ...], *, tied: bool) -> Shapes:
    size = width.Width(mlp, kv_heads, 24, queries, 8)
    linear: dict[str, tuple[int, int]] = {}
    for number in range(layers):
        linear |= {f"model.layers.{number}.self_attn.{part}": size.linear(part) for part in width.ATTENTION}
        linear |= {f"model.layers.{number}.mlp.{part}": size.linear(part) for part in width.MLP}
    biases = layers * sum(size.linear(part)[0] for part in biased)
    return Shapes(
        "MistralForCausalLM", layers, 24, size.heads, kv_heads, 8, 50, 64, linear, (50, 24), tied, 50 * 24,
        (2 * layers + 1) * 24 + biases, biased,
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_frontier_is_all_that_fits_and_can_have_no_more(data: st.DataObject) -> None:
    draw = data.draw
    whole = made_up(
        draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 12)),
        draw(st.sampled_from([(), ("q_proj", "k_proj", "v_proj"), ("up_proj",)])), tied=draw(st.booleans()),
    )  # fmt: skip
    may = [draw(st.booleans()) for _ in range(3)]
    names = dict(zip(("layers", "heads", "channels"), may, strict=True))
    if not any(may):
        return
    space = frontier.space(whole, "s", multiple=draw(st.sampled_from([1, 2, 4])), **names)
    limit = draw(st.integers(space.parameters(space.least) - 50, whole.parameters + 50))
    found = space.frontier(limit)
    cuts = [Cut(gone, heads, mlp) for gone in space.gone for heads in space.kv_heads for mlp in space.mlp]
    fit = {cut for cut in cuts if space.parameters(cut) <= limit}
    assert set(found) == {cut for cut in fit if not any(is_more(other, cut) for other in fit)}
    assert len(set(found)) == len(found)
    assert found == sorted(found, key=lambda cut: (cut.gone, -cut.kv_heads))
    assert bool(found) is (space.parameters(space.least) <= limit)


def is_more(other: Cut, cut: Cut) -> bool:
    """Whether another cut keeps at least as much of everything, and more of something."""
    return other != cut and other.gone <= cut.gone and other.kv_heads >= cut.kv_heads and other.mlp >= cut.mlp


def test_heads_that_the_config_refuses_are_no_candidates() -> None:
    mistral = made_up(2, 7, 1, 12, (), tied=True)
    llama = replace(mistral, architecture="LlamaForCausalLM")
    may = {"layers": True, "heads": True, "channels": True}
    assert list(frontier.space(mistral, "s", multiple=1, **may).kv_heads) == [7, 6, 5, 4, 3, 2, 1]
    assert list(frontier.space(llama, "s", multiple=1, **may).kv_heads) == [7, 6, 4, 3, 2, 1]  # 5 does not divide 24


def test_many_candidates_are_thinned_evenly() -> None:
    cuts = [Cut(number, 1, 1) for number in range(100)]
    kept = frontier.thinned(cuts, 34)
    assert [cut.gone for cut in kept] == list(range(0, 100, 3))
    assert frontier.thinned(cuts[:34], 34) == cuts[:34]
