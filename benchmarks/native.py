"""How fast is the native engine, beside stock transformers and llama.cpp, and how near to what memory allows?

    python benchmarks/native.py [--rounds 5] [--out FOLDER] [--skip-llama]

All arms take turns in one process, round after round, on the same text: 128 tokens in, 128 out, greedy. Before each native
arm the machine reads the same packed weights once: the limit of a step is those bytes, and its keys and values, over that
rate. Ratios are medians over rounds of one round's two figures, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import interop_llama
import torch

from infopt import __version__
from infopt.data import texts
from infopt.engines.transformers import TransformersEngine
from infopt.export import export
from infopt.kernels import library
from infopt.model import load, reference
from infopt.model.cache import cache_dir
from infopt.model.plan import LoadPlan
from infopt.protocols import Request, Sampling
from infopt.runtime.draft_length import DraftLength
from infopt.runtime.drafts import PromptLookup
from infopt.runtime.loop import Ask, Loop
from infopt.runtime.native_model import NativeModel, Settings, open_native
from infopt.runtime.steps import Run
from infopt.settings import LoadOptions

THREADS = 2
PROMPT, NEW, BATCH = 128, 128, 8
#: Reads of the weights beside a measurement: one alone meets sleeping threads.
READS = 5
KINDS = ("bfloat16", "int8", "int4")
GGUF = ("f16", "q8_0", "q4_0", "q4_1")
#: (what, arm, arm it is held against, ratio of tokens per second that is wanted)
RATIOS = [
    ("bf16 weights against stock fp32", "bfloat16", "stock fp32", 6.0),
    ("bf16 weights against llama.cpp F16", "bfloat16", "llama.cpp f16", 1.1),
    ("int8 against stock fp32", "int8", "stock fp32", 10.0),
    ("int8 against llama.cpp Q8_0", "int8", "llama.cpp q8_0", 1.4),
    ("int4, int8 head, against stock fp32", "int4", "stock fp32", 15.0),
    ("int4 against llama.cpp Q4_0", "int4", "llama.cpp q4_0", 1.7),
    ("int4 against llama.cpp Q4_1", "int4", "llama.cpp q4_1", 1.7),
    ("swapped int8 against stock fp32", "swapped int8", "stock fp32", 3.0),
    ("batch 8, int8, against stock bf16", "batch 8, int8", "batch 8, stock bf16", 3.0),
    ("prefill 512, int8, against llama.cpp's best", "prefill 512, int8", "prefill 512, llama.cpp", 2.0),
    ("prefill 512, int8, against stock bf16", "prefill 512, int8", "prefill 512, stock bf16", 1.3),
]
SHARES = [("bfloat16", 0.85), ("int8", 0.80), ("int4", 0.80), ("4,096 tokens, int8", 0.60)]


class Llama:
    """A GGUF file in llama.cpp, in a process of its own that waits between requests."""

    def __init__(self, kind: str) -> None:
        path = cache_dir() / "benchmarks" / f"demo-{kind}.gguf"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            export("demo", "gguf", kind, path, LoadOptions(device="cpu"))
        self.process = subprocess.Popen(
            [str(interop_llama.client()), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def time(self, ids: list[int], count: int) -> tuple[float, float]:
        """Seconds for the prompt, and for `count` tokens."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"time {count} {' '.join(map(str, ids))}\n")
        self.process.stdin.flush()
        first, rest = map(float, self.process.stdout.readline().split())
        return first, rest


