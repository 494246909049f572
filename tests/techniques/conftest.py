"""Techniques on tiny models: built the way `optimize` builds them, without the command around it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from stub_techniques import CALIBRATION

from infopt import techniques
from infopt.backends import environments, work
from infopt.backends.environments import Environment
from infopt.needs import Needs, missing_need
from infopt.protocols import Context
from infopt.techniques.base import Technique

if TYPE_CHECKING:
    import torch

    from infopt.model.bundle import Bundle

Make = Callable[..., Technique]
Build = Callable[..., "Bundle"]
Logits = Callable[["Bundle"], "torch.Tensor"]
#: Where this user's environments are; tests have caches of their own.
INSTALLED = environments.root()


@pytest.fixture
def make() -> Make:
    """`make(name, **options)`: the technique, or a skip with doctor's line where this machine lacks what it needs."""

    def technique(name: str, **options: Any) -> Technique:
        kind = techniques.find(name)
        made = kind(kind.Options(**options))
        if made.needs.environment is not None and os.environ.get("INFOPT_TEST_ENVIRONMENTS") == "1":
            _link(made.needs.environment)
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
def installed() -> Callable[[Environment], None]:
    """`installed(environment)`: lets the test use it, or skips where this user has not installed it."""

    def use(environment: Environment) -> None:
        _link(environment)
        lacking = missing_need(Needs(environment=environment))
        if lacking:
            pytest.skip(f"{lacking.message}: {lacking.hint}")

    return use


def _link(environment: Any) -> None:
    """Puts the user's environment, if he has it, into this test's cache."""
    real = INSTALLED / environment.folder.name
    if (real / environments.STAMP).is_file() and not environment.folder.exists():
        environment.folder.parent.mkdir(parents=True, exist_ok=True)
        environment.folder.symlink_to(real)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`stand_in(body)`: every environment is there, its interpreter is this one, and its worker does `body`.

    Returns the file that each job's description is copied to.
    """

    def install(body: str) -> Path:
        scripts, seen = tmp_path / "scripts", tmp_path / "job.json"
        scripts.mkdir()
        (scripts / "job.py").write_text((work.SCRIPTS / "job.py").read_text(encoding="utf-8"), encoding="utf-8")
        text = f"import shutil\nfrom job import Job\njob = Job.open()\nshutil.copy(job.out.parent / 'job.json', {str(seen)!r})\n"
        for name in environments.ENVIRONMENTS:
            (scripts / f"{name}_worker.py").write_text(text + body, encoding="utf-8")
        monkeypatch.setattr(work, "SCRIPTS", scripts)
        monkeypatch.setattr(Environment, "interpreter", Path(sys.executable))
        monkeypatch.setattr(Environment, "is_installed", lambda self: True)
        return seen

    return install


@pytest.fixture
def build() -> Build:
    """`build(technique, model="tiny", dtype="auto")`: plan → load → apply."""

    def bundle(technique: Technique, model: str | Path = "tiny", dtype: str = "auto") -> Bundle:
        from infopt.model import load, reference
        from infopt.model.plan import LoadPlan

        plan = technique.plan(LoadPlan(dtype=dtype))
        context = Context(
            calibration_ids=CALIBRATION,
            open_model=lambda name: load.load(reference.parse(name or str(model))),
            open_tokenizer=lambda name: load.open_tokenizer(reference.parse(name or str(model))),
        )
        return technique.apply(load.load(reference.parse(str(model)), plan), context)

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


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions are held in float32, on processors too where calibration would round operands to bfloat16."""
    monkeypatch.setattr("infopt.kernels.onednn._has_tiles", lambda: False)
    monkeypatch.setattr("infopt.kernels.onednn._has_vectors", lambda: False)
