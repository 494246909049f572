"""What the sections of a recipe take, beside its steps and gates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["auto", "float32", "bfloat16", "float16"]
Packed = Literal["auto", "float32", "bfloat16", "int8", "int4"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Speculative(Section):
    """`prompt_lookup`: n-grams of the prompt and output so far are the draft. `tokens` is the longest draft; auto: as many as
    pay in the native engine, 10 elsewhere."""

    draft: Literal["prompt_lookup"]
    tokens: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = 10


class SamplingSection(Section):
    temperature: float = Field(default=0.0, ge=0, le=5)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    candidates: int = Field(default=1, ge=1, le=256)


class Cache(Section):
    """`dtype`: of keys and values in the native engine, auto being float16; elsewhere they are in the model's."""

    kind: Literal["dynamic", "static"] = "dynamic"
    dtype: Literal["auto", "float32", "float16"] = "auto"
    prefix: bool = False


class EngineSection(Section):
    """`weights` and `head` are the native engine's: what it turns floating-point weights into as it opens a model. Integers have
    groups of 32 inputs; auto keeps the type that they have, and makes the head int8 where other weights are integers."""

    name: str = "transformers"
    weights: Packed = "auto"
    head: Packed = "auto"
    dtype: DType = "auto"
    compile: Literal["never", "auto"] = "never"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"


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