class Bench:
    def __init__(self, with_llama: bool) -> None:
        torch.set_num_threads(THREADS)
        plan = LoadPlan(dtype="float32", device="cpu")
        bundle = load.load(reference.parse("demo"), plan)
        self.ids: list[int] = bundle.tokenizer(texts.read_text("bundled", "evaluation")[:60000], verbose=False)["input_ids"]
        self.code: list[int] = bundle.tokenizer(CODE, verbose=False)["input_ids"]
        self.stock = {
            "fp32": TransformersEngine(bundle.model),
            "bf16": TransformersEngine(load.load(reference.parse("demo"), replace(plan, dtype="bfloat16")).model),
        }
        self.native = {kind: self._open(Settings(THREADS, weights=kind)) for kind in KINDS}  # type: ignore[arg-type]
        self.swapped = self._open(Settings(THREADS, weights="int8", head="int8", way="swapped"))
        self.llama = {kind: Llama(kind) for kind in GGUF} if with_llama else {}
        self.samples: dict[str, list[float]] = {}
        self.limits: dict[str, list[float]] = {}

    def _open(self, settings: Settings) -> NativeModel:
        return open_native(load.load(reference.parse("demo"), LoadPlan(dtype="float32", device="cpu")).model, settings)

    def note(self, arm: str, per_s: float) -> None:
        self.samples.setdefault(arm, []).append(per_s)

    def round(self, number: int) -> None:
        """Every arm once, on the next stretch of text."""
        start = (number * 997) % (len(self.ids) - 5000)
        prompt, long = self.ids[start : start + PROMPT], self.ids[start : start + 512]
        for name, engine in self.stock.items():
            self.note(f"stock {name}", _stock_decode(engine, prompt))
        for kind, llama in self.llama.items():
            self.note(f"llama.cpp {kind}", NEW / llama.time(prompt, NEW)[1])
        for kind, model in self.native.items():
            self._native(kind, model, prompt)
        self.note("swapped int8", _native_decode(self.swapped.step, [prompt]))
        self.note(f"batch {BATCH}, stock bf16", _stock_batch(self.stock["bf16"], prompt))
        self.note(f"batch {BATCH}, int8", _native_decode(self.native["int8"].step, [prompt] * BATCH))
        self.note("prefill 512, stock bf16", 512 / _stock_prefill(self.stock["bf16"], long))
        if self.llama:
            self.note("prefill 512, llama.cpp", 512 / min(llama.time(long, 1)[0] for llama in self.llama.values()))
        self.note("prefill 512, int8", 512 / _seconds(lambda: _fill(self.native["int8"].step, long)))
        self._longer(self.native["int8"].step, start)
        self._drafts(start)
        self._candidates(long)

    def _native(self, kind: str, model: NativeModel, prompt: list[int]) -> None:
        step: Any = model.step
        rate = max(step.read_bytes_per_s() for _ in range(READS))
        per_s = _native_decode(step, [prompt])
        self.note(kind, per_s)
        needed = step.read_bytes + step.kv_bytes(PROMPT + NEW / 2)
        self.limits.setdefault(kind, []).append(per_s * needed / rate)
        for count in (4, 8):
            self.note(f"verify {count} over 1, {kind}", _verify(step, prompt, count))

    def _longer(self, step: Any, start: int) -> None:
        ids = (self.ids[start:] + self.ids)[:4096]
        rate = max(step.read_bytes_per_s() for _ in range(READS))
        per_s = _native_decode(step, [ids], new=48)
        self.note("4,096 tokens, int8", per_s)
        self.limits.setdefault("4,096 tokens, int8", []).append(per_s * (step.read_bytes + step.kv_bytes(4096 + 24)) / rate)

    def _drafts(self, start: int) -> None:
        """Prompt lookup over plain decoding: on code that is to be repeated, and on prose."""
        step: Any = self.native["int8"].step
        for name, prompt in (("code", self.code), ("prose", self.ids[start : start + PROMPT])):
            asks = [Ask(tuple(prompt), NEW)]
            steps: list[int] = []
            plain = _seconds(partial(Loop(step).run, asks))
            listen = lambda told, _, to=steps: to.append(told.tokens[0])  # noqa: E731
            drafted = _seconds(partial(Loop(step, PromptLookup(), DraftLength(12)).run, asks, listen))
            self.note(f"prompt lookup over plain, {name}", plain / drafted)
            self.note(f"tokens per step, {name}", NEW / len(steps))

    def _candidates(self, prompt: list[int]) -> None:
        step: Any = self.native["int8"].step
        one = _seconds(lambda: Loop(step).run([Ask(tuple(prompt), NEW, Sampling(0.8))]))
        many = _seconds(lambda: Loop(step).run([Ask(tuple(prompt), NEW, Sampling(0.8, candidates=8))]))
        self.note("8 candidates over 1, int8", many / one)


#: What is copied: a function that the continuation repeats with small changes.
CODE = ("def area_of_square(side):\n    if side < 0:\n        raise ValueError('negative')\n    return side * side\n\n\n") * 4


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _stock_decode(engine: TransformersEngine, prompt: list[int]) -> float:
    trace = engine.generate([Request("0", tuple(prompt), 32)])
    return (len(trace.emission_s) - 1) / (trace.emission_s[-1] - trace.emission_s[0])


def _stock_batch(engine: TransformersEngine, prompt: list[int]) -> float:
    trace = engine.generate([Request(str(row), tuple(prompt), 16) for row in range(BATCH)])
    return BATCH * (len(trace.emission_s) - 1) / (trace.emission_s[-1] - trace.emission_s[0])


def _stock_prefill(engine: TransformersEngine, prompt: list[int]) -> float:
    return engine.generate([Request("0", tuple(prompt), 1)]).emission_s[0]


