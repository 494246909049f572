"""Exports in llama.cpp itself. Skipped unless `make interop` has built it into the user's cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.export import export
from infopt.export.source import probe_texts
from infopt.model import gguf_tokenizer, load, reference
from infopt.model.cache import cache_dir
from infopt.settings import LoadOptions

Make = Callable[..., Path]
CACHE = cache_dir()
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], dict[str, Any]]:
    monkeypatch.setenv("INFOPT_CACHE", str(CACHE))
    monkeypatch.syspath_prepend(BENCHMARKS)
    import interop_llama

    if not (CACHE / "envs" / interop_llama.PACKAGE.replace("==", "-")).is_dir():
        pytest.skip("llama.cpp is not built; make interop does it")
    found: Callable[[dict[str, Any]], dict[str, Any]] = interop_llama.read
    return found


def check(folder: Path, out: Path, read: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """float32 in llama.cpp is the source's model: the same tokens, log-probabilities and ids of texts."""
    export(str(folder), "gguf", "f32", out, LoadOptions(device="cpu"))
    bundle = load.load(reference.parse(str(folder)))
    texts = probe_texts(bundle.tokenizer)
    ids = torch.arange(5, 105).mul(7).remainder(400).add(3)
    found = read({"folder": str(out), "new_tokens": 8, "prompts": [ids[:40].tolist()], "text": ids.tolist(), "texts": texts})
    with torch.inference_mode():
        logits = bundle.model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
        made = bundle.model.generate(ids[None, :40], max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 40:]
    expected = logits.gather(1, ids[1:, None])[:, 0]
    tolerance = 5e-3 if bundle.model.config.model_type == "gemma3_text" else 2e-4  # its GELU goes through a float16 table
    assert (torch.tensor(found["text_logprobs"], dtype=torch.float64) - expected).abs().max() < tolerance
    if not set(made.tolist()) & {bundle.tokenizer.eos_token_id}:
        assert found["outputs"][0]["tokens"] == made.tolist()
    assert found["encoded"] == [bundle.tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "llama-scaled", "llama-linear", "mistral", "qwen2", "qwen3", "gemma3_text"]
)
def test_every_architecture(kind: str, make: Make, read: Any, tmp_path: Path) -> None:
    check(make(kind), tmp_path / "model.gguf", read)


@pytest.mark.parametrize("name", gguf_tokenizer.SPLITTERS)
def test_every_way_to_split_text(name: str, make: Make, byte_level: Callable[[str], Any], read: Any, tmp_path: Path) -> None:
    check(make("llama", byte_level(name)), tmp_path / "model.gguf", read)


@pytest.mark.parametrize(("kind", "prefixed"), [("llama", True), ("gemma3_text", False)])
def test_sentencepiece(
    kind: str, prefixed: bool, make: Make, sentencepiece: Callable[[bool], Any], read: Any, tmp_path: Path
) -> None:
    check(make(kind, sentencepiece(prefixed)), tmp_path / "model.gguf", read)
