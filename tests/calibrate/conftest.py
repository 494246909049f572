"""Calibration is tested in exact arithmetic."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions are held in float32, on processors too where calibration would round operands to bfloat16."""
    monkeypatch.setattr("infopt.kernels.onednn._has_tiles", lambda: False)
    monkeypatch.setattr("infopt.kernels.onednn._has_vectors", lambda: False)
