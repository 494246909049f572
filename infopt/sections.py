"""What the sections of a recipe take, beside its steps and gates."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DType = Literal["auto", "float32", "bfloat16", "float16"]
Packed = Literal["auto", "float32", "bfloat16", "int8", "int4", "float8"]
Choose = Literal["mean_logprob", "majority", "check"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Speculative(Section):
    """`draft`: prompt_lookup, n-grams of the prompt and output so far; self, the model's own early layers with its head; a model
    or an artifact with the same vocabulary; auto, whichever of prompt_lookup, self and `among` is fastest in a short trial
    on the prompts at hand, or none. All but prompt_lookup need the native engine. `tokens`: of the longest draft; auto: as
    many as pay in the native engine, 10 elsewhere. `layers`: those that `self` drafts with; null is a quarter of them."""

    draft: Annotated[str, Field(min_length=1)]
    tokens: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = "auto"
    layers: Annotated[int, Field(ge=1)] | None = None
    among: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _goes_together(self) -> Speculative:
        known = ("auto", *OWN_DRAFTS)
        meant = [] if self.draft in known else get_close_matches(self.draft, known, 1, 0.7)
        if meant:  # a model's name may be anything else
            raise ValueError(f"found draft: {self.draft}; allowed: {', '.join(known)} or a model; did you mean {meant[0]!r}?")
        if self.among and self.draft != "auto":
            raise ValueError(f"found among with draft: {self.draft}; allowed: draft: auto")
        if self.layers is not None and self.draft not in ("self", "auto"):
            raise ValueError(f"found layers with draft: {self.draft}; allowed: draft: self or auto")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """The references of models that draft."""
        named = self.among if self.draft == "auto" else (self.draft,)
        return tuple(name for name in named if name not in OWN_DRAFTS)


OWN_DRAFTS = ("prompt_lookup", "self")
"""Drafts that need no second model."""


class SamplingSection(Section):
    """`choose`: which of the candidates is the answer (see `infopt.data.candidates`); null leaves them all. `answer`: a regular
    expression whose last match, or first group of it, is what a majority agrees on; null takes the whole text."""

    temperature: float = Field(default=0.0, ge=0, le=5)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    candidates: int = Field(default=1, ge=1, le=256)
    choose: Choose | None = None
    answer: str | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> SamplingSection:
        if self.candidates > 1 and self.temperature == 0:
            raise ValueError(
                f"found candidates: {self.candidates} at temperature 0; allowed: temperature above 0, or candidates: 1"
            )
        if self.choose and self.candidates == 1:
            raise ValueError(f"found choose: {self.choose} with candidates: 1; allowed: candidates: 2 or more")
        if self.answer is not None and self.choose != "majority":
            raise ValueError(f"found answer: {self.answer!r} with choose: {self.choose or 'null'}; allowed: choose: majority")
        try:
            re.compile(self.answer or "")
        except re.error as error:
            raise ValueError(f"found answer: {self.answer!r} ({error}); allowed: a pattern of Python's re") from None
        return self


class Cache(Section):
    """`dtype`: of keys and values in the native engine, auto being float16 on a CPU and the model's on a GPU; elsewhere they are
    in the model's."""

    kind: Literal["dynamic", "static"] = "dynamic"
    dtype: Literal["auto", "float32", "float16"] = "auto"
    prefix: bool = False


class EngineSection(Section):
    """`weights` and `head` are the native engine's: what it turns floating-point weights into as it opens a model. Integers have
    groups of 32 inputs, float8 a scale a row (GPUs alone); auto keeps the type that they have, but makes the head int8 on a CPU
    where other weights are integers. `way`: whole steps in one call, transformers' modules with swapped linear layers (CPUs
    alone), or the first of these that fits."""

    name: str = "native"
    weights: Packed = "auto"
    head: Packed = "auto"
    way: Literal["auto", "whole", "swapped"] = "auto"
    dtype: DType = "auto"
    compile: Literal["never", "auto"] = "never"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"


def unheard(engine: EngineSection, cache: Cache, way: str) -> list[str]:
    """What they say that a way of running a model natively has no use for."""
    said = []
    if way == "whole" and engine.attention != "auto":
        said.append(f"engine.attention: {engine.attention} is a kernel of transformers; whole steps have their own")
    if way == "swapped" and cache.dtype != "auto":
        said.append(f"cache.dtype: {cache.dtype} was not heard: with swapped layers transformers keeps keys and values")
    return said


class Calibration(Section):
    """`text`: `bundled`, a text file, a .jsonl of texts or chats, or `hub:NAME[:SPLIT[:FIELD]]`; see `infopt.data.calibration`.
    `samples` windows of `tokens` tokens; the defaults leave the bundled text room with any tokenizer."""

    text: str = "bundled"
    samples: int = Field(default=128, ge=1)
    tokens: int = Field(default=256, ge=16)
    seed: int = 0


SECTIONS: dict[str, type[Section]] = {
    "speculative": Speculative,
    "sampling": SamplingSection,
    "cache": Cache,
    "engine": EngineSection,
    "calibration": Calibration,
}
