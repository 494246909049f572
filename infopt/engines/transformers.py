"""Stock `model.generate`: the reference that every other engine is compared with.

A streamer notes when each step's tokens reach the host: `generate` hands it the prompt first, then the tokens of every
step, several at once when a draft was accepted. `generate` itself is not changed; what is hooked is unhooked in `finally`.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from infopt.errors import InputError
from infopt.protocols import Request, Sampling, Trace

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, GenerationConfig, PreTrainedModel

Now = Callable[[], float]
PROMPT_LOOKUP = 10


class TransformersEngine:
    """One open model behind `generate`. Requests of one call are left-padded into one static batch.

    `cache`: "dynamic" grows, "static" is allocated in full at the start of each call. `prefix` keeps the last request's
    KV and reuses its longest common token prefix (batch 1). `draft`: prompt_lookup, tokens from the text itself, up to
    `draft_tokens` per step, 10 when None (batch 1). `compile`: "auto" leaves it to transformers, which compiles decode
    steps on CUDA with a static cache. Of the model's own generation config only the special tokens count: sampling is
    `sampling` alone.
    Raises InputError for settings that do not go together.
    """

    name = "transformers"
    notes: tuple[str, ...]

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        pad_token_id: int | None = None,
        sampling: Sampling | None = None,
        cache: Literal["dynamic", "static"] = "dynamic",
        prefix: bool = False,
        draft: str | None = None,
        draft_tokens: int | None = None,
        compile: Literal["never", "auto"] = "never",
        notes: tuple[str, ...] = (),
        now: Now = time.perf_counter,
    ) -> None:
        self.notes = notes or ("stock generate of transformers",)
        self.model: Any = model  # `generate` comes from a mixin that its type does not show
        self.sampling = sampling or Sampling()
        if draft not in (None, "prompt_lookup"):
            raise InputError(f"draft {draft!r}; allowed here: prompt_lookup", hint="engine: {name: native}")
        prompt_lookup = (PROMPT_LOOKUP if draft_tokens is None else draft_tokens) if draft else None
        self._cache_kind, self._prompt_lookup, self._compile, self._now = cache, prompt_lookup, compile, now
        _check_settings(model, self.sampling, cache, prefix, prompt_lookup)
        self._prefix = _PrefixCache(model) if prefix else None
        self._eos = _token_ids(model.generation_config.eos_token_id)
        known = [pad_token_id, model.generation_config.pad_token_id, *self._eos, 0]
        self._pad = next(token for token in known if token is not None)
        self._context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def generate(self, requests: Sequence[Request]) -> Trace:
        """Answers the requests. Rows come in request order, each request's `sampling.candidates` rows together.

        The first request's seed serves the whole batch. Raises InputError for requests that cannot form one batch.
        """
        import torch

        self._check(requests)
        first = requests[0]
        device = self.model.device
        _synchronise(device)
        start = self._now()
        with ExitStack() as stack:
            timer = stack.enter_context(_PrefillTimer(self.model, self._now))
            streamer = _Stopwatch(self._now, start, timer.stop)
            config = self._generation_config(first.max_new_tokens, first.ignore_eos)
            # `generate` fills what is None in its config from the model's own, which would bring the end token back.
            stack.enter_context(_replaced(self.model, "generation_config", config))
            drafts = stack.enter_context(_recorded_drafts(self.model)) if self._prompt_lookup else None
            if self.sampling.temperature > 0:
                stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
                torch.manual_seed(first.seed)
            cache, reused = self._prefix.take(first.prompt_ids) if self._prefix else (None, None)
            if cache is not None and self._prompt_lookup:
                stack.enter_context(_sliced_first_pass(self.model, cache))
            ids, mask = _left_pad([request.prompt_ids for request in requests], self._pad, device)
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer, past_key_values=cache
            )
        if self._prefix and cache is not None:
            self._prefix.keep(cache, output[0].tolist())
        if self._compile == "never":
            # Left alone, one long call would make the static cache of every later short call as long.
            self.model.__dict__.pop("_previous_max_cache_length", None)
        rows = output[:, ids.shape[1] :].tolist()
        return replace(self._trace(rows, first, streamer, timer.seconds(), drafts), reused_tokens=reused)

    def close(self) -> None:
        """Gives the model and its caches up."""
        import torch

        del self.model
        self._prefix = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _trace(
        self, rows: list[list[int]], first: Request, streamer: _Stopwatch, prefill_s: float | None, drafts: list[int] | None
    ) -> Trace:
        accepted = None
        if drafts is not None:
            accepted = sum(min(count - 1, draft) for count, draft in zip(streamer.counts, drafts, strict=True))
        ends = () if first.ignore_eos else self._eos
        return Trace(
            output_ids=tuple(_until_end(row[: first.max_new_tokens], ends) for row in rows),
            emission_s=tuple(streamer.times),
            emission_tokens=tuple(streamer.counts),
            prefill_s=prefill_s,
            drafted=None if drafts is None else sum(drafts),
            accepted=accepted,
        )

    def _generation_config(self, new_tokens: int, ignore_eos: bool) -> GenerationConfig:
        from transformers import GenerationConfig

        options: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "pad_token_id": self._pad,
            "bos_token_id": self.model.generation_config.bos_token_id,
            "eos_token_id": None if ignore_eos else list(self._eos) or None,
            "disable_compile": self._compile == "never",
            "num_return_sequences": self.sampling.candidates,
        }
        if self._cache_kind == "static":
            options["cache_implementation"] = "static"
        if self._prompt_lookup:
            options["prompt_lookup_num_tokens"] = self._prompt_lookup
        if self.sampling.repetition_penalty != 1:
            options["repetition_penalty"] = self.sampling.repetition_penalty
        if self.sampling.temperature > 0:
            options |= {
                "do_sample": True,
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "top_k": self.sampling.top_k,
                "min_p": self.sampling.min_p or None,
            }
        else:
            options["do_sample"] = False
        return GenerationConfig(**options)  # type: ignore[no-untyped-call]

    def _check(self, requests: Sequence[Request]) -> None:
        if not requests:
            raise InputError("no requests; a batch needs at least 1")
        if len({(request.max_new_tokens, request.ignore_eos) for request in requests}) > 1:
            raise InputError("requests of one static batch differ in max_new_tokens or ignore_eos; they must be equal")
        if len(requests) > 1 and (self._prefix or self._prompt_lookup):
            what = "the prefix cache" if self._prefix else "prompt lookup"
            raise InputError(f"{what} takes 1 request at a time, found a batch of {len(requests)}", hint="use batch 1")
        for request in requests:
            if not request.prompt_ids or request.max_new_tokens < 1:
                raise InputError(
                    f"request {request.id!r}: {len(request.prompt_ids)} prompt and {request.max_new_tokens} new tokens; "
                    "allowed: 1 or more of each"
                )
            total = len(request.prompt_ids) + request.max_new_tokens
            if self._context and total > self._context:
                raise InputError(
                    f"request {request.id!r}: prompt and answer take {total} tokens; the model's context allows {self._context}",
                    hint="shorten the prompt or lower the number of new tokens",
                )


ENGINE = TransformersEngine


def _check_settings(model: PreTrainedModel, sampling: Sampling, cache: str, prefix: bool, prompt_lookup: int | None) -> None:
    if model.config.is_encoder_decoder:
        raise InputError(f"{type(model).__name__} is an encoder–decoder; the transformers engine runs decoder-only models")
    if prompt_lookup is not None and prompt_lookup < 1:
        raise InputError(f"prompt lookup of {prompt_lookup} tokens; allowed: 1 or more")
    if sampling.candidates < 1 or (sampling.candidates > 1 and sampling.temperature <= 0):
        raise InputError(
            f"{sampling.candidates} candidates at temperature {sampling.temperature}; greedy decoding has exactly 1",
            hint="raise sampling.temperature above 0",
        )
    if cache == "static" and (prefix or prompt_lookup):
        what = "a prefix cache" if prefix else "prompt lookup"
        raise InputError(f"{what} needs the dynamic cache: a static one cannot be cut back", hint="set cache.kind to dynamic")
    if sampling.candidates > 1 and (prefix or prompt_lookup):
        what = "a prefix cache" if prefix else "prompt lookup"
        raise InputError(f"{what} runs one row at a time, found {sampling.candidates} candidates", hint="use 1 candidate")


class _Stopwatch:
    """The streamer: when each step's tokens reached the host, and how many each row got.

    `put` gets the prompt first `[rows, prompt]`, then `[rows]` for one token a row or `[1, tokens]` for accepted drafts;
    the ids are on the host by then.
    """

    def __init__(self, now: Now, start: float, on_first: Callable[[], None]) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []
        self._now, self._start, self._on_first = now, start, on_first
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        self.times.append(self._now() - self._start)
        self.counts.append(value.shape[1] if value.dim() == 2 else 1)
        if len(self.times) == 1:
            self._on_first()

    def end(self) -> None:
        """Nothing is held back."""


class _PrefillTimer:
    """Times every forward pass until `stop`, by CUDA events in the stream or by the host's clock on a CPU."""

    def __init__(self, model: PreTrainedModel, now: Now) -> None:
        self._model, self._now = model, now
        self._on_cuda = model.device.type == "cuda"
        self._marks: list[Any] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _PrefillTimer:
        def mark(*_: Any) -> None:
            self._marks.append(self._mark())

        self._hooks = [self._model.register_forward_pre_hook(mark), self._model.register_forward_hook(mark)]
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def seconds(self) -> float | None:
        """Sum over the passes; None before there was one. Valid once the first token is on the host."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if not pairs:
            return None
        if self._on_cuda:
            return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1e3
        return float(sum(end - begin for begin, end in pairs))

    def _mark(self) -> Any:
        import torch

        if not self._on_cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._model.device))
        return event


class _PrefixCache:
    """The KV of the last request and the ids it belongs to.

    Only layers that keep every position can be cut back to a common prefix: any other cache is refused.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        self._model = model
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
        if others:
            raise InputError(
                f"a prefix cache needs full attention in every layer; {type(model).__name__} has {', '.join(others)}",
                hint="set cache.prefix to false",
            )
        self._cache: DynamicCache | None = None
        self._ids: list[int] = []

    def take(self, prompt: Sequence[int]) -> tuple[DynamicCache, int]:
        """A cache that holds the first tokens of `prompt`, and how many. Until `keep`, nothing is remembered."""
        from transformers import DynamicCache

        cache, self._cache = self._cache, None
        # The last prompt token always runs: its logits start the answer.
        reused = min(_common_prefix(self._ids, prompt), len(prompt) - 1)
        if cache is None or reused == 0:
            return DynamicCache(config=self._model.config.get_text_config(decoder=True)), 0
        cache.crop(reused - cache.get_seq_length())
        return cache, reused

    def keep(self, cache: DynamicCache, ids: Sequence[int]) -> None:
        """Remembers `cache`, whose entries belong to the first of `ids`."""
        self._cache, self._ids = cache, list(ids[: cache.get_seq_length()])


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _until_end(row: list[int], ends: Sequence[int]) -> tuple[int, ...]:
    """The row up to and with its first end token."""
    for index, token in enumerate(row):
        if token in ends:
            return tuple(row[: index + 1])
    return tuple(row)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _left_pad(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `[rows, longest prompt]`."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _synchronise(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of the instance, and restores it or takes it away again."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def _recorded_drafts(model: PreTrainedModel) -> Iterator[list[int] | None]:
    """Collects the number of tokens drafted in each step; None when this transformers hides its drafting."""
    make = getattr(model, "_get_candidate_generator", None)
    if make is None:
        yield None
        return
    lengths: list[int] = []

    def make_recording(*args: Any, **kwargs: Any) -> Any:
        generator = make(*args, **kwargs)
        draft = generator.get_candidates

        def get_candidates(input_ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
            candidates = draft(input_ids, *rest, **options)
            lengths.append(candidates[0].shape[1] - input_ids.shape[1])
            return candidates

        generator.get_candidates = get_candidates
        return generator

    with _replaced(model, "_get_candidate_generator", make_recording):
        yield lengths


@contextmanager
def _sliced_first_pass(model: PreTrainedModel, cache: DynamicCache) -> Iterator[None]:
    """Assisted decoding sends the whole prompt through its first pass, cached or not: cut it to what is not cached."""
    prepare: Any = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepare_rest(input_ids: torch.Tensor, next_sequence_length: int | None = None, **kwargs: Any) -> Any:
        if next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        return prepare(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    with _replaced(model, "prepare_inputs_for_generation", prepare_rest):
        yield
