"""A step of any decoder-only model in transformers' own modules, with our linear layers in them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infopt.errors import InputError
from infopt.runtime.decoder import Unfit
from infopt.runtime.kernel_linear import swap
from infopt.runtime.pages import Budget
from infopt.runtime.steps import PROMPT, Output, Room, Run
from infopt.runtime.weights import Wanted

#: Tokens up to which all work between linear layers is too small to share.
FEW = 16


@dataclass
class Cached:
    """A sequence: transformers' cache, and how many positions of it count."""

    cache: Any
    length: int = 0


class SwappedStep:
    """Sequences run one after the other, each with a cache of its own. Raises Unfit for a model whose state is no list of
    keys and values: it could not be cut back."""

    name = "swapped"
    remarks: tuple[str, ...] = ()

    def __init__(
        self, model: Any, *, threads: int, weights: Wanted = "auto", head: Wanted = "auto", budget: Budget | None = None
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        others = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
        if others or getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
            raise Unfit(f"its layers keep another state than keys and values ({', '.join(others) or type(model).__name__})")
        self.packed, self._products = swap(model, threads, weights, head)
        self.threads = threads
        if not self.packed:
            raise Unfit("it has no linear layers")
        self.model, self.vocabulary, self.budget = model, config.vocab_size, budget or Budget()
        context = getattr(config, "max_position_embeddings", None) or 0
        self.context = context if context > 0 else 1 << 30
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._kv_bytes = 2 * config.num_hidden_layers * heads * dim * model.dtype.itemsize

    @property
    def about(self) -> str:
        """How it runs, in a line for reports."""
        kinds = ", ".join(dict.fromkeys(packed.kind for packed in self.packed))
        return f"transformers' modules, {len(self.packed)} linear layers swapped; weights {kinds}"

    @property
    def arithmetic(self) -> str:
        """What products are computed in."""
        return "int8" if any(packed.scales is not None for packed in self.packed) else "float32"

    @property
    def weights_bytes(self) -> int:
        """Packed layers, and what stays in the model beside them."""
        return self.read_bytes + sum(int(tensor.nbytes) for tensor in self.model.parameters())

    @property
    def read_bytes(self) -> int:
        return sum(packed.nbytes for packed in self.packed)

    def kv_bytes(self, length: int) -> float:
        return float(self._kv_bytes) * length

    def open(self) -> Cached:
        from infopt.runtime.growing_cache import growing_cache

        return Cached(growing_cache())

    def length(self, sequence: Cached) -> int:
        return sequence.length

    def require(self, rooms: Sequence[Room], beside: float = 0) -> float:
        """A fork copies all that it has; a cache that is full grows by half of itself, of which it then has both."""
        needed = sum(self.kv_bytes(room.tokens) * room.sequences for room in rooms)
        self.budget.require(needed + max((self.kv_bytes(room.tokens) for room in rooms), default=0), rooms, beside)
        return needed

    def prepare(self, rows: int, most: int) -> None:
        """Nothing has to be."""

    def cut(self, sequence: Cached, length: int) -> None:
        if length < sequence.length:
            sequence.cache.crop(length - sequence.length)
            sequence.length = length

    def fork(self, sequence: Cached) -> Cached:
        return Cached(copy.deepcopy(sequence.cache), sequence.length)

    def close(self, sequence: Cached) -> None:
        sequence.cache = None

    @torch.inference_mode()
    def run(self, runs: Sequence[Run], want_logits: bool = True) -> Output:
        """Few tokens leave torch a single thread: a second one of its own would wait awake on the core that ours need."""
        before = torch.get_num_threads()
        torch.set_num_threads(1 if sum(len(run.ids) for run in runs) <= FEW else self.threads)
        try:
            return self._run(runs, want_logits)
        finally:
            torch.set_num_threads(before)

    def _run(self, runs: Sequence[Run], want_logits: bool) -> Output:
        rows = []
        for run in runs:
            total = run.sequence.length + len(run.ids)
            if total > self.context:
                raise InputError(f"{total} tokens; the model's context allows {self.context}")
            self._products.is_prompt = len(run.ids) >= PROMPT and not run.all_logits
            found = self.model(
                input_ids=torch.tensor([list(run.ids)]), past_key_values=run.sequence.cache, use_cache=True,
                logits_to_keep=0 if run.all_logits else 1,
            )  # fmt: skip
            run.sequence.cache, run.sequence.length = found.past_key_values, total
            rows.append(found.logits[0].float() if run.all_logits else found.logits[0, -1:].float())
        logits = torch.cat(rows)
        if not logits.isfinite().all():
            raise InputError("a logit is not finite", hint="the model may be damaged, or too large for float16")
        best = logits.topk(2)
        margins = (best.values[:, 0] - best.values[:, 1]).tolist()
        return Output(best.indices[:, 0].tolist(), margins, logits if want_logits else None)
