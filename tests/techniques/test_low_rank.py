"""Low rank against plain torch: the best of its rank, what it costs, and what is said of it."""

from __future__ import annotations

import json
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
from infopt.model import load, reference, shapes
from infopt.model.bundle import Bundle
from infopt.protocols import Context, Machine, Prediction
from infopt.settings import LoadOptions
from infopt.techniques import low_rank
from infopt.techniques.low_rank import nearest_outputs, rank_of, whitening

Make = Callable[..., Any]
CONTEXT = Context(calibration_ids=CALIBRATION)


def layer(out: int, inner: int, seed: int = 0, tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs [tokens, inner] some of whose directions are a hundred times larger than others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    mix = torch.randn(inner, inner, generator=generator, dtype=torch.float64) * torch.logspace(-2, 0, inner)[:, None]
    return weight, torch.randn(tokens, inner, generator=generator, dtype=torch.float64) @ mix


@given(out=st.integers(2, 40), inner=st.integers(2, 40), share=st.floats(0.05, 1), seed=st.integers(0, 99))
@settings(deadline=None)
def test_its_error_is_that_of_the_singular_values_left_out(out: int, inner: int, share: float, seed: int) -> None:
    weight, x = layer(out, inner, seed)
    rank = max(1, round(share * min(out, inner)))
    b, a = nearest_outputs(weight, whitening(x.T @ x, 1e-12), rank)
    assert b.shape == (out, rank)
    assert a.shape == (rank, inner)
    values = torch.linalg.svdvals(x @ weight.T)
    error = (x @ (weight - b @ a).T).norm()
    assert error == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-5 * float(values[0]))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = u[:, :rank] * s[:rank] @ v[:rank]
    assert error <= (x @ (weight - plain).T).norm() * (1 + 1e-3) + 1e-5 * values[0]


@pytest.mark.parametrize(("out", "inner"), [(24, 24), (8, 40), (40, 8)])
def test_at_full_rank_nothing_changes(out: int, inner: int) -> None:
    weight, x = layer(out, inner)
    b, a = nearest_outputs(weight, whitening(x.T @ x, 0.001), min(out, inner))
    assert torch.allclose(b @ a, weight, rtol=1e-6, atol=1e-6)


def test_moments_without_an_inverse_are_damped() -> None:
    """Five tokens for forty inputs, half of which never were anything but zero."""
    weight, x = layer(24, 40, tokens=5)
    x[:, 20:] = 0
    b, a = nearest_outputs(weight, whitening(x.T @ x, 0.001), 6)
    assert torch.isfinite(b @ a).all()
    assert (x @ (weight - b @ a).T).norm() < 0.02 * (x @ weight.T).norm()
    nothing = whitening(torch.zeros(4, 4, dtype=torch.float64), 0.001)
    assert torch.equal(nothing, torch.eye(4, dtype=torch.float64))


def test_moments_that_are_no_moments_are_refused() -> None:
    with pytest.raises(InputError, match=r"the inputs of q_proj are not all finite"):
        whitening(torch.full((2, 2), torch.inf, dtype=torch.float64), 0.001, "q_proj")
    with pytest.raises(InputError, match=r"the inputs of q_proj are too much alike"):
        whitening(torch.tensor([[1.0, 9.0], [9.0, 1.0]], dtype=torch.float64), 0.001, "q_proj")


@given(out=st.integers(1, 500), inner=st.integers(1, 500), share=st.floats(0.001, 1))
def test_a_rank_is_the_largest_whose_factors_fit(out: int, inner: int, share: float) -> None:
    rank, allowed = rank_of(out, inner, share), share * out * inner
    assert rank * (out + inner) <= allowed * (1 + 1e-9)
    assert (rank + 1) * (out + inner) >= allowed * (1 - 1e-9)


@pytest.mark.parametrize("options", [{"share": 0.5}, {"share": 0.3, "whiten": False}])
def test_every_chosen_layer_has_its_rank(options: dict[str, Any], make: Make) -> None:
    bundle = make("low_rank", ignore=["lm_head", "v_proj"], **options).apply(load.load(reference.parse("tiny")), CONTEXT)
    log = json.loads(bundle.files[low_rank.FILE])
    for name, module in bundle.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rank, of = int(torch.linalg.matrix_rank(module.weight.double(), rtol=1e-5)), min(module.weight.shape)
            is_left_alone = name.endswith(("lm_head", "v_proj"))
            assert rank == (of if is_left_alone else rank_of(*module.weight.shape, options["share"]))
            assert (name in log) is not is_left_alone
            assert is_left_alone or (log[name]["rank"], log[name]["of"]) == (rank, of)
    errors = [each["output_error"] for each in log.values()]
    if options.get("whiten", True):
        assert all(0 <= error < 1 for error in errors)
        assert max(errors) > 0.1
    else:
        assert errors == [None] * len(log)


