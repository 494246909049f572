"""A model opened the native way: by whole steps where the kernels run it, else with swapped linear layers.

It stands in a bundle where transformers' module stood: what asks a module for logits gets this one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch

from infopt.errors import InputError
from infopt.protocols import Progress
from infopt.runtime import architecture
from infopt.runtime.decoder import Unfit
from infopt.runtime.pages import Budget
from infopt.runtime.steps import Run
from infopt.runtime.swapped_step import SwappedStep
from infopt.runtime.weights import Wanted
from infopt.runtime.whole_step import WholeStep

Way = Literal["auto", "whole", "swapped"]
if TYPE_CHECKING:
    from infopt.runtime.graph_step import GraphStep

    AnyStep = WholeStep | SwappedStep | GraphStep


@dataclass(frozen=True)
class Settings:
    """`weights`, `head`: what floating-point weights become; `kv`: float32, float16, or auto, which is float16 on a CPU and the
    model's own on a GPU; `way`: auto takes the first that fits; `tuned`: the folder that keeps which kernels are fastest.

    `beside`: the step of a model that this one drafts for, with whose threads it takes turns and whose budget it shares.
    """

    threads: int
    weights: Wanted = "auto"
    head: Wanted = "auto"
    kv: str = "auto"
    way: Way = "auto"
    most_kv_bytes: float = 1 << 40
    beside: AnyStep | None = None
    device: str = "cpu"
    tuned: Path | None = None


class NativeModel:
    """Called like transformers' module, it gives logits; `step` is what the native engine drives.

    `notes` say which way that is, and why no faster one was taken. `drafts`: steps of models that draft for it, by name.
    """

    def __init__(self, model: Any, step: AnyStep, unfit: tuple[str, ...] = ()) -> None:
        self.step, self.notes = step, (f"native engine: {step.about}", *unfit)
        self.drafts: dict[str, AnyStep] = {}
        self.config, self.generation_config = model.config, model.generation_config
        self.device, self.dtype = getattr(step, "device", torch.device("cpu")), model.dtype

    @property
    def resident_bytes(self) -> int:
        """Of the weights held, those of drafting models included."""
        return self.step.weights_bytes + sum(step.weights_bytes for step in self.drafts.values())

    def early(self, layers: int | None) -> WholeStep | GraphStep:
        """The first `layers` of it with its head, a quarter of them when None. Raises InputError where it has no such part."""
        if isinstance(self.step, SwappedStep):
            raise InputError("draft: self needs whole steps", hint="speculative: {draft: prompt_lookup}")
        return self.step.first_layers(max(1, self.step.layer_count // 4) if layers is None else layers)

    @torch.inference_mode()
    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        """`logits` float32 [rows, tokens, vocabulary]; 0 where the mask is."""
        step: Any = self.step
        found = torch.zeros(*input_ids.shape, step.vocabulary, device=input_ids.device)
        for row, ids in enumerate(input_ids):
            seen = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask[row].bool()
            sequence = step.open()
            try:
                logits = step.run([Run(sequence, ids[seen].tolist(), all_logits=True)]).logits
                found[row, seen] = logits.to(found.device)
            finally:
                step.close(sequence)
        return SimpleNamespace(logits=found)


def open_native(model: Any, settings: Settings, progress: Progress = lambda line: None) -> NativeModel:
    """Consumes a transformers model. Raises Unfit when no native way runs it, with the reasons; it is whole then."""
    if settings.device.startswith("cuda"):
        return NativeModel(model, _graph_step(model, settings, progress))
    if settings.device != "cpu":
        raise Unfit(f"it runs on CPUs and on CUDA GPUs, not on {settings.device}")
    if "float8" in (settings.weights, settings.head):
        raise Unfit("engine.weights: float8 is multiplied by GPUs alone")
    reasons: list[str] = []
    budget = settings.beside.budget if settings.beside else Budget(settings.most_kv_bytes)
    threads, weights, head = settings.threads, settings.weights, settings.head
    if settings.way in ("auto", "whole"):
        try:
            progress("checking the whole-step kernels on a small model of this class")
            architecture.check(
                model, lambda small: WholeStep(small, threads=threads, weights="float32", head="float32", kv="float32")
            )
            step = WholeStep(
                model, threads=threads, weights=weights, head=head, kv="float16" if settings.kv == "auto" else settings.kv,
                budget=budget, beside=settings.beside if isinstance(settings.beside, WholeStep) else None,
            )  # fmt: skip
            return NativeModel(model, step)
        except Unfit as error:
            reasons.append(f"whole steps do not fit: {error}")
    if settings.way in ("auto", "swapped"):
        try:
            progress("checking swapped layers on a small model of this class")
            architecture.check(model, lambda small: SwappedStep(small, threads=threads, weights="float32", head="float32"))
            swapped = SwappedStep(model, threads=threads, weights=weights, head=head, budget=budget)
            return NativeModel(model, swapped, tuple(reasons))
        except Unfit as error:
            reasons.append(f"swapped layers do not fit: {error}")
    raise Unfit("; ".join(reasons))


def _graph_step(model: Any, settings: Settings, progress: Progress) -> GraphStep:
    """Raises Unfit."""
    if settings.way == "swapped":
        raise Unfit("engine.way: swapped is of CPUs alone")
    try:
        from infopt.kernels.gpu.choices import device_table
        from infopt.runtime.device_weights import packed
        from infopt.runtime.graph_step import GraphStep
    except ImportError as error:
        raise Unfit(f"its GPU kernels need Triton, which every CUDA build of torch brings: {error}") from None
    if "float8" in (settings.weights, settings.head) and torch.cuda.get_device_capability(settings.device) < (8, 9):
        raise Unfit("this GPU has no float8")
    progress("checking the GPU kernels on a small model of this class")
    device = settings.device
    architecture.check(model, lambda small: GraphStep(packed(small, device=device)))
    return GraphStep(
        packed(model, device=device, weights=settings.weights, head=settings.head), kv=settings.kv,
        budget=settings.beside.budget if settings.beside else Budget(settings.most_kv_bytes),
        table=device_table(settings.tuned) if settings.tuned else None,
    )  # fmt: skip
