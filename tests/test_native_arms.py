"""What an arm under the native engine is opened as: whole, swapped or stock, with its drafts, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infopt import arms, pipeline
from infopt.errors import InputError
from infopt.protocols import Request
from infopt.settings import LoadOptions

CPU = LoadOptions(device="cpu")
PROMPT = tuple(ord(letter) % 250 for letter in "the cat sat on the mat, the cat sat on the ")


def opened(model: str, *overrides: str) -> tuple[Any, Any]:
    spec = arms.spec(model, None, overrides)
    bundle = pipeline.open_arm(spec, "cpu", CPU)
    return bundle, pipeline.engine(bundle, spec.recipe)


def text(engine: Any, new: int = 20) -> tuple[int, ...]:
    return tuple(engine.generate([Request("0", PROMPT, new)]).output_ids[0])


@pytest.mark.parametrize(
    ("model", "way", "said"),
    [
        ("tiny", "native", "native engine: whole steps, "),
        ("tiny-gemma3", "native", "native engine: whole steps, "),
        ("tiny-moe", "native", "native engine: transformers' modules, "),
    ],
)
def test_each_kind_is_run_the_fastest_way_that_fits(model: str, way: str, said: str) -> None:
    _, engine = opened(model, "cache.dtype=float32")
    stock = opened(model, "engine.name=transformers")[1]
    assert (engine.name, stock.name) == (way, "transformers")
    assert engine.notes[0].startswith(said)
    assert stock.notes == ("stock generate of transformers",)
    assert text(engine) == text(stock)


@pytest.mark.parametrize(
    ("override", "way", "said"),
    [
        ("engine.attention=eager", "whole", "engine.attention: eager is a kernel of transformers; whole steps have their own"),
        ("cache.dtype=float32", "swapped", "cache.dtype: float32 was not heard: with swapped layers transformers keeps"),
        ("engine.attention=eager", "swapped", None),
        ("cache.dtype=float32", "whole", None),
    ],
)
def test_a_setting_that_is_not_heard_is_told(override: str, way: str, said: str | None) -> None:
    notes = opened("tiny", override, f"engine.way={way}")[1].notes
    assert len(notes) == (1 if said is None else 2)
    assert said is None or notes[1].startswith(said)


def test_layers_of_another_library_fall_to_stock_generate_with_one_line() -> None:
    spec = arms.spec("tiny", "nf4", ["engine.name=native", "engine.dtype=float32"])
    bundle = pipeline.build(pipeline.resolve("tiny", CPU), spec.recipe, "cpu", options=CPU)[0]
    lines: list[str] = []
    found = pipeline.natively(bundle, spec.recipe, CPU, lines.append)
    engine = pipeline.engine(found, spec.recipe)
    assert engine.name == "transformers"
    assert len(engine.notes) == 1
    assert engine.notes[0].startswith("stock generate of transformers; the native engine does not fit: whole steps do not fit: ")
    assert lines[-1] == engine.notes[0]
    assert len(text(engine, 4)) == 4


def test_what_an_artifact_needs_in_stock_generate_is_done_where_the_native_engine_does_not_fit(tmp_path: Path) -> None:
    from infopt import optimize
    from infopt.layers.int8_linear import Int8Linear

    spec = arms.spec("tiny", "int8", ["engine.way=whole"])
    optimize.optimize("tiny", spec.recipe, tmp_path / "out", CPU)
    made = arms.spec(str(tmp_path / "out"), None)
    assert pipeline.open_arm(made, "cpu", CPU).notes[0].startswith("native engine: whole steps, ")
    bundle = pipeline.reopen(tmp_path / "out", made.recipe.engine, "cpu", CPU)
    assert not any(isinstance(module, Int8Linear) for module in bundle.model.modules())
    found = pipeline.natively(bundle, arms.spec(str(tmp_path / "out"), None, ["engine.weights=float8"]).recipe, CPU)
    assert any(isinstance(module, Int8Linear) for module in found.model.modules())


def test_another_device_falls_to_stock_generate() -> None:
    spec = arms.spec("tiny", None)
    bundle = pipeline.open_arm(arms.spec("tiny", "baseline"), "cpu", CPU)
    bundle.model.to("meta")
    found = pipeline.natively(bundle, spec.recipe, CPU)
    assert found.model is bundle.model
    said = "it runs on CPUs and on CUDA GPUs, not on meta"
    assert found.notes == (f"stock generate of transformers; the native engine does not fit: {said}",)
    with pytest.raises(InputError, match=f"draft 'self' needs the native engine: {said}"):
        pipeline.natively(bundle, arms.spec("tiny", None, ["speculative.draft=self"]).recipe, CPU)


@pytest.mark.parametrize("draft", ["self", "auto", "tiny-qwen2", "tiny-gemma3", "tiny-moe"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_of_any_model_with_the_same_tokens(draft: str, temperature: float) -> None:
    """tiny-gemma3 has the same tokenizer and a larger table: what the target does not have is never drafted."""
    settings = (f"speculative.draft={draft}", f"sampling.temperature={temperature}", "cache.dtype=float32")
    engine = opened("tiny", *settings, *(["speculative.among=[tiny-qwen2]"] if draft == "auto" else ["speculative.tokens=3"]))[1]
    found = text(engine)
    assert len(found) == 20
    if temperature == 0:
        assert found == text(opened("tiny", "cache.dtype=float32")[1])
    if draft == "auto":
        assert "tiny-qwen2 " in engine.notes[-1]


def test_a_smaller_table_drafts_for_a_larger_one() -> None:
    engine = opened("tiny-gemma3", "speculative.draft=tiny", "speculative.tokens=3", "cache.dtype=float32")[1]
    assert text(engine) == text(opened("tiny-gemma3", "cache.dtype=float32")[1])


@pytest.mark.demo
def test_a_draft_that_knows_other_tokens_is_refused(demo_folder: object) -> None:
    with pytest.raises(
        InputError, match=r"speculative.draft: demo knows other tokens than the model \(\d+ against \d+"
    ) as caught:
        opened("tiny", "speculative.draft=demo")
    assert "prompt_lookup" in (caught.value.hint or "")


def test_stock_generate_takes_no_other_draft() -> None:
    with pytest.raises(InputError, match="draft 'self'; allowed here: prompt_lookup"):
        opened("tiny", "engine.name=transformers", "speculative.draft=self")