def test_the_first_layers_error_is_what_the_model_shows(make: Make, tiny_bundle: Bundle) -> None:
    seen: list[torch.Tensor] = []
    place = tiny_bundle.model.model.layers[0].self_attn.q_proj
    hook = place.register_forward_hook(lambda layer, x, y: seen.append(y[0]))
    for ids in CALIBRATION:
        tiny_bundle.model(input_ids=torch.tensor([ids]), use_cache=False)
    after = make("low_rank").apply(load.load(reference.parse("tiny")), CONTEXT)
    place.weight.data = after.model.model.layers[0].self_attn.q_proj.weight.data
    for ids in CALIBRATION:
        tiny_bundle.model(input_ids=torch.tensor([ids]), use_cache=False)
    hook.remove()
    before, now = torch.cat(seen[: len(CALIBRATION)]), torch.cat(seen[len(CALIBRATION) :])
    error = json.loads(after.files[low_rank.FILE])["model.layers.0.self_attn.q_proj"]["output_error"]
    assert float((before - now).norm() / before.norm()) == pytest.approx(error, rel=1e-3)


def test_an_interrupted_run_that_goes_on_ends_in_the_same(make: Make, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line == "block 2/2":
            raise KeyboardInterrupt

    def run(context: Context) -> Bundle:
        found: Bundle = make("low_rank").apply(load.load(reference.parse("tiny")), context)
        return found

    whole, kept = run(CONTEXT), replace(CONTEXT, unfinished=tmp_path / "0-low_rank")
    with pytest.raises(KeyboardInterrupt):
        run(replace(kept, progress=stop))
    again = run(kept)
    assert again.files == whole.files
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_plain_singular_values_read_no_text(make: Make, tiny_bundle: Bundle) -> None:
    technique = make("low_rank", whiten=False)
    assert not technique.needs.calibration
    assert not technique.walks
    technique.apply(tiny_bundle, Context())
    with pytest.raises(InputError, match="needs text"):
        make("low_rank").apply(load.load(reference.parse("tiny")), Context())
    size = shapes.shapes(reference.parse("tiny"))
    before = Prediction(weights_bytes=4 * size.parameters, peak_bytes=4 * size.parameters, seconds=None)
    machine = Machine("cpu", read_bytes_per_s=1e10, flops={"float32": 1e11})
    plain, fitted = (make("low_rank", whiten=each).predict(size, before, machine) for each in (False, True))
    assert plain.seconds < fitted.seconds + 1e-9
    assert plain.weights_bytes == fitted.weights_bytes == before.weights_bytes


def test_an_artifact_says_that_it_is_no_faster(tmp_path: Path) -> None:
    made = chosen({"low_rank": {}}, calibration={"samples": 4, "tokens": 32})
    optimize.optimize("tiny", made, tmp_path / "out", LoadOptions(device="cpu"))
    assert set(json.loads((tmp_path / "out" / low_rank.FILE).read_text(encoding="utf-8"))) == set(
        shapes.shapes(reference.parse("tiny")).linear
    )
    spec = arms.spec(str(tmp_path / "out"), None, ["engine.name=transformers"])
    bundle = pipeline.open_arm(spec, "cpu", LoadOptions(device="cpu"))
    assert pipeline.engine(bundle, spec.recipe).notes[-1] == low_rank.REMARK


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.01}, r"share: found 0.01, which leaves model.layers.0.self_attn.q_proj no rank; allowed: 0.031 … 1"),
        ({"ignore": ["lm_head", "nothing"]}, r"ignore\[1\]: unknown module"),
    ],
)
def test_what_does_not_go_is_refused_before_anything_is_read(options: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(RecipeError, match=message):
        make("low_rank", **options).check(shapes.shapes(reference.parse("tiny")), "steps[0].low_rank")
    for share in (0.0, 1.1):
        with pytest.raises(ValidationError):
            techniques.find("low_rank").Options(share=share)  # type: ignore[call-arg]
