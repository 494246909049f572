"""Models for the runtime's tests; what they are is in `conftest_runtime`."""

from __future__ import annotations

from conftest_runtime import double, make

__all__ = ["double", "make"]