def _native_decode(step: Any, prompts: list[list[int]], new: int = NEW) -> float:
    """Tokens per second of all rows together, the first of each left out."""
    times: list[float] = []
    Loop(step).run([Ask(tuple(prompt), new) for prompt in prompts], lambda told, _: times.append(told.seconds))
    return len(prompts) * (len(times) - 1) / (times[-1] - times[0])


def _fill(step: Any, prompt: list[int]) -> None:
    sequence = step.open()
    step.run([Run(sequence, prompt)], want_logits=False)
    step.close(sequence)


def _verify(step: Any, prompt: list[int], count: int) -> float:
    """Seconds of a step of `count` tokens over those of one."""
    sequence = step.open()
    step.run([Run(sequence, prompt)], want_logits=False)

    def median(tokens: int) -> float:
        found = []
        for _ in range(15):
            found.append(_seconds(lambda: step.run([Run(sequence, prompt[:tokens], all_logits=True)], want_logits=False)))
            step.cut(sequence, len(prompt))
        return statistics.median(found)

    one, many = median(1), median(count)
    step.close(sequence)
    return many / one


def bars(bench: Bench) -> Iterator[dict[str, Any]]:
    """What is wanted, what was found, smallest and largest over rounds."""

    def bar(what: str, found: list[float], wanted: float, *, at_most: bool = False) -> dict[str, Any]:
        middle = statistics.median(found)
        met = middle <= wanted if at_most else middle >= wanted
        return {
            "what": what,
            "found": middle,
            "low": min(found),
            "high": max(found),
            "wanted": wanted,
            "at_most": at_most,
            "met": met,
        }

    known = bench.samples
    for what, arm, beside, wanted in RATIOS:
        if arm in known and beside in known:
            yield bar(what, [a / b for a, b in zip(known[arm], known[beside], strict=True)], wanted)
    for arm, wanted in SHARES:
        yield bar(f"share of the bandwidth limit, {arm}", bench.limits[arm], wanted)
    yield bar("verify 4 over 1, int8", known["verify 4 over 1, int8"], 1.2, at_most=True)
    yield bar("verify 8 over 1, int8", known["verify 8 over 1, int8"], 1.6, at_most=True)
    yield bar("prompt lookup over plain, code", known["prompt lookup over plain, code"], 2.0)
    shares = [a / b for a, b in zip(known["prompt lookup over plain, code"], known["tokens per step, code"], strict=True)]
    yield bar("its speed-up over its tokens per step", shares, 0.85)
    yield bar("prompt lookup over plain, prose", known["prompt lookup over plain, prose"], 0.97)
    yield bar("8 candidates over 1, int8", known["8 candidates over 1, int8"], 2.5, at_most=True)


def markdown(document: dict[str, Any]) -> str:
    lines = [
        "# The native engine on a CPU",
        "",
        f"infopt {document['infopt']}, {document['threads']} threads, {document['isa']}; demo model, {PROMPT} tokens in, "
        f"{NEW} out, greedy; {document['rounds']} rounds in which all arms take turns. Medians, smallest and largest.",
        "",
        "| tokens per second | median | rounds |",
        "|---|---:|---|",
        *(
            f"| {arm} | {statistics.median(found):.1f} | {min(found):.1f} … {max(found):.1f} |"
            for arm, found in document["samples"].items()
            if " over " not in arm and not arm.startswith("tokens per step")
        ),
        "",
        "| bar | found | rounds | wanted | |",
        "|---|---:|---|---|---|",
        *(
            f"| {bar['what']} | {bar['found']:.2f} | {bar['low']:.2f} … {bar['high']:.2f} "
            f"| {'≤' if bar['at_most'] else '≥'} {bar['wanted']:g} | {'met' if bar['met'] else 'short'} |"
            for bar in document["bars"]
        ),
    ]
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-llama", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    bench = Bench(not asked.skip_llama)
    bench.round(0)  # warms everything up; not counted
    bench.samples.clear()
    bench.limits.clear()
    for number in range(1, asked.rounds + 1):
        bench.round(number)
        print(f"round {number} of {asked.rounds}", file=sys.stderr)
    document = {
        "schema_version": 1, "infopt": __version__, "threads": THREADS, "isa": library.load().infopt_isa().decode(),
        "rounds": asked.rounds, "samples": bench.samples, "shares_of_limit": bench.limits, "bars": list(bars(bench)),
    }  # fmt: skip
    print(markdown(document))
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "native.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (asked.out / "native.md").write_text(markdown(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
