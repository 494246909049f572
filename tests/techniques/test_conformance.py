"""What every technique must do; a file in infopt/techniques/ enters by existing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from stub_techniques import CALIBRATION

from infopt import optimize, recipe, techniques
from infopt.layers.kv_ranges import leave_cache_alone
from infopt.model import checkpoint, load, reference, save, shapes, tiny
from infopt.model.bundle import Bundle
from infopt.protocols import Context, Machine, Prediction
from infopt.settings import LoadOptions
from infopt.techniques.base import Technique

NAMES = techniques.names()
#: What takes a part of the model away, which costs more of what it says than rounding does.
PRUNES = {"magnitude", "wanda", "sparsegpt", "drop_layers", "prune_width", "shrink", "low_rank"}
MACHINE = Machine("cpu", read_bytes_per_s=2e10, flops={"float32": 1e11, "bfloat16": 4e11})
every = pytest.mark.parametrize("name", NAMES)
Make = Callable[..., Technique]
Build = Callable[..., Bundle]
Logits = Callable[[Bundle], torch.Tensor]


def test_there_are_techniques() -> None:
    assert {"rtn", "int8", "int8_naive", "bnb_int8", "nf4", "quanto"} <= set(NAMES)


@every
def test_changes_the_model_but_not_its_output_shape_and_dtype(
    name: str, make: Make, build: Build, logits: Logits, tiny_bundle: Bundle
) -> None:
    before, bundle = logits(tiny_bundle), build(make(name))
    after = logits(bundle)
    if not techniques.find(name).keeps_vocabulary:  # what both can say is compared; the text is in tokens of both
        assert after.shape[1] < before.shape[1]
        before = before[:, [tiny_bundle.tokenizer.get_vocab()[token] for token in _in_order(bundle)]]
        assert torch.equal(after, before)
        return
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert torch.isfinite(after).all()
    assert torch.equal(after, before) is techniques.find(name).is_record
    # Random weights have no outliers, so even the coarsest technique keeps most of what the model says; nor have they any
    # that can be spared, so pruning half of them keeps less.
    least = 0.5 if name in PRUNES else 0.85
    assert torch.nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0) > least


def _in_order(bundle: Bundle) -> list[str]:
    """The tokens of the bundle's tokenizer by number."""
    vocabulary = bundle.tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


@every
def test_is_deterministic(name: str, make: Make, build: Build, logits: Logits) -> None:
    torch.manual_seed(0)
    first = logits(build(make(name)))
    torch.manual_seed(1)
    assert torch.equal(first, logits(build(make(name))))


@every
def test_generates(name: str, make: Make, build: Build) -> None:
    bundle = build(make(name))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    out = bundle.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert out.shape == (2, 10)


@every
def test_options_round_trip_and_are_strict(name: str) -> None:
    kind = techniques.find(name).Options
    options = kind()
    assert kind(**json.loads(options.model_dump_json())) == options
    with pytest.raises(ValidationError):
        kind(no_such_option=1)
    for option, value in options.model_dump().items():
        if isinstance(value, bool | int | float):
            with pytest.raises(ValidationError):
                kind(**{option: str(value)})


@pytest.mark.parametrize("name", [name for name in NAMES if techniques.find(name).neutral is not None])
def test_neutral_options_change_nothing(name: str, make: Make, build: Build, logits: Logits, tiny_bundle: Bundle) -> None:
    bundle = build(make(name, **(techniques.find(name).neutral or {})))
    assert torch.equal(logits(bundle), logits(tiny_bundle))
    assert not bundle.packed
    assert bundle.save_config is None


