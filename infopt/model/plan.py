"""How a model will be loaded, decided before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LoadPlan:
    """Techniques refine it in their `plan` hook; `model.load` carries it out.

    `dtype` is a torch dtype's name (`float32`, `bfloat16`, `float16`) or `auto` (as stored).
    `quantization_config` is an object that transformers' `from_pretrained` accepts, or None.
    """

    dtype: str = "auto"
    device: str = "cpu"
    quantization_config: Any = None
    attention: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    is_plain: bool = False
    """As transformers alone opens it, without what `model.compressed` puts right."""
