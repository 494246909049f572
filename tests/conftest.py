"""Fixtures for every test: no hub, a cache of its own for each test, tiny models, and the demo model where it is asked for."""

from __future__ import annotations

import os
import shutil
import tempfile
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Read when huggingface_hub is imported, so set before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = os.path.join(tempfile.gettempdir(), "infopt-tests-have-no-hub")

# Read when a Triton kernel is defined. Where there is no GPU kernels are interpreted, on CPU tensors.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

_caches = count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "demo_folder" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.demo)


@pytest.fixture(scope="session")
def _cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, _cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test finds an empty INFOPT_CACHE, except those with the demo model, which share the user's."""
    if request.node.get_closest_marker("demo") is None:
        monkeypatch.setenv("INFOPT_CACHE", str(_cache_root / str(next(_caches))))


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model's folder, fetched once into the user's cache (or $INFOPT_CACHE)."""
    from infopt.model import demo

    return demo.fetch()


@pytest.fixture
def tiny_bundle() -> Bundle:
    """A tiny Llama, open; each test gets its own."""
    from infopt.model import load, reference

    return load.load(reference.parse("tiny"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, saved; read only."""
    from infopt.model import save, tiny
    from infopt.model.bundle import Bundle

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model, tokenizer = tiny.make()
    save.save(Bundle(model, tokenizer, "tiny"), folder)
    return folder
