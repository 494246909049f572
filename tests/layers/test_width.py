"""Which widths a model may be cut to, by its shapes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infopt import techniques
from infopt.errors import RecipeError
from infopt.layers import width
from infopt.model import reference, shapes
from infopt.protocols import Shapes


def sizes(model: str) -> Shapes:
    return shapes.shapes(reference.parse(model))


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"mlp": 40}, r"s\.mlp: found 40, which is no multiple of 32 as 128 is; allowed: 32 or 64", "multiple: 8"),
        ({"mlp": 10}, r"s\.mlp: found 10, .*allowed: 32$", "multiple: 2"),
        ({"mlp": 160}, r"s\.mlp: found 160; allowed: up to 128", None),
        ({"mlp": 0.2}, r"s\.mlp: found 0\.2, which leaves less than 32 of 128; allowed: 0\.25 … 1", "multiple: 1"),
        ({"kv_heads": 3}, r"s\.kv_heads: found 3; allowed: up to 2", None),
        ({"hidden": 48}, r"s\.hidden: found 48, which is no multiple of 32 as 64 is; allowed: 32 or 64", "multiple: 16"),
        (
            {"hidden": 50, "multiple": 2},
            r"s\.hidden: found 50: LlamaConfig asks that the heads, 4, .*allowed: 48 or 52",
            "kv_heads: 1",
        ),
    ],
)
def test_sizes_that_do_not_go_are_refused_with_those_that_do(options: dict[str, Any], message: str, hint: str | None) -> None:
    kind = techniques.find("prune_width")
    with pytest.raises(RecipeError, match=message) as caught:
        kind(kind.Options(**options)).check(sizes("tiny"), "s")
    assert caught.value.hint == hint


def wide(architecture: str) -> Shapes:
    """32 heads in 8 groups at hidden 4096, as of 8-billion models."""
    size = width.Width(14336, 8, 4096, 4, 128)
    linear = {f"model.layers.0.self_attn.{part}": size.linear(part) for part in width.ATTENTION}
    linear |= {f"model.layers.0.mlp.{part}": size.linear(part) for part in width.MLP}
    return Shapes(architecture, 1, 4096, 32, 8, 128, 1000, 512, linear, (1000, 4096), False, 4096000, 3 * 4096)


def test_heads_that_the_configs_class_refuses_are_refused_before_anything_is_read() -> None:
    kind = techniques.find("prune_width")
    technique = kind(kind.Options(mlp=None, kv_heads=6))  # type: ignore[call-arg]
    with pytest.raises(RecipeError, match=r"s\.kv_heads: found 6: LlamaConfig asks that the heads, 24, .*allowed: 1, 2, 4, 8"):
        technique.check(wide("LlamaForCausalLM"), "s")
    technique.check(wide("MistralForCausalLM"), "s")
    kind(kind.Options(kv_heads=6, hidden=3072)).check(wide("LlamaForCausalLM"), "s")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 30}, "30 heads do not divide into the groups of 8 KV heads"),
        ({"hidden": 2048}, r"q_proj is 4096×4096; allowed: 4096×2048 in every block"),
        ({"linear": {}}, "LlamaForCausalLM has no q_proj in block 0"),
    ],
)
def test_models_that_are_not_built_of_these_layers_are_refused(change: dict[str, Any], message: str) -> None:
    kind = techniques.find("prune_width")
    with pytest.raises(RecipeError, match=message):
        kind(kind.Options()).check(replace(wide("LlamaForCausalLM"), **change), "s")


def test_other_layers_in_or_beside_the_blocks_are_refused() -> None:
    kind, whole = techniques.find("prune_width"), wide("LlamaForCausalLM")
    with pytest.raises(RecipeError, match=r"has model\.layers\.0\.mlp\.gate beside"):
        kind(kind.Options()).check(replace(whole, linear=whole.linear | {"model.layers.0.mlp.gate": (8, 4096)}), "s")
    beside = replace(whole, linear=whole.linear | {"model.project_in": (4096, 512)})
    kind(kind.Options()).check(beside, "s")
    with pytest.raises(RecipeError, match=r"s\.hidden: model\.project_in lies beside the decoder blocks"):
        kind(kind.Options(hidden=0.5)).check(beside, "s")  # type: ignore[call-arg]
