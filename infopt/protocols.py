"""What siblings may know of each other. Torch-free; every layer above may import it.

Engines turn requests into traces, measures turn traces into figures, techniques ask a context for services; none of
them imports another. `pipeline` wires them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from infopt.sections import Choose

Progress = Callable[[str], None]
"""Called with one short line of what is happening; never with a newline."""


@dataclass(frozen=True)
class Request:
    """One prompt to answer. `ignore_eos`: run to exactly `max_new_tokens`, as timing needs."""

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    ignore_eos: bool = True
    seed: int = 0
    #: Seconds after the window's start at which the request should be sent; None for closed loops.
    scheduled_s: float | None = None


@dataclass(frozen=True)
class Trace:
    """What one `Engine.generate` call did. Seconds count from the submission of the call.

    `emission_s[i]` is when step i's tokens were on the host, `emission_tokens[i]` how many tokens each row got in it
    (speculation emits several). `output_ids` holds one tuple per request, prompt excluded. `reused_tokens`: of each row's
    prompt, those that a prefix cache held and no forward pass consumed. `accepted_at[i]`: how many drafts had an i-th token,
    and how many of these were kept that far. `mean_logprobs`: of each row's tokens, in nats, as
    the model gave them before temperature and filters; None where `Sampling.choose` asked for none, or the engine has none.
    """

    output_ids: tuple[tuple[int, ...], ...]
    emission_s: tuple[float, ...]
    emission_tokens: tuple[int, ...]
    prefill_s: float | None = None
    drafted: int | None = None
    accepted: int | None = None
    reused_tokens: int | None = None
    accepted_at: tuple[tuple[int, int], ...] | None = None
    mean_logprobs: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. `candidates`: parallel samples from one prompt."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    candidates: int = 1
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one are ruled out."""
    repetition_penalty: float = 1.0
    """Above 1: what was seen, prompt included, becomes less likely."""
    choose: Choose | None = None
    """How one of the candidates is chosen by whoever reads them; engines then hand out `Trace.mean_logprobs`."""
    answer: str | None = None
    """Under `majority`: the regular expression whose last match counts."""


class Engine(Protocol):
    """Runs one open model. Requests given in one call form one static batch.

    `notes`: how it runs the model, and why so, a line each; they may grow with the first call.
    """

    name: str
    notes: tuple[str, ...]

    def generate(self, requests: Sequence[Request]) -> Trace: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Machine:
    """Measured peaks of the device at hand; None where nothing was measured. Never a data-sheet value."""

    device: str
    read_bytes_per_s: float | None
    flops: dict[str, float] = field(default_factory=dict)
    """Matrix-multiply rate by dtype name, e.g. {"float32": 1.6e11}."""
    last_level_cache_bytes: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Shapes:
    """A model as bytes and operations, read from its config without its weights. Counts are elements, not bytes."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    linear: dict[str, tuple[int, int]]
    """Every `nn.Linear` of the decoder blocks: dotted name → (out_features, in_features)."""
    head: tuple[int, int] | None
    """The output head's (vocabulary, hidden), tied or not."""
    is_head_tied: bool
    embedding: int
    """Elements of the input embedding (read by row: not part of the decode traffic unless tied to the head)."""
    other: int
    """All other parameters: norms, biases."""
    biased: tuple[str, ...] = ()
    """Which of `linear` add a bias, by the last parts of their names (`q_proj`)."""

    @property
    def linear_parameters(self) -> int:
        return sum(out * inner for out, inner in self.linear.values())

    @property
    def head_parameters(self) -> int:
        return self.head[0] * self.head[1] if self.head else 0

    @property
    def parameters(self) -> int:
        """Stored parameters: a tied head is counted once."""
        return self.linear_parameters + self.embedding + self.other + (0 if self.is_head_tied else self.head_parameters)

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """2 · layers · kv heads · head dim · bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_element


@dataclass(frozen=True)
class Prediction:
    """What a step is expected to cost, before any weight is read."""

    weights_bytes: int
    """Stored weights after the step."""
    peak_bytes: int
    """Highest memory while the step runs, model included."""
    seconds: float | None
    """None when this machine's peaks are unknown."""


@dataclass(frozen=True)
class Context:
    """The services a technique may ask for while it is applied."""

    seed: int = 0
    device: str = "cpu"
    calibration_ids: tuple[tuple[int, ...], ...] = ()
    """Token ids of the recipe's calibration text, one tuple per sample."""
    progress: Progress = lambda line: None
    unfinished: Path | None = None
    """A folder for what lets an interrupted step go on; None keeps nothing."""
    open_model: Callable[[str | None], Any] | None = None
    """Opens another model by its reference, or, given None, the one that the recipe started from, as a bundle of its own."""
    open_tokenizer: Callable[[str | None], Any] | None = None
    """Its tokenizer alone."""
    open_engine: Callable[[str | None, Sampling], Engine] | None = None
    """The model in the fastest engine that runs it here."""
