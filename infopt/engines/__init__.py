"""One file per engine; the folder is the registry. Nothing is imported until an engine is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from infopt.errors import InputError, unknown
from infopt.protocols import Engine

#: Engines that hand out the log-probabilities of what they draw.
WITH_LOGPROBS = ("native",)


def names() -> list[str]:
    """Every engine there is, by file name."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def find(name: str) -> Callable[..., Engine]:
    """The engine class in `engines/<name>.py`. Raises InputError naming the nearest engine."""
    if name not in names():
        raise InputError(unknown("engine", name, names()), hint=f"known: {', '.join(names())}")
    engine: Callable[..., Engine] = importlib.import_module(f"{__name__}.{name}").ENGINE
    return engine
