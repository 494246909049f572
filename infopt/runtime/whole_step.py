"""A step of a Llama-like decoder in one call into the kernel library.

Weights are packed from transformers' modules, which are not needed afterwards. What the kernels compute is checked against a
small random model of the same class before that (`architecture`).
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence as Several
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from infopt.errors import InputError
from infopt.kernels import library
from infopt.kernels.arena import Arena, give_back
from infopt.kernels.library import CBatch, CLayer, CMatrix, CModel, Pointers
from infopt.kernels.packed import Packed
from infopt.runtime.decoder import Block, Decoder, Unfit, describe
from infopt.runtime.pages import PAGE, Budget, HostPages, OverPages
from infopt.runtime.steps import PROMPT, Output, Run
from infopt.runtime.weights import Wanted, head_kind, joined, release, require

#: Tokens that go through the layers together at most: enough that weights are read from the cache, few enough to stay there.
CHUNK = 128
#: Shapes of steps that are kept ready.
MOST_CALLS = 256
NORMS = ("input_norm", "query_norm", "key_norm", "attention_out_norm", "feed_norm", "feed_out_norm")


class WholeStep(OverPages):
    """Consumes the model's weights. `weights`: what floating-point weights become; `head`: the same for the output head, auto
    being int8 beside integers.

    `kv`: float32 or float16; `budget`: of its bytes. `beside`: a step on whose threads this one runs too, never both at a time.
    Raises Unfit for a model that the kernels do not run, MissingNeedError without the library.
    """

    name = "whole"

    def __init__(
        self, model: Any, *, threads: int, weights: Wanted = "auto", head: Wanted = "auto", kv: str = "float16",
        budget: Budget | None = None, beside: WholeStep | None = None,
    ) -> None:  # fmt: skip
        self._library = library.load()
        decoder = describe(model)
        self.vocabulary, self.context, self.threads = decoder.vocabulary, decoder.context, threads
        self._kept: list[Any] = []  # what the C structures point to
        self._arena = Arena()
        self.packed: list[Packed] = []
        self._model = self._described(decoder, weights, head, kv)
        give_back()
        model = ctypes.byref(self._model)
        made = self._library.infopt_open_beside(model, beside._engine) if beside else self._library.infopt_open(model, threads)
        self._start(ctypes.c_void_p(made), budget or Budget())

    def _start(self, engine: ctypes.c_void_p, budget: Budget) -> None:
        self._engine, self.budget = engine, budget
        self.pages = HostPages(int(self._library.infopt_page_bytes(ctypes.byref(self._model))), budget)
        self._logits = torch.empty(0)
        self._calls: dict[tuple[int, int, int], _Call] = {}

    def first_layers(self, count: int) -> WholeStep:
        """The same model without its later layers: it shares weights, threads and budget, and keeps keys and values of its own.

        Raises InputError for a count that the model does not have.
        """
        if not 0 < count < self._model.layers:
            raise InputError(f"{count} early layers; allowed: 1 … {self._model.layers - 1}")
        early: WholeStep = copy.copy(self)
        early._engine = ctypes.c_void_p()  # it must not close ours
        early._model = CModel.from_buffer_copy(self._model)
        early._model.layers = count
        early.packed = [*self.packed[: 4 * count], *self.packed[4 * self._model.layers :]]  # four to a layer, then the others
        opened = self._library.infopt_open_beside(ctypes.byref(early._model), self._engine)
        early._start(ctypes.c_void_p(opened), self.budget)
        return early

    def close_engine(self) -> None:
        """Ends the threads. The step cannot be used afterwards."""
        if self._engine:
            self._library.infopt_close(self._engine)
            self._engine = ctypes.c_void_p()

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self.close_engine()

    @property
    def layer_count(self) -> int:
        return int(self._model.layers)

    @property
    def about(self) -> str:
        """How it runs, in a line for reports."""
        isa, kv = self._library.infopt_isa().decode(), "float16" if self._model.kv_is_half else "float32"
        weights = ", ".join(dict.fromkeys(packed.kind for packed in self.packed[: 4 * self.layer_count]))
        return f"whole steps, {isa}, {self.threads} threads; weights {weights}, head {self.packed[-1].kind}, keys and values {kv}"

    @property
    def arithmetic(self) -> str:
        """What products are computed in."""
        return "int8" if any(packed.scales is not None for packed in self.packed) else "float32"

    @property
    def weights_bytes(self) -> int:
        """Of all packed matrices."""
        return sum(packed.nbytes for packed in self.packed)

    @property
    def read_bytes(self) -> int:
        """What a step of one token reads of the weights: all but the embedding, of which it reads a row."""
        embedding = ctypes.addressof(self._model.embedding.contents)
        is_tied = embedding == ctypes.addressof(self._model.head.contents)
        return self.weights_bytes - (0 if is_tied else self.packed[-2].nbytes)

    def prepare(self, rows: int, most: int) -> None:
        """Nothing has to be."""

    def run(self, runs: Several[Run], want_logits: bool = True) -> Output:
        """Long runs go in chunks; their last chunk goes with the other runs.

        What is computed as a prompt goes by itself, so that no text depends on what else is in its batch.
        """
        rest = []
        for run in runs:
            ids = list(run.ids)
            while len(ids) > CHUNK and not run.all_logits:
                self._step([replace(run, ids=ids[:CHUNK])], 0, want_logits=False)
                ids = ids[CHUNK:]
            rest.append(replace(run, ids=ids))
        groups = _groups(rest)
        if len(groups) == 1:
            return self._step(rest, sum(_outputs(run) for run in rest), want_logits)
        found = _Found(rest)
        for group in groups:
            chosen = [rest[index] for index in group]
            found.take(group, self._step(chosen, sum(_outputs(run) for run in chosen), want_logits))
        return found.output

    def _step(self, runs: Several[Run], outputs: int, want_logits: bool, *, check: bool = False) -> Output:
        tokens = 0
        for run in runs:
            length, count = run.sequence.length, len(run.ids)
            if length + count > self.context:
                raise InputError(f"{length + count} tokens; the model's context allows {self.context}")
            self.pages.reserve(run.sequence, length + count)
            tokens += count
        shape = (tokens, len(runs), outputs)
        if len(self._calls) > MOST_CALLS:
            self._calls.clear()
        call = self._calls.get(shape) or self._calls.setdefault(shape, _Call(*shape))
        call.fill(runs)
        if want_logits and outputs and self._logits.shape[0] < outputs:
            self._logits = torch.empty(outputs, -(-self.vocabulary // 16) * 16)
        batch = call.batch
        batch.logits = self._logits.data_ptr() if want_logits and outputs else None
        batch.check, batch.bad_layer = int(check), -1
        batch.is_prompt = all(_is_prompt(run) for run in runs)
        self._library.infopt_step(self._engine, call.pointer)
        margins = call.margins[:outputs]
        if any(margin != margin for margin in margins):
            self._refuse_nan(runs, outputs, batch, check)
        for run in runs:
            run.sequence.length += len(run.ids)
        return Output(call.largest[:outputs], margins, self._logits[:outputs, : self.vocabulary] if want_logits else None)

    def _refuse_nan(self, runs: Several[Run], outputs: int, batch: CBatch, check: bool) -> None:
        """The same step once more, looking for the layer."""
        if not check:
            self._step(runs, outputs, want_logits=False, check=True)
        where = "the output head" if batch.bad_layer >= self._model.layers else f"layer {batch.bad_layer}"
        raise InputError(
            f"a logit is not finite; {where} is where it first shows", hint="the model may be damaged, or too large for float16"
        )

    def read_bytes_per_s(self) -> float:
        """Reads all packed weights once, with all threads: what the machine's memory gives at this moment."""
        spans = self._arena.spans
        seconds = sum(self._library.infopt_read_seconds(self._engine, span.data_ptr(), span.nbytes) for span in spans)
        return float(sum(span.nbytes for span in spans) / seconds)

    # Packing

    def _described(self, decoder: Decoder, weights: Wanted, head: Wanted, kv: str) -> CModel:
        for layer in (*(layer for block in decoder.blocks for layer in block.linears), decoder.embedding, decoder.head):
            require(layer)  # all of them, before any is consumed
        layers = (CLayer * len(decoder.blocks))()
        names = list(dict.fromkeys(block.rotary for block in decoder.blocks))
        for to, block in zip(layers, decoder.blocks, strict=True):
            self._fill(to, block, names, weights)
        head = head_kind(head, weights, self.packed)
        table = self._packed([decoder.embedding], head if decoder.is_tied else "auto")  # as it is, where it is no head
        out = table if decoder.is_tied else self._packed([decoder.head], head)
        tables = [decoder.tables(name, decoder.context) for name in names]
        cos, sin = ((ctypes.c_void_p * len(names))(*(self._pointer(pair[side]) for pair in tables)) for side in (0, 1))
        self._kept += [layers, cos, sin, table, out]
        return CModel(
            len(layers), decoder.hidden, decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.intermediate,
            decoder.vocabulary, decoder.activation, decoder.rotary_dim, PAGE, int(kv == "float16"), decoder.norm_epsilon,
            decoder.attention_scale, decoder.embedding_scale, layers, ctypes.pointer(table),
            ctypes.pointer(out), self._pointer(decoder.final_norm), ctypes.cast(cos, Pointers), ctypes.cast(sin, Pointers),
        )  # fmt: skip

    def _fill(self, to: CLayer, block: Block, tables: list[str], weights: Wanted) -> None:
        to.qkv = self._packed(block.qkv, weights)
        to.output = self._packed([block.output], weights)
        to.gate_up = self._packed(block.gate_up, weights, in_pairs=True)
        to.down = self._packed([block.down], weights)
        for name in NORMS:
            setattr(to, name, self._pointer(getattr(block, name)))
        to.window, to.rotary = block.window, tables.index(block.rotary)

    def _packed(self, layers: Several[nn.Module], wanted: Wanted, *, in_pairs: bool = False) -> CMatrix:
        """Layers that read the same input, packed; their own weights are gone."""
        packed = joined(layers, wanted, in_pairs=in_pairs).moved(self._arena.keep)
        release(layers)
        self.packed.append(packed)
        return library.matrix(packed)

    def _pointer(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept = tensor.detach().float().clone(memory_format=torch.contiguous_format)  # a view would keep the model's file mapped
        self._kept.append(kept)
        return kept.data_ptr()


def _is_prompt(run: Run) -> bool:
    return len(run.ids) >= PROMPT and not run.all_logits


def _outputs(run: Run) -> int:
    return len(run.ids) if run.all_logits else 1


def _groups(runs: Several[Run]) -> list[list[int]]:
    """Which runs go together: prompts by themselves, `CHUNK` tokens of them at most, and then all others."""
    groups: list[list[int]] = []
    tokens = 0
    for index in (index for index, run in enumerate(runs) if _is_prompt(run)):
        if not groups or tokens + len(runs[index].ids) > CHUNK:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += len(runs[index].ids)
    others = [index for index, run in enumerate(runs) if not _is_prompt(run)]
    return [*groups, others] if others else groups


class _Found:
    """What several steps found, put into the order of all runs."""

    def __init__(self, runs: Several[Run]) -> None:
        self.tokens: list[list[int]] = [[] for _ in runs]
        self.margins: list[list[float]] = [[] for _ in runs]
        self.logits: list[torch.Tensor] = [torch.empty(0) for _ in runs]
        self.counts = [_outputs(run) for run in runs]
        self.has_logits = False

    def take(self, group: Several[int], found: Output) -> None:
        start = 0
        for index in group:
            part = slice(start, start := start + self.counts[index])
            self.tokens[index], self.margins[index] = found.tokens[part], found.margins[part]
            if found.logits is not None:
                self.logits[index], self.has_logits = found.logits[part].clone(), True  # the next step writes over them

    @property
    def output(self) -> Output:
        logits = torch.cat(self.logits) if self.has_logits else None
        return Output(list(chain.from_iterable(self.tokens)), list(chain.from_iterable(self.margins)), logits)


class _Call:
    """What a step of this shape hands to the library, made once: building it anew would cost as much as a layer."""

    def __init__(self, tokens: int, runs: int, outputs: int) -> None:
        ints, floats = ctypes.c_int32, ctypes.c_float
        self.ids, self.starts, self.positions = (ints * tokens)(), (ints * (runs + 1))(), (ints * runs)()
        self.tables, self.wanted = (Pointers * runs)(), (ints * max(1, outputs))()
        self.largest, self.margins = (ints * max(1, outputs))(), (floats * max(1, outputs))()
        self.batch = CBatch(
            tokens, runs, outputs, 0, 0, self.ids, self.starts, self.positions, self.tables, self.wanted, None, self.largest,
            self.margins, -1,
        )  # fmt: skip
        self.pointer = ctypes.byref(self.batch)

    def fill(self, runs: Several[Run]) -> None:
        position = wanted = 0
        for index, run in enumerate(runs):
            end = position + len(run.ids)
            self.ids[position:end] = list(run.ids)
            self.positions[index], self.starts[index + 1] = run.sequence.length, end
            self.tables[index] = ctypes.cast(run.sequence.table, Pointers)
            if len(self.wanted) > wanted:  # chunks of a prompt want none
                chosen: list[Any] = list(range(position, end)) if run.all_logits else [end - 1]
                self.wanted[wanted : wanted + len(chosen)] = chosen
                wanted += len(chosen)
            position = end


__all__ = ["Unfit", "WholeStep"]
