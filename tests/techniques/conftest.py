"""Techniques on tiny models: built the way `optimize` builds them, without the command around it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from stub_techniques import CALIBRATION

from infopt import techniques
from infopt.needs import missing_need
from infopt.protocols import Context
from infopt.techniques.base import Technique

if TYPE_CHECKING:
    import torch

    from infopt.model.bundle import Bundle

Make = Callable[..., Technique]
Build = Callable[..., "Bundle"]
Logits = Callable[["Bundle"], "torch.Tensor"]


@pytest.fixture
def make() -> Make:
    """`make(name, **options)`: the technique, or a skip with doctor's line where this machine lacks what it needs."""

    def technique(name: str, **options: Any) -> Technique:
        kind = techniques.find(name)
        made = kind(kind.Options(**options))
        lacking = missing_need(made.needs, "cpu" if made.needs.cpu else "auto")
        if lacking:
            pytest.skip(f"{name} {lacking.message}")
        if name == "quanto" and made.needs.compiler and os.environ.get("INFOPT_TEST_QUANTO") != "1":
            from infopt.layers.quanto_extension import is_built

            if not is_built():
                pytest.skip("quanto compiles its kernels for minutes at first use; INFOPT_TEST_QUANTO=1 does it here")
        return made

    return technique


@pytest.fixture
def build() -> Build:
    """`build(technique, model="tiny", dtype="auto")`: plan → load → apply."""

    def bundle(technique: Technique, model: str | Path = "tiny", dtype: str = "auto") -> Bundle:
        from infopt.model import load, reference
        from infopt.model.plan import LoadPlan

        plan = technique.plan(LoadPlan(dtype=dtype))
        return technique.apply(load.load(reference.parse(str(model)), plan), Context(calibration_ids=CALIBRATION))

    return bundle


@pytest.fixture
def logits() -> Logits:
    """The bundle's logits on 40 fixed tokens, [40, vocabulary]: more rows than the fast paths of few rows take."""

    def run(bundle: Bundle) -> torch.Tensor:
        import torch

        ids = torch.arange(40).mul(7).remainder(250).add(3)[None]
        with torch.inference_mode():
            found: torch.Tensor = bundle.model(input_ids=ids.to(bundle.device)).logits[0]
        return found

    return run


@pytest.fixture(scope="session")
def demo_quality(demo_folder: Path) -> Callable[[Bundle], float]:
    """Perplexity of a model ÷ the demo model's, over 4 windows of 512 tokens of the bundled evaluation text."""
    import torch

    from infopt.data import texts
    from infopt.model import load, reference
    from infopt.model.plan import LoadPlan

    def losses(bundle: Bundle, windows: torch.Tensor) -> torch.Tensor:
        found = []
        for window in windows:
            with torch.inference_mode():
                predicted = bundle.model(input_ids=window[None]).logits[0, :-1].float()
            found.append(torch.nn.functional.cross_entropy(predicted, window[1:], reduction="none"))
        return torch.cat(found)

    reference_bundle = load.load(reference.parse("demo"), LoadPlan(dtype="float32"))
    ids = reference_bundle.tokenizer(texts.read_text("bundled", "evaluation"), verbose=False)["input_ids"][: 4 * 512]
    windows = torch.tensor(ids).view(4, 512)
    expected = losses(reference_bundle, windows)
    return lambda bundle: float((losses(bundle, windows) - expected).mean().exp())