@every
def test_reloads_as_what_was_saved(name: str, make: Make, build: Build, logits: Logits, tmp_path: Path) -> None:
    technique = make(name)
    if technique.at_load:
        first, second = (logits(build(technique)) for _ in range(2))
        assert (first - second).abs().max() <= technique.reload_tolerance
        return
    bundle = build(technique)
    save.save(bundle, tmp_path / "saved")
    made = logits(bundle)
    plain = load.load(reference.parse(str(tmp_path / "saved")))
    leave_cache_alone(plain.model)
    alignment = 1e-5  # sums depend on where in memory a weight starts, and a file places it elsewhere
    assert (logits(plain) - made).abs().max() <= technique.reload_tolerance + alignment
    again = technique.reopen(load.load(reference.parse(str(tmp_path / "saved"))))
    assert (logits(again) - made).abs().max() <= alignment


@pytest.fixture(scope="module")
def uneven_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a head of its own, and sizes that neither 64 nor each other divide."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=320, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "uneven"
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    save.save(Bundle(model, tiny.tokenizer(), "uneven"), folder)
    return str(folder)


@every
@pytest.mark.parametrize("model", ["tiny", "uneven"])
def test_predicts_the_stored_bytes(
    name: str, model: str, make: Make, build: Build, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    known = techniques.find(name).Options.model_fields
    options: dict[str, Any] = {"group_size": 32} if "group_size" in known else {}
    if model == "uneven":
        model = request.getfixturevalue("uneven_folder")
        options |= {"ignore": ()} if "ignore" in known and not make(name).walks else {}
    technique, size = make(name, **options), shapes.shapes(reference.parse(model))
    before = Prediction(weights_bytes=4 * size.parameters, peak_bytes=4 * size.parameters, seconds=None)
    predicted = technique.predict(size, before, MACHINE)
    assert predicted.peak_bytes >= predicted.weights_bytes
    assert predicted.seconds is not None
    assert 0 < predicted.seconds < 10
    assert technique.predict(size, before, Machine("cpu", read_bytes_per_s=None)).seconds is None
    if technique.at_load:
        assert predicted.weights_bytes == before.weights_bytes
        return
    save.save(build(technique, model), tmp_path / "saved")
    assert predicted.weights_bytes == pytest.approx(checkpoint.tensor_bytes(tmp_path / "saved"), rel=0.03)


@every
def test_the_artifact_names_it(name: str, make: Make, tmp_path: Path) -> None:
    make(name)
    chosen = recipe.parse({"version": 1, "name": "one-step", "steps": [name]}, techniques.find)
    document = optimize.optimize("tiny", chosen, tmp_path / "out", LoadOptions())
    (step,) = document.steps
    assert step.name == name
    assert step.is_at_load is techniques.find(name).at_load
    assert step.options == json.loads(techniques.find(name).Options().model_dump_json())
    assert name in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@every
def test_its_docstring_is_its_manual(name: str) -> None:
    kind = techniques.find(name)
    manual = kind.__doc__ or ""
    assert re.search(r"arXiv \d{4}\.\d{4,5}", manual), "no paper"
    for option, field in kind.Options.model_fields.items():
        assert re.search(rf"^ +{option}  ", manual, re.MULTILINE), f"{option} is not explained"
        assert _default(field.default) in manual, f"the default of {option} is not stated"
    if kind.at_load:
        assert "Applied at load" in manual
    if kind.reload_tolerance > 0 or name == "int8":
        assert "Reload tolerance" in manual


def _default(value: Any) -> str:
    if value is None:
        return "null"  # as in YAML
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


@every
def test_apply_uses_the_context_it_is_given(name: str, make: Make) -> None:
    """A technique reports progress in single lines, if at all."""
    from infopt.model.plan import LoadPlan

    technique, lines = make(name), []
    opened = partial(load.load, reference.parse("tiny"))
    context = Context(
        calibration_ids=CALIBRATION, progress=lines.append,
        open_model=lambda name: opened(), open_tokenizer=lambda name: opened().tokenizer,
    )  # fmt: skip
    technique.apply(load.load(reference.parse("tiny"), technique.plan(LoadPlan())), context)
    assert all("\n" not in line for line in lines)
