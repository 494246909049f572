"""What h200.py lets take turns: the native engine in each kind of weights, stock transformers, torchao and bitsandbytes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from gpu_models import GROUP, Shape

from infopt.engines.transformers import TransformersEngine
from infopt.kernels.gpu.choices import Table
from infopt.protocols import Request
from infopt.runtime.device_weights import packed
from infopt.runtime.drafts import Draft, Drafter, Wanted
from infopt.runtime.graph_step import GraphStep
from infopt.runtime.loop import Ask, Loop, Told
from infopt.runtime.steps import Room

NATIVE = ("bfloat16", "int8", "int4", "float8")
STOCK = ("eager", "static + compile")
OTHERS = ("torchao int4", "torchao int8", "torchao float8", "bitsandbytes nf4", "bitsandbytes int8")


@dataclass(frozen=True)
class Timed:
    """Seconds until each row's first token, and from there to the last; tokens of the first row; tokens a step of it brought."""

    prefill_s: float
    decode_s: float
    ids: tuple[int, ...]
    tokens_per_step: float


class Arm(Protocol):
    name: str
    weights_bytes: int
    """What a step of one token reads."""

    def run(self, prompts: Sequence[Sequence[int]], new: int) -> Timed: ...


class NativeArm:
    """`drafter`: what proposes tokens; `length`: of its drafts."""

    def __init__(self, name: str, step: GraphStep, drafter: Drafter | None = None, length: Any = None) -> None:
        self.name, self.step, self.weights_bytes = name, step, step.read_bytes
        self.loop = Loop(step, drafter, length)

    def run(self, prompts: Sequence[Sequence[int]], new: int) -> Timed:
        self.step.prepare(len(prompts), 1 if self.loop.drafter is None else self.loop.length.most + 1)
        told: list[Told] = []
        answers = self.loop.run([Ask(tuple(ids), new) for ids in prompts], lambda each, _: told.append(each))
        first, last = told[0].seconds, told[-1].seconds
        steps = sum(each.tokens[0] > 0 for each in told[1:])
        return Timed(first, last - first, tuple(answers[0].ids), (len(answers[0].ids) - 1) / max(1, steps))


class StockArm:
    """A transformers module behind its own `generate`."""

    def __init__(self, name: str, model: Any, is_compiled: bool) -> None:
        self.name = name
        parts = [*model.parameters(), *model.buffers()]
        gathered = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
        self.weights_bytes = sum(int(part.nbytes) for part in parts) - gathered
        self.engine = TransformersEngine(
            model, pad_token_id=0, cache="static" if is_compiled else "dynamic", compile="auto" if is_compiled else "never"
        )

    def run(self, prompts: Sequence[Sequence[int]], new: int) -> Timed:
        requests = [Request(str(index), tuple(ids), new) for index, ids in enumerate(prompts)]
        trace = self.engine.generate(requests)
        first, last = trace.emission_s[0], trace.emission_s[-1]
        return Timed(first, last - first, trace.output_ids[0], 1.0)


class Oracle:
    """Drafts what the model is known to say, each token right with probability `alpha`, so that acceptance is what is asked."""

    is_free = True

    def __init__(self, texts: Sequence[Sequence[int]], alpha: float, most: int, vocabulary: int, seed: int = 0) -> None:
        self.texts, self.alpha, self.most, self.vocabulary = [list(text) for text in texts], alpha, most, vocabulary
        self.source = torch.Generator().manual_seed(seed)

    def open(self) -> None: ...

    def require(self, rooms: Sequence[Room], beside: float = 0) -> None: ...

    def catch_up(self, wanted: Sequence[Wanted]) -> None: ...

    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        found = []
        for each in wanted:
            ids = list(each.ids)
            text = next(text for text in self.texts if text[: len(ids)] == ids)
            tokens = text[len(ids) : len(ids) + min(each.most, self.most)]
            wrong = torch.rand(len(tokens), generator=self.source) >= self.alpha
            made = [(token + 1) % self.vocabulary if bad else token for token, bad in zip(tokens, wrong.tolist(), strict=True)]
            found.append(Draft(tuple(made), (None,) * len(made)))
        return found

    def close(self, state: None) -> None: ...


def native(name: str, model: Any, device: str, table: Table, shape: Shape) -> NativeArm:
    """`model` is copied: a step consumes its model."""
    group = min(GROUP, shape.hidden)
    kind: Any = "auto" if name == "bfloat16" else name
    return NativeArm(
        f"native {name}", GraphStep(packed(copy.deepcopy(model), device=device, weights=kind, group=group), table=table)
    )


def others(name: str, model: Any) -> StockArm:
    """What other libraries make of a copy of `model`. Raises whatever they raise where they do not run."""
    made = copy.deepcopy(model)
    library, _, kind = name.partition(" ")
    if library == "bitsandbytes":
        _bitsandbytes(made, kind)
        return StockArm(name, made, is_compiled=False)
    from torchao import quantization

    configs: dict[str, Callable[[], Any]] = {
        "int4": lambda: quantization.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"),
        "int8": quantization.Int8WeightOnlyConfig,
        "float8": lambda: quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow()),
    }
    quantization.quantize_(made.model, configs[kind]())  # the head stays as it is, as in the native arms
    return StockArm(name, made, is_compiled=True)


def _bitsandbytes(model: Any, kind: str) -> None:
    import importlib

    layers: Any = importlib.import_module("bitsandbytes.nn")
    for name, module in list(model.model.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        weight, size = module.weight.data, (module.in_features, module.out_features)
        if kind == "nf4":
            made = layers.Linear4bit(*size, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
            made.weight = layers.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
        else:
            made = layers.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
            made.weight = layers.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        model.model.set_submodule(name, made.to(weight.device))


def freed() -> None:
    """Gives back what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
