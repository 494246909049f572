"""A .gguf file is dequantized when it is loaded: what a step reads is what memory holds, not what the file does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from infopt import arms
from infopt.model import tiny
from infopt.protocols import Machine
from infopt.settings import LoadOptions, WorkloadSpec
from infopt.worker import OpenArm


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_they_are_run(
    tied: bool, write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.KINDS, "tiny", ("llama", {"tie_word_embeddings": tied}))
    spec = arms.spec(str(write_gguf(*tiny.make(), "Q8_0")), None)
    shape = WorkloadSpec(prompt_tokens=8, new_tokens=2, requests=1)
    machine = Machine("cpu", 1e10, {"float32": 1e11})
    facts = OpenArm(spec, LoadOptions(device="cpu"), shape, machine, lambda event, **content: None).facts()
    stored, held = (facts["figures"][f"{name}weights_bytes"]["value"] for name in ("", "resident_"))
    read = facts["traffic"]["weights_bytes"]
    assert stored < 0.3 * held
    assert held - read == (0 if tied else facts["traffic"]["shapes"]["embedding"] * 4)
