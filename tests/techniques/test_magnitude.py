"""Pruning: which weights go, in every technique that sets some to zero, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stub_techniques import CALIBRATION, chosen

from infopt import arms, optimize, pipeline, techniques
from infopt.errors import InputError, RecipeError
from infopt.layers import sparsity
from infopt.model import load, reference, shapes
from infopt.model.bundle import Bundle
from infopt.protocols import Context
from infopt.settings import LoadOptions

Make = Callable[..., Any]
METHODS = ("magnitude", "wanda", "sparsegpt")
CONTEXT = Context(calibration_ids=CALIBRATION)


@given(
    rows=st.integers(1, 9), groups=st.integers(1, 8), share=st.floats(0.01, 0.99), by_row=st.booleans(), seed=st.integers(0, 99)
)
@settings(deadline=None)
def test_the_lowest_share_goes_and_no_more(rows: int, groups: int, share: float, by_row: bool, seed: int) -> None:
    scores = torch.rand(rows, 8 * groups, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # with ties
    kept = sparsity.keep(scores, share, by_row=by_row)
    for mask, row in zip(kept, scores, strict=True) if by_row else [(kept.flatten(), scores.flatten())]:
        assert int((~mask).sum()) == round(row.numel() * share)
        assert mask.all() or not mask.any() or row[mask].min() >= row[~mask].max()
    for pattern, count, of in (("2:4", 2, 4), ("4:8", 4, 8)):
        mask = sparsity.keep(scores, 0.5, pattern)
        assert (mask.view(-1, of).sum(1) == count).all()
        lowest = torch.where(mask, scores, torch.inf).view(-1, of).min(1).values
        assert (lowest >= torch.where(mask, -torch.inf, scores).view(-1, of).max(1).values).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8"}])
def test_every_chosen_layer_has_its_zeros(method: str, options: dict[str, Any], make: Make) -> None:
    bundle = load.load(reference.parse("tiny"))
    pruned = make(method, ignore=["lm_head", "v_proj"], **options).apply(bundle, CONTEXT)
    for name, layer in pruned.model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            share = float((layer.weight == 0).float().mean())
            wanted = 0 if name.endswith(("lm_head", "v_proj")) else options.get("sparsity", 0.5)
            assert share == pytest.approx(wanted, abs=0.02)
            if wanted and "pattern" in options:
                of = sparsity.kept_of(options["pattern"])[1]
                assert ((layer.weight.view(-1, of) == 0).sum(1) == of // 2).all()


@pytest.mark.parametrize("method", METHODS)
def test_an_artifact_answers_as_it_was_made_and_says_that_it_is_no_faster(method: str, tmp_path: Path) -> None:
    made = chosen({method: {}}, calibration={"samples": 4, "tokens": 32})
    optimize.optimize("tiny", made, tmp_path / "out", LoadOptions(device="cpu"))
    for override in ("engine.name=native", "engine.name=transformers"):
        spec = arms.spec(str(tmp_path / "out"), None, [override])
        bundle = pipeline.open_arm(spec, "cpu", LoadOptions(device="cpu"))
        recorded = replace(spec.recipe, steps=(*spec.recipe.steps, *chosen("kv_cache").steps))
        for own in (spec.recipe, recorded):
            assert pipeline.engine(bundle, own).notes[-1] == sparsity.REMARK


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.6}, r"sparsity: found 0.6; allowed: 0.5, the share that 2:4 leaves out"),
        ({"ignore": ["lm_head", "nothing"]}, r"ignore\[1\]: unknown module"),
    ],
)
@pytest.mark.parametrize("method", [*METHODS, "llmcompressor"])
def test_what_does_not_go_is_refused_before_anything_is_read(method: str, options: dict[str, Any], message: str) -> None:
    kind = techniques.find(method)
    own = {"method": "sparsegpt"} if method == "llmcompressor" else {}
    with pytest.raises(RecipeError, match=message):
        kind(kind.Options(**own, **options)).check(shapes.shapes(reference.parse("tiny")), f"steps[0].{method}")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_leaves_nothing_or_everything_is_refused(share: float) -> None:
    for method in METHODS:
        with pytest.raises(ValidationError):
            techniques.find(method).Options(sparsity=share)  # type: ignore[call-arg]


def test_rounding_keeps_the_zeros_and_says_what_it_says_alone(make: Make, tmp_path: Path) -> None:
    made = chosen({"magnitude": {"pattern": "2:4"}}, {"rtn": {"bits": 8, "group_size": None}})
    optimize.optimize("tiny", made, tmp_path / "out", LoadOptions(device="cpu"))
    spec = arms.spec(str(tmp_path / "out"), None, ["engine.name=transformers"])
    bundle = pipeline.open_arm(spec, "cpu", LoadOptions(device="cpu"))
    assert sparsity.REMARK not in pipeline.engine(bundle, spec.recipe).notes
    weight = bundle.model.model.layers[0].mlp.up_proj.weight
    assert ((weight.view(-1, 4) == 0).sum(1) >= 2).all()


def test_a_quantized_model_is_not_pruned(make: Make, tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="quantized already"):
        make("magnitude").apply(make("rtn", bits=8, group_size=None).apply(tiny_bundle, CONTEXT), CONTEXT)


def test_pruning_by_llmcompressor_takes_its_own_options() -> None:
    kind = techniques.find("llmcompressor")
    job = kind(kind.Options(method="wanda", pattern="2:4"))._job([])  # type: ignore[call-arg, attr-defined]
    assert job["pruning"] == {"method": "wanda", "sparsity": 0.5, "mask_structure": "2:4"}
    assert job["gptq"] is None
    with pytest.raises(ValidationError, match="method gptq does not read sparsity"):
        kind.Options(sparsity=0.3)  # type: ignore[call-arg]


@pytest.mark.parametrize("step", METHODS)
def test_a_share_that_leaves_nothing_is_refused(step: str, make: Make) -> None:
    sizes = shapes.shapes(reference.parse("tiny"))
    with pytest.raises(RecipeError, match=r"found 0.99999, which leaves nothing of \d+ weights .*; allowed: up to") as caught:
        make(step, sparsity=0.99999).check(sizes, "steps[0]")
    most = float(str(caught.value).rpartition(" ")[2])
    make(step, sparsity=most).check(sizes, "steps[0]")
    bundle = make(step, sparsity=most).apply(load.load(reference.parse("tiny")), CONTEXT)
    layers = [each for name, each in bundle.model.named_modules() if type(each) is torch.nn.Linear and name != "lm_head"]
    assert sum(bool((each.weight != 0).any()) for each in layers) >= len(layers) - 2, "of sparsegpt's, inputs may be silent"
