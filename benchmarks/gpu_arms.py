"""What h200.py lets take turns: the native engine in each kind of weights, stock transformers, torchao and bitsandbytes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import torch
from gpu_models import GROUP, Shape

from infopt.engines.transformers import TransformersEngine
from infopt.kernels.gpu.choices import Table
from infopt.model.bundle import Bundle
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
    """Seconds until each row's first token, from there to the last, and of a step in the middle; tokens of the first row; tokens
    a step of it brought."""

    prefill_s: float
    decode_s: float
    step_s: float
    ids: tuple[int, ...]
    tokens_per_step: float


class Arm(Protocol):
    name: str
    kind: str | None
    """Of the native engine's weights; None for others, whose launches nobody counts."""
    weights_bytes: int
    """What a step of one token reads."""

    def run(self, prompts: Sequence[Sequence[int]], new: int) -> Timed: ...


class NativeArm:
    """`drafter`: what proposes tokens; `length`: of its drafts."""

    def __init__(
        self, name: str, step: GraphStep, kind: str | None = None, drafter: Drafter | None = None, length: Any = None
    ) -> None:
        self.name, self.step, self.kind, self.weights_bytes = name, step, kind, step.read_bytes
        self.loop = Loop(step, drafter, length)

    def run(self, prompts: Sequence[Sequence[int]], new: int) -> Timed:
        told: list[Told] = []
        answers = self.loop.run([Ask(tuple(ids), new) for ids in prompts], lambda each, _: told.append(each))
        steps = sum(each.tokens[0] > 0 for each in told[1:])
        return _timed([each.seconds for each in told], answers[0].ids, (len(answers[0].ids) - 1) / max(1, steps))


def _timed(emission_s: Sequence[float], ids: Sequence[int], tokens_per_step: float = 1.0) -> Timed:
    gaps = [later - earlier for earlier, later in pairwise(emission_s)]
    first, last = emission_s[0], emission_s[-1]
    return Timed(first, last - first, median(gaps) if gaps else 0.0, tuple(ids), tokens_per_step)


class StockArm:
    """A transformers module behind its own `generate`."""

    def __init__(self, name: str, model: Any, is_compiled: bool) -> None:
        self.name, self.model = name, model
        self.kind: str | None = None
        gathered = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
        nobody: Any = None
        self.weights_bytes = Bundle(model, nobody, name).resident_bytes() + _scales_bytes(model) - gathered
        self.engine = TransformersEngine(
            model, pad_token_id=0, cache="static" if is_compiled else "dynamic", compile="auto" if is_compiled else "never"
        )

    def run(self, prompts: Sequence[Sequence[int]], new: int) -> Timed:
        requests = [Request(str(index), tuple(ids), new) for index, ids in enumerate(prompts)]
        trace = self.engine.generate(requests)
        return _timed(trace.emission_s, trace.output_ids[0])


def _scales_bytes(model: Any) -> int:
    """What bitsandbytes keeps beside its 4-bit weights."""
    states = (getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules())
    return sum(int(state.absmax.nbytes) for state in states if state is not None)


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
            text = next((text for text in self.texts if text[: len(ids)] == ids), [])
            tokens = text[len(ids) : len(ids) + min(each.most, self.most)]
            wrong = torch.rand(len(tokens), generator=self.source) >= self.alpha
            made = [(token + 1) % self.vocabulary if bad else token for token, bad in zip(tokens, wrong.tolist(), strict=True)]
            found.append(Draft(tuple(made), (None,) * len(made)))
        return found

    def close(self, state: None) -> None: ...


def native(name: str, model: Any, device: str, table: Table, shape: Shape) -> NativeArm:
    """`model` is copied: a step consumes its model."""
    kind: Any = "auto" if name == "bfloat16" else name
    made = packed(copy.deepcopy(model), device=device, weights=kind, group=min(GROUP, shape.hidden))
    return NativeArm(f"native {name}", GraphStep(made, table=table), name)


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
            made = layers.Linear4bit(*size, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
            made.weight = layers.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
        else:
            made = layers.Linear8bitLt(*size, bias=False, has_fp16_weights=False, device="meta")
            made.weight = layers.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        model.model.set_submodule(name, made.to(weight.device))


def freed() -> None:
    """Gives back what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.inference_mode()
def agreement(model: Any, prompt: Sequence[int], text: Sequence[int]) -> dict[str, float]:
    """How much of a text a transformers model would have said at each place, told what came before, and by how much (in logits)
    its own word led where it would not: weights are random, so that words are at times as likely as one another."""
    ids = torch.tensor([[*prompt, *text]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    said = torch.tensor(list(text), device=model.device)
    best = logits.max(-1)
    leads = (best.values - logits.gather(1, said[:, None])[:, 0])[best.indices != said]
    return {"share": float((best.indices == said).float().mean()), "largest_lead": float(leads.max()) if len(leads) else 0.0}
