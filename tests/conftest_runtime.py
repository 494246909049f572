"""Tiny models of every class that the whole step runs, and a step in float64 that cannot round a tie away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers

from infopt.runtime.steps import Output, Room, Run

VOCABULARY = 211
BASE = {
    "hidden_size": 96, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 512,
}  # fmt: skip
#: class of the configuration, and what differs from BASE
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, biases, own head": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "smollm": ("LlamaConfig", {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "mistral, window": ("MistralConfig", {"head_dim": 16, "sliding_window": 20}),
    "qwen2, windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3, part rotated": ("Phi3Config", {"partial_rotary_factor": 0.5, "pad_token_id": 0, "sliding_window": 30}),
    "odd sizes": ("LlamaConfig", {"hidden_size": 60, "head_dim": 10, "intermediate_size": 50, "num_key_value_heads": 6}),
}  # fmt: skip


def tiny(name: str = "llama", **changes: Any) -> Any:
    """Weights wide enough that tokens differ, every norm and bias other than 1 and 0."""
    kind, own = SHAPES[name]
    config = getattr(transformers, kind)(**{**BASE, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():
            parameter.data = parameter + 0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 4 * parameter
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    return tiny


def wanted(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of transformers' modules."""
    found: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in shares of the spread."""
    return float((found.cpu() - expected).abs().max() / expected.std())


class DoubleStep:
    """The whole text in float64, every time: slow, and exact."""

    name = "double"
    remarks: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model, self.vocabulary, self.context = model.double(), VOCABULARY, 512
        self.tokens = 0
        """Computed so far."""

    def open(self) -> list[int]:
        return []

    def length(self, sequence: list[int]) -> int:
        return len(sequence)

    def require(self, rooms: Sequence[Room], beside: float = 0) -> float:
        return 0.0

    def prepare(self, rows: int, most: int) -> None:
        """Nothing has to be."""

    def cut(self, sequence: list[int], length: int) -> None:
        del sequence[length:]

    def fork(self, sequence: list[int]) -> list[int]:
        return list(sequence)

    def close(self, sequence: list[int]) -> None:
        sequence.clear()

    def run(self, runs: Sequence[Run], want_logits: bool = True) -> Output:
        rows = []
        for run in runs:
            run.sequence.extend(run.ids)
            self.tokens += len(run.ids)
            logits = self.model(input_ids=torch.tensor([run.sequence]), use_cache=False).logits[0]
            rows.append(logits[-len(run.ids) :] if run.all_logits else logits[-1:])
        found = torch.cat(rows)
        best = found.topk(2)
        return Output(
            best.indices[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist(), found if want_logits else None
        )


@pytest.fixture(scope="session")
def double() -> DoubleStep:
    return DoubleStep(tiny("llama", num_hidden_layers=2, hidden_size=48, intermediate_size=64))
