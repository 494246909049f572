"""What native.py holds the native engine against: stock transformers, llama.cpp and vLLM; and how each is timed."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interop_llama

from infopt.backends import environments
from infopt.engines.transformers import TransformersEngine
from infopt.export import export
from infopt.model.cache import cache_dir
from infopt.protocols import Request
from infopt.runtime.loop import Answer, Ask, Loop, Told
from infopt.runtime.steps import Run
from infopt.settings import LoadOptions

HERE = Path(__file__).parent


class Llama:
    """A GGUF file in llama.cpp, in a process of its own that waits between requests."""

    def __init__(self, kind: str) -> None:
        path = cache_dir() / "benchmarks" / f"demo-{kind}.gguf"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            export("demo", "gguf", kind, path, LoadOptions(device="cpu"))
        self.process = _waiting([str(interop_llama.client()), str(path)])

    def time(self, ids: list[int], count: int) -> tuple[float, float]:
        """Seconds for the prompt, and for `count` tokens."""
        first, rest = map(float, _asked(self.process, f"time {count} {' '.join(map(str, ids))}").split())
        return first, rest


class Vllm:
    """vLLM with bfloat16 weights, in its own environment (`infopt env install vllm`)."""

    def __init__(self, folder: Path) -> None:
        python = environments.ENVIRONMENTS["vllm"].interpreter
        self.process = _waiting([str(python), str(HERE / "native_vllm.py"), str(folder)])
        assert self.process.stdout
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError("vLLM did not start")

    @staticmethod
    def is_installed() -> bool:
        return environments.ENVIRONMENTS["vllm"].is_installed()

    def decode(self, prompts: list[list[int]], new: int) -> float:
        """Tokens per second of all rows together, the first of each left out."""
        first, whole = map(float, _asked(self.process, json.dumps({"prompts": prompts, "new": new})).split())
        return len(prompts) * (new - 1) / (whole - first)


def _waiting(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _asked(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"{process.args!r} ended with {process.wait()}")
    return answer


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def stock_decode(engine: TransformersEngine, prompt: list[int], new: int) -> tuple[float, tuple[int, ...]]:
    """Tokens per second, and the tokens."""
    trace = engine.generate([Request("0", tuple(prompt), new)])
    return (len(trace.emission_s) - 1) / (trace.emission_s[-1] - trace.emission_s[0]), trace.output_ids[0]


def stock_batch(engine: TransformersEngine, prompts: list[list[int]]) -> float:
    trace = engine.generate([Request(str(row), tuple(prompt), 16) for row, prompt in enumerate(prompts)])
    return len(prompts) * (len(trace.emission_s) - 1) / (trace.emission_s[-1] - trace.emission_s[0])


def stock_prefill(engine: TransformersEngine, prompt: list[int]) -> float:
    return engine.generate([Request("0", tuple(prompt), 1)]).emission_s[0]


def native_decode(step: Any, prompts: list[list[int]], new: int) -> tuple[float, list[int]]:
    """Tokens per second of all rows together, the first of each left out; and the first row's tokens."""
    times: list[float] = []
    answers = Loop(step).run([Ask(tuple(prompt), new) for prompt in prompts], lambda told, _: times.append(told.seconds))
    return len(prompts) * (len(times) - 1) / (times[-1] - times[0]), answers[0].ids


def token_seconds_beside_reads(step: Any, prompt: list[int], new: int) -> tuple[list[float], list[float]]:
    """Seconds of each token, the prompt's first; and seconds per byte of reading all weights once, which follows every token."""
    took: list[float] = []
    per_byte: list[float] = []
    since = time.perf_counter()

    def after_a_token(told: Told, answers: list[Answer]) -> None:
        nonlocal since
        took.append(time.perf_counter() - since)
        per_byte.append(1 / step.read_bytes_per_s())
        since = time.perf_counter()

    Loop(step).run([Ask(tuple(prompt), new)], after_a_token)
    return took, per_byte


def divergence(step: Any, prompt: list[int], plain: list[int], drafted: list[int]) -> list[dict[str, float]]:
    """Where two greedy texts part, if they do: by how much the likeliest token was ahead, and how far the logits of a stretch
    that is computed at once lie from those of its tokens one by one, twice, since both of two logits may move."""
    at = next((i for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b), None)
    if at is None:
        return []
    ids = [*prompt, *plain[:at]]
    sequence = step.open()
    step.run([Run(sequence, ids[:-9])], want_logits=False)
    together = step.run([Run(sequence, ids[-9:], all_logits=True)])
    margin, logits = together.margins[-1], together.logits.clone()
    step.cut(sequence, len(ids) - 9)
    singly = [step.run([Run(sequence, [token])]).logits[0].clone() for token in ids[-9:]]
    step.close(sequence)
    noise = max(float((a - b).abs().max()) for a, b in zip(logits, singly, strict=True))
    return [{"token": at, "margin": margin, "noise": 2 * noise}]


def fill(step: Any, prompt: list[int]) -> None:
    sequence = step.open()
    step.run([Run(sequence, prompt)], want_logits=False)
    step.close(sequence)


def verify(step: Any, prompt: list[int], count: int) -> list[tuple[float, float]]:
    """(bytes per second of a read of all weights, seconds of a step of `count` tokens over those of one), which take turns."""
    sequence = step.open()
    step.run([Run(sequence, prompt)], want_logits=False)
    found = []
    for _ in range(15):
        taken = []
        for tokens in (1, count):
            run = Run(sequence, prompt[:tokens], all_logits=True)
            taken.append(seconds(lambda run=run: step.run([run], want_logits=False)))  # type: ignore[misc]
            step.cut(sequence, len(prompt))
        found.append((float(step.read_bytes_per_s()), taken[1] / taken[0]))
    step.close(sequence)
    return found
