"""Tensors for the GPU kernels' tests: on a GPU where there is one, else on the CPU, where Triton interprets the kernels."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
