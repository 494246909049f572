"""A step of a Llama-like decoder on a GPU: few launches a layer, captured as a graph for every number of rows and tokens.

A replay takes nothing from the host but tokens, lengths and, where they changed, page tables. Where a row's likeliest token will
be asked next, its step is launched before the host has seen the token, so that the GPU does not wait for Python.

On CPU tensors the same steps run by the kernels' twins, uncaptured: that is how they are tested without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Several
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from infopt.errors import InputError
from infopt.kernels.gpu.attention import Where, prompt
from infopt.kernels.gpu.choices import Table
from infopt.kernels.gpu.ops import TWINS, Ops, kernels
from infopt.kernels.gpu.products import Behind, Feed
from infopt.kernels.gpu.weight import Weight
from infopt.runtime.captured import Captured, Capturing, Found, Pending
from infopt.runtime.device_pages import DevicePages
from infopt.runtime.device_tuning import tune
from infopt.runtime.device_weights import BEYOND, DeviceModel, Layer
from infopt.runtime.pages import PAGE, Budget, OverPages
from infopt.runtime.steps import Output, Run

#: Tokens of a run up to which it goes into a graph; longer ones are prompts, which are run as they come.
FEW = 17
assert FEW <= BEYOND
#: Tokens of a prompt that go through the layers together.
CHUNK = 4096
#: Rows of a graph: the first of these that has room, the rest of it being nobody's.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
#: Tokens of a row in a graph, likewise: reading the weights takes as long for one more.
TOKENS = (1, 2, 3, 5, 7, 9, 13, FEW)
#: A graph that is there is taken for a quarter of its rows and more: making another takes as long as a hundred steps.
LEAST = 4


class GraphStep(OverPages):
    """`kv`: float32, float16, bfloat16 or auto, the model's own; `budget`: of its bytes. `table`: which way products take; what
    it does not know is found by timing. `ops`: None takes the kernels on a GPU and their twins on a CPU.
    """

    name = "graph"
    pages: DevicePages

    def __init__(
        self, model: DeviceModel, *, kv: str = "auto", budget: Budget | None = None, table: Table | None = None,
        ops: Ops | None = None,
    ) -> None:  # fmt: skip
        self.model, self.device = model, model.outside.head.data.device
        self.is_captured = self.goes_ahead = self.device.type == "cuda" and ops is not TWINS
        self.vocabulary, self.context = model.outside.head.rows, model.context
        self.table = table or Table(is_timed=False)
        self.ops = ops or (kernels(self.table, _multiprocessors(self.device)) if self.is_captured else TWINS)
        self.budget = budget or Budget()
        self.kv_dtype = model.dtype if kv == "auto" else getattr(torch, kv)
        heads = model.layers[0].heads
        self.pages = DevicePages(
            len(model.layers), heads.kv_heads, heads.head_dim, self.kv_dtype, self.device, self.budget, on_move=self._forget
        )
        self.capturing = Capturing(self.device) if self.is_captured else None
        self.captures, self.capture_s = 0, 0.0
        self._calls: dict[tuple[int, int], Captured] = {}
        self._pending: Pending | None = None
        self._forget()

    def first_layers(self, count: int) -> GraphStep:
        """The same model without its later layers: it shares weights and budget, and keeps keys and values of its own.

        Raises InputError for a count that the model does not have.
        """
        if not 0 < count < self.layer_count:
            raise InputError(f"{count} early layers; allowed: 1 … {self.layer_count - 1}")
        kept = str(self.kv_dtype).removeprefix("torch.")
        return GraphStep(self.model.first(count), kv=kept, budget=self.budget, table=self.table, ops=self.ops)

    @property
    def layer_count(self) -> int:
        return len(self.model.layers)

    @property
    def about(self) -> str:
        """How it runs, in a line for reports."""
        head, kinds = self.model.outside.head.kind, dict.fromkeys(w.kind for layer in self.model.layers for w in layer.weights)
        where = torch.cuda.get_device_name(self.device) if self.is_captured else "by their twins on the CPU"
        kept = str(self.kv_dtype).removeprefix("torch.")
        return f"whole steps as CUDA graphs, {where}; weights {', '.join(kinds)}, head {head}, keys and values {kept}"

    @property
    def remarks(self) -> tuple[str, ...]:
        """Graphs, and whether launches overlap in them."""
        if self.capturing is None or not self.captures:
            return ()
        made = f"{self.captures} graphs in {self.capture_s:.1f} s: kernels compiled, ways of products timed, steps captured"
        return made, self.capturing.about_overlap

    @property
    def arithmetic(self) -> str:
        """What products are computed in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def weights_bytes(self) -> int:
        return self.model.weights_bytes

    @property
    def read_bytes(self) -> int:
        """What a step of one token reads of the weights."""
        return self.model.read_bytes

    @torch.inference_mode()
    def run(self, runs: Several[Run], want_logits: bool = True) -> Output:
        """Prompts go one after the other; all others together, in one graph as wide as the longest of them."""
        ahead, self._pending = self._pending, None  # nothing else may be asked for, nor anything launched, while it stands
        for run in runs:
            total = run.sequence.length + len(run.ids)
            if total > self.context:
                raise InputError(f"{total} tokens; the model's context allows {self.context}")
            self.pages.reserve(run.sequence, total)
        few = [index for index, run in enumerate(runs) if len(run.ids) <= FEW]
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = [(torch.empty(0),) * 3] * len(runs)
        with self._device():
            for index, run in enumerate(runs):
                if len(run.ids) > FEW:
                    parts[index] = self._prompt(run)
            if len(few) == len(runs) <= ROWS[-1]:
                parts = self._together(runs, want_logits, ahead)
            else:
                for start in range(0, len(few), ROWS[-1]):
                    chosen = few[start : start + ROWS[-1]]
                    made = self._together([replace(runs[index], goes_on=False) for index in chosen], want_logits, None)
                    for index, (tokens, leads, logits) in zip(chosen, made, strict=True):
                        parts[index] = tokens, leads, logits.clone()  # the next part may replay the same graph
        return self._output(runs, parts, want_logits)

    def _output(self, runs: Several[Run], parts: Several[tuple[torch.Tensor, ...]], want_logits: bool) -> Output:
        told = [part[1].tolist() for part in parts]
        for run, leads in zip(runs, told, strict=True):
            if any(lead != lead for lead in leads):
                self._refuse_nan(run)
        for run in runs:
            run.sequence.length += len(run.ids)
        tokens = [token for part in parts for token in part[0].tolist()]
        # A copy: a graph leaves its own where the next replay writes.
        logits = torch.cat([part[2] for part in parts]) if want_logits else None
        return Output(tokens, [lead for leads in told for lead in leads], logits)

    def _device(self) -> AbstractContextManager[Any]:
        """Kernels go to the current device, whatever tensors they are given."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    # Prompts

    def _prompt(self, run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        table, length = run.sequence.table.to(self.device), run.sequence.length
        ids = torch.tensor(run.ids, device=self.device)
        answers = []
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            feed = self._layers(
                part,
                lambda qkv, layer, cache: prompt(qkv, cache, table, length + start, layer.heads),  # noqa: B023 - called at once
            )
            if run.all_logits or start + CHUNK >= len(ids):
                answers.append(self._answers(feed if run.all_logits else feed.last(1)))
        if len(answers) == 1:
            return answers[0]
        tokens, leads, logits = (torch.cat(part) for part in zip(*answers, strict=True))
        return tokens, leads, logits

    def _layers(self, ids: torch.Tensor, attend: Any) -> Feed:
        """`ids` [rows] through all layers, to what the head is fed. `attend(qkv, layer, its pages)`."""
        outside, layers = self.model.outside, self.model.layers
        x = torch.nn.functional.embedding(ids, outside.embedding)
        x = x * outside.scale if outside.scale != 1 else x
        feed = Feed(self.ops.norm(x, layers[0].input_norm, self.model.epsilon))
        following = [*(layer.input_norm for layer in layers[1:]), outside.final_norm]
        for layer, cache, gain in zip(layers, self.pages.layers, following, strict=True):
            qkv, _ = self.ops.product(feed, layer.qkv)
            mixed = Feed(attend(qkv, layer, cache))
            x, feed = self._added(mixed, layer.output, layer.attention_out_norm, x, layer.feed_norm)
            _, fed = self.ops.product(feed, layer.gate_up, Behind(self.model.activation))
            x, feed = self._added(fed, layer.down, layer.feed_out_norm, x, gain)
        return feed

    def _added(
        self, feed: Feed, weight: Weight, own: torch.Tensor | None, residual: torch.Tensor, gain: torch.Tensor
    ) -> tuple[torch.Tensor, Feed]:
        """A product, normed where it has a norm of its `own`, plus `residual`; and the same as it feeds the next, whose norm has
        `gain`."""
        epsilon, norm = self.model.epsilon, self.ops.norm
        if self.model.fuses_norms:
            return self.ops.product(feed, weight, Behind(residual=residual, gain=gain, epsilon=epsilon))
        if own is None:
            x, _ = self.ops.product(feed, weight, Behind(residual=residual))
        else:
            x = norm(self.ops.product(feed, weight)[0], own, epsilon, residual)
        return x, Feed(norm(x, gain, epsilon))

    def _answers(self, feed: Feed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Likeliest token, its lead, and logits float32 [rows, vocabulary] of what the head is fed."""
        logits, _ = self.ops.product(feed, self.model.outside.head, Behind(dtype=torch.float32))
        return *self.ops.likeliest(logits), logits

    # Steps of few tokens

    def _together(
        self, runs: Several[Run], want_logits: bool, ahead: Pending | None
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """`ahead`: what was launched before it was asked for."""
        longest = next(tokens for tokens in TOKENS if tokens >= max(len(run.ids) for run in runs))
        is_plain = longest == 1 and not want_logits
        found = ahead.found if ahead is not None and is_plain and ahead.fits(runs) else None
        if found is None:
            call = self._call(len(runs), longest)
            self._fill(call, runs, longest)
            self._launch(call)
            found = self._read(call)
        if self.goes_ahead and is_plain and all(run.goes_on for run in runs):
            self._pending = self._ahead(found.call, runs)
        tokens, leads = found.arrived()
        if self._pending is not None:
            self._pending.fed = tokens[: len(runs)].tolist()
        answers = []
        for index, run in enumerate(runs):
            start, end = index * longest, index * longest + len(run.ids)
            part = slice(start if run.all_logits else end - 1, end)
            answers.append((tokens[part], leads[part], found.call.logits[part]))
        return answers

    def _read(self, call: Captured) -> Found:
        """What a step that was launched finds, on its way to the host."""
        if not self.is_captured:
            return Found(call, call.tokens.clone(), call.leads.clone())
        tokens, leads = (torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in (call.tokens, call.leads))
        tokens.copy_(call.tokens, non_blocking=True)
        leads.copy_(call.leads, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Found(call, tokens, leads, done)

    def _ahead(self, call: Captured, runs: Several[Run]) -> Pending | None:
        """Launches the step that follows, fed with what the last one found, which the graph has put where it reads."""
        lengths = [run.sequence.length + len(run.ids) for run in runs]
        if max(lengths) >= self.context:
            return None
        try:
            for run, length in zip(runs, lengths, strict=True):
                self.pages.reserve(run.sequence, length + 1)
        except InputError:
            return None  # whoever asks for that step is told
        if self._calls.get((len(call.where.lengths), 1)) is not call:
            return None  # room was made, and nothing is where it was
        self._tables(call, runs)
        self._launch(call)
        return Pending(self._read(call), [run.sequence for run in runs], lengths)

    def _fill(self, call: Captured, runs: Several[Run], longest: int) -> None:
        rows = len(call.where.lengths)
        empty = [0] * (rows - len(runs))
        ids = [[*run.ids, *[0] * (longest - len(run.ids))] for run in runs] + [[0] * longest] * len(empty)
        numbers = [
            [*(run.sequence.length for run in runs), *empty], [*(len(run.ids) for run in runs), *(1 for _ in empty)]
        ]  # fmt: skip
        call.ids.copy_(self._sent(torch.tensor(ids, dtype=torch.int32).flatten()), non_blocking=True)
        lengths, counts = self._sent(torch.tensor(numbers, dtype=torch.int32))
        call.where.lengths.copy_(lengths, non_blocking=True)
        call.where.counts.copy_(counts, non_blocking=True)
        self._tables(call, runs)
        for index in range(len(runs), rows):
            if call.known[index] is not None:  # it must not write to pages of a row that was here
                call.where.tables[index].zero_()
                call.known[index] = None

    def _sent(self, part: torch.Tensor) -> torch.Tensor:
        return part.pin_memory() if self.is_captured else part

    def _tables(self, call: Captured, runs: Several[Run]) -> None:
        for index, run in enumerate(runs):
            table = run.sequence.table
            if call.known[index] is not table:
                call.where.tables[index, : len(table)].copy_(self._sent(table), non_blocking=True)
                call.known[index] = table

    def prepare(self, rows: int, most: int) -> None:
        """Makes the graphs that `rows` sequences with up to `most` new tokens each will need."""
        widest = next(tokens for tokens in TOKENS if tokens >= min(most, FEW))
        with self._device():
            for tokens in TOKENS if self.is_captured else ():
                if tokens <= widest:
                    self._sized(_size(min(rows, ROWS[-1])), tokens)

    def _call(self, rows: int, tokens: int) -> Captured:
        known = [each for each, width in self._calls if width == tokens and rows <= each <= LEAST * rows]
        return self._sized(min(known) if known else _size(rows), tokens)

    def _sized(self, size: int, tokens: int) -> Captured:
        if (size, tokens) not in self._calls:
            begin = time.perf_counter()
            self._calls[size, tokens] = self._made(size, tokens)
            self.capture_s += time.perf_counter() - begin
            self.captures += 1
        return self._calls[size, tokens]

    def _made(self, rows: int, tokens: int) -> Captured:
        def numbers(*shape: int, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=self.device)

        pages = -(-self.context // PAGE)
        where = Where(numbers(rows, pages), numbers(rows), numbers(rows, fill=1))
        count = rows * tokens
        call = Captured(
            numbers(count), where, numbers(count), torch.zeros(count, device=self.device),
            torch.empty(0), known=[None] * rows,
        )  # fmt: skip
        if self.capturing is not None:
            tune(self.model, count, self.table)
            self.capturing.make(call, lambda call: self._compute(call, tokens))
        return call

    def _compute(self, call: Captured, tokens: int) -> None:
        feed = self._layers(call.ids, lambda qkv, layer, cache: self.ops.attention(qkv, cache, call.where, layer.heads))
        found, leads, logits = self._answers(feed)
        call.tokens.copy_(found)
        call.leads.copy_(leads)
        call.logits = logits  # of a graph: where each replay leaves them
        if tokens == 1:
            call.ids.copy_(found)
            call.where.lengths.add_(1)

    def rehearse(self, rows: int, tokens: int) -> None:
        """Computes a step as it would be captured, of sequences that nobody has."""
        self._compute(self._made(rows, tokens), tokens)

    def _launch(self, call: Captured) -> None:
        if call.graph is not None:
            call.graph.replay()
        else:
            self._compute(call, len(call.ids) // len(call.where.lengths))

    def _forget(self) -> None:
        self._calls.clear()
        self._pending = None
        if self.capturing is not None:
            self.capturing.forget()

    # What is not finite

    def _refuse_nan(self, run: Run) -> None:
        """Its tokens once more, layer by layer."""
        table, length, place = run.sequence.table.to(self.device), run.sequence.length, [0]
        bad: list[int] = []

        def attend(qkv: torch.Tensor, layer: Layer, cache: Any) -> torch.Tensor:
            if not bad and not qkv.isfinite().all():
                bad.append(place[0])
            place[0] += 1
            return prompt(qkv, cache, table, length, layer.heads)

        feed = self._layers(torch.tensor(run.ids, device=self.device), attend)
        last = self.layer_count - 1 if not feed.x.isfinite().all() else None
        where = f"layer {bad[0]}" if bad else "the output head" if last is None else f"layer {last}"
        raise InputError(
            f"a logit is not finite; {where} is where it first shows", hint="the model may be damaged, or too large for float16"
        )


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _size(rows: int) -> int:
    return next(each for each in ROWS if each >= rows)
