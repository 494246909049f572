"""How fast is the native engine, beside stock transformers, llama.cpp and vLLM, and how near to what memory allows?

    python benchmarks/native.py [--rounds 5] [--out FOLDER] [--skip llama vllm]

All arms take turns in one process, round after round, on the same text: 128 tokens in, 128 out, greedy; what is compared goes
side by side. The limit of a step is its bytes, weights with keys and values, over the rate at which the machine reads the same
packed weights. On a shared machine that rate doubles and halves within a second, so each token's step is followed by one read,
and a round's share is the median over its tokens. Ratios are medians over rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from native_arms import (
    Llama,
    Vllm,
    divergence,
    fill,
    native_decode,
    seconds,
    stock_batch,
    stock_decode,
    stock_prefill,
    token_seconds_beside_reads,
    verify,
)

from infopt import __version__, optimize, pipeline, recipe, techniques
from infopt.arms import ArmSpec
from infopt.data import texts
from infopt.engines.transformers import TransformersEngine
from infopt.kernels import library
from infopt.measure import environment
from infopt.model import demo, load, reference
from infopt.model.plan import LoadPlan
from infopt.protocols import Sampling
from infopt.quality import fidelity
from infopt.runtime import draft_choice
from infopt.runtime.draft_length import DraftLength
from infopt.runtime.drafts import Drafter, ModelDraft, PromptLookup
from infopt.runtime.loop import Ask, Loop
from infopt.runtime.native_model import NativeModel, Settings, open_native
from infopt.settings import LoadOptions

HERE = Path(__file__).parent
THREADS = 2
PROMPT, NEW, BATCH, LONG = 128, 128, 8, 4096
KINDS = ("bfloat16", "int8", "int4")
#: The GGUF formats that each kind of weights is held against.
BESIDE = {"bfloat16": ("f16",), "int8": ("q8_0",), "int4": ("q4_0", "q4_1")}
WINDOWS, WINDOW = 8, 256
#: Bounds of what memory gives, GB/s, between which figures are put together, and how many make a median.
RATES, FEWEST = (30, 40, 50), 10
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
    ("batch 8, int8, against vLLM bf16", "batch 8, int8", "batch 8, vLLM bf16", 1.2),
    ("prefill 512, int8, against llama.cpp's best", "prefill 512, int8", "prefill 512, llama.cpp", 2.0),
    ("prefill 512, int8, against stock bf16", "prefill 512, int8", "prefill 512, stock bf16", 1.3),
    ("int8 beside a busy process, against alone", "int8, a core busy", "int8", 0.4),
    ("int8 on 2 threads against 1", "int8", "int8, 1 thread", 1.0),
]
SHARES = [("bfloat16", 0.85), ("int8", 0.80), ("int4", 0.80), (f"{LONG} tokens, int8", 0.60)]
#: What is copied: code that the continuation repeats with small changes.
CODE = tuple(
    (f"def {name}_of_square({side}):\n    if {side} < 0:\n        raise ValueError('negative')\n    return {side} * {side}\n\n\n")
    * 4
    for name, side in (("area", "side"), ("size", "width"), ("product", "length"))
)


class Bench:
    def __init__(self, skip: set[str]) -> None:
        torch.set_num_threads(THREADS)
        plan = LoadPlan(dtype="float32", device="cpu")
        bundle = load.load(reference.parse("demo"), plan)
        self.ids: list[int] = bundle.tokenizer(texts.read_text("bundled", "evaluation")[:60000], verbose=False)["input_ids"]
        self.code: list[list[int]] = [bundle.tokenizer(code, verbose=False)["input_ids"] for code in CODE]
        self.stock = {
            "fp32": TransformersEngine(bundle.model),
            "bf16": TransformersEngine(load.load(reference.parse("demo"), replace(plan, dtype="bfloat16")).model),
        }
        self.native = {kind: self._open(Settings(THREADS, weights=kind)) for kind in KINDS}  # type: ignore[arg-type]
        self.single = self._open(Settings(1, weights="int8"))
        self.swapped = self._open(Settings(THREADS, weights="int8", head="int8", way="swapped"))
        self.llama = {} if "llama" in skip else {kind: Llama(kind) for kinds in BESIDE.values() for kind in kinds}
        self.vllm = Vllm(demo.fetch()) if "vllm" not in skip and Vllm.is_installed() else None
        self.samples: dict[str, list[float]] = {}
        self.limits: dict[str, list[float]] = {}
        self.same: dict[str, list[int]] = {}
        self.drafts: list[str] = []
        self.beside: dict[str, list[tuple[float, float]]] = {}
        """Of single tokens and steps: what memory gave beside them, bytes per second, and the figure."""
        self.diverged: list[dict[str, float]] = []
        self.drafted_texts = 0

    def _open(self, settings: Settings) -> NativeModel:
        return open_native(load.load(reference.parse("demo"), LoadPlan(dtype="float32", device="cpu")).model, settings)

    def note(self, arm: str, per_s: float) -> None:
        self.samples.setdefault(arm, []).append(per_s)

    def round(self, number: int) -> None:
        """Every arm once, on the next stretch of text."""
        start = (number * 997) % (len(self.ids) - 5000)
        prompt, long = self.ids[start : start + PROMPT], self.ids[start : start + 512]
        rows = [self.ids[start + row * 61 : start + row * 61 + PROMPT] for row in range(BATCH)]
        per_s, expected = stock_decode(self.stock["fp32"], prompt, NEW)
        self.note("stock fp32", per_s)
        self.note("stock bf16", stock_decode(self.stock["bf16"], prompt, 32)[0])
        for kind, model in self.native.items():
            for beside in BESIDE[kind]:
                if beside in self.llama:
                    self.note(f"llama.cpp {beside}", NEW / self.llama[beside].time(prompt, NEW)[1])
            self._native(kind, model, prompt, expected)
        self.note("int8, 1 thread", native_decode(self.single.step, [prompt], NEW)[0])
        self._busy(prompt)
        self.note("swapped int8", native_decode(self.swapped.step, [prompt], NEW)[0])
        self.note(f"batch {BATCH}, stock bf16", stock_batch(self.stock["bf16"], rows))
        self.note(f"batch {BATCH}, int8", native_decode(self.native["int8"].step, rows, NEW)[0])
        if self.vllm:
            self.note(f"batch {BATCH}, vLLM bf16", self.vllm.decode(rows, 64))
        self.note("prefill 512, stock bf16", 512 / stock_prefill(self.stock["bf16"], long))
        if self.llama:
            self.note("prefill 512, llama.cpp", 512 / min(llama.time(long, 1)[0] for llama in self.llama.values()))
        for kind, model in self.native.items():
            self.note(f"prefill 512, {kind}", 512 / seconds(lambda step=model.step: fill(step, long)))  # type: ignore[misc]
        self._longer(start)
        self._lookup(start)
        self._candidates(long)

    def _native(self, kind: str, model: NativeModel, prompt: list[int], expected: tuple[int, ...]) -> None:
        step: Any = model.step
        per_s, ids = native_decode(step, [prompt], NEW)
        self.note(kind, per_s)
        self._share(kind, step, prompt, NEW)
        self.same.setdefault(kind, []).append(
            next((i for i, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b), NEW)
        )
        for count in (4, 8):
            found = verify(step, prompt, count)
            self.note(f"verify {count} over 1, {kind}", statistics.median(ratio for _, ratio in found))
            self.beside.setdefault(f"verify {count} over 1, {kind}", []).extend(found)

    def _share(self, arm: str, step: Any, prompt: list[int], new: int) -> None:
        """Decodes once more, reading the weights after each token: its bytes per second over those of the reads beside it."""
        took, per_byte = token_seconds_beside_reads(step, prompt, new)
        needed = step.read_bytes + step.kv_bytes(len(prompt) + new / 2)
        shares = [
            needed * (before + after) / 2 / seconds for seconds, (before, after) in zip(took[1:], pairwise(per_byte), strict=True)
        ]
        self.limits.setdefault(arm, []).append(statistics.median(shares))
        rates = [2 / (before + after) for before, after in pairwise(per_byte)]
        self.beside.setdefault(f"share of the limit, {arm}", []).extend(zip(rates, shares, strict=True))
        self.note(f"memory read, GB/s, {arm}", 1 / statistics.median(per_byte) / 1e9)

    def _busy(self, prompt: list[int]) -> None:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            self.note("int8, a core busy", native_decode(self.native["int8"].step, [prompt], NEW)[0])
            other.kill()

    def _longer(self, start: int) -> None:
        step: Any = self.native["int8"].step
        ids = (self.ids[start:] + self.ids)[:LONG]
        per_s, _ = native_decode(step, [ids], 48)
        self.note(f"{LONG} tokens, int8", per_s)
        self._share(f"{LONG} tokens, int8", step, ids, 48)

    def _lookup(self, start: int) -> None:
        """Prompt lookup over plain decoding, twice each in turns: on code that is to be repeated, on prose, whose greedy
        continuation goes round in circles, and on prose that is drawn, where nothing repeats."""
        step: Any = self.native["int8"].step
        prose = [self.ids[start + 300 * row : start + 300 * row + PROMPT] for row in range(3)]
        for name, prompts, heat in (("code", self.code, 0.0), ("prose", prose, 0.0), ("drawn prose", prose, 1.0)):
            length, steps, taken = DraftLength(12), 0, [0.0, 0.0]
            for number, prompt in enumerate((*prompts, *prompts)):
                ids: list[list[int]] = []
                for way, loop in enumerate((Loop(step), Loop(step, PromptLookup(), length))):
                    times: list[float] = []
                    ask = Ask(tuple(prompt), NEW, Sampling(heat), seed=number)
                    ids.append(loop.run([ask], lambda told, _, to=times: to.append(told.seconds))[0].ids)  # type: ignore[misc]
                    taken[way] += times[-1] - times[0]
                steps += len(times) - 1
                if not heat:
                    self.diverged += divergence(step, prompt, *ids)
                    self.drafted_texts += 1
            self.note(f"prompt lookup over plain, {name}", taken[0] / taken[1])
            self.note(f"tokens per step, {name}", 2 * len(prompts) * (NEW - 1) / steps)

    def _candidates(self, prompt: list[int]) -> None:
        step: Any = self.native["int8"].step
        one = seconds(lambda: Loop(step).run([Ask(tuple(prompt), NEW, Sampling(0.8))]))
        many = seconds(lambda: Loop(step).run([Ask(tuple(prompt), NEW, Sampling(0.8, candidates=8))]))
        self.note("8 candidates over 1, int8", many / one)

    def trial(self) -> None:
        """What `draft: auto` would say of each prompt, predicted and measured."""
        step: Any = self.native["int8"].step
        for name, prompt in (("code", self.code[0]), ("prose", self.ids[2000 : 2000 + PROMPT])):
            drafters: dict[str, Drafter] = {
                "prompt_lookup": PromptLookup(),
                "self": ModelDraft(step.first_layers(step.layers // 4)),
            }
            chosen = draft_choice.choose(step, drafters, 12, [Ask(tuple(prompt), NEW)])
            assert chosen
            self.drafts.append(f"{name}: {chosen[1]}")

    def fidelity(self) -> dict[str, dict[str, float | None]]:
        """KLD and perplexity ratio of each against stock float32; int4 calibrated, since the model was on a 4-bit grid itself."""
        windows = texts.windows(self.ids, WINDOW, WINDOWS)
        models: dict[str, Any] = {**self.native, "int4, gptq": _calibrated(), "swapped int8": self.swapped}
        stock, found = self.stock["fp32"].model, {}
        for name, model in models.items():
            if name == "int4":
                continue
            seen = fidelity.compare_models(
                lambda ids: stock(input_ids=ids, use_cache=False).logits,
                lambda ids, model=model: model(input_ids=ids).logits, windows,  # type: ignore[misc]
            )  # fmt: skip
            kld, ratio = seen.kld_mean, seen.ppl_ratio
            found[name] = {"kld": kld.estimate if kld else None, "ppl_ratio": ratio.estimate if ratio else None}
        return found


def _calibrated() -> Any:
    options, chosen = LoadOptions(device="cpu"), recipe.load("gptq_int4", techniques.find)
    folder = optimize.ensure(ArmSpec("gptq_int4", "demo", chosen), options, lambda line: None)
    return pipeline.open_arm(ArmSpec("gptq_int4", str(folder), chosen, is_artifact=True), "cpu", options).model


def started(kind: str) -> dict[str, Any]:
    """Memory and start-up, each in a process of its own."""
    found: dict[str, Any] = {}
    for more in (["memory"], []):
        done = subprocess.run(
            [sys.executable, str(HERE / "native_start.py"), kind, *more], capture_output=True, text=True, check=True
        )
        told = json.loads(done.stdout)
        found |= {key: told[key] for key in told if key.endswith("_mib") == bool(more)}
    return found


def bars(bench: Bench, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is wanted, what was found, smallest and largest over rounds."""

    def bar(what: str, found: list[float], wanted: float, *, at_most: bool = False) -> dict[str, Any]:
        middle = statistics.median(found)
        met = middle <= wanted if at_most else middle >= wanted
        return {
            "what": what, "found": middle, "low": min(found), "high": max(found), "wanted": wanted, "at_most": at_most,
            "met": met,
        }  # fmt: skip

    known = bench.samples
    for what, arm, beside, wanted in RATIOS:
        if arm in known and beside in known:
            yield bar(what, [a / b for a, b in zip(known[arm], known[beside], strict=True)], wanted)
    for arm, wanted in SHARES:
        yield bar(f"share of the bandwidth limit, {arm}", bench.limits[arm], wanted)
    yield bar("bf16 weights: first tokens equal to stock fp32's, of 128", [float(n) for n in bench.same["bfloat16"]], NEW)
    yield bar("int8: KLD, nats", [document["fidelity"]["int8"]["kld"]], 0.006, at_most=True)
    yield bar("verify 4 over 1, int8", known["verify 4 over 1, int8"], 1.2, at_most=True)
    yield bar("verify 8 over 1, int8", known["verify 8 over 1, int8"], 1.6, at_most=True)
    yield bar("prompt lookup over plain, code", known["prompt lookup over plain, code"], 2.0)
    shares = [a / b for a, b in zip(known["prompt lookup over plain, code"], known["tokens per step, code"], strict=True)]
    yield bar("its speed-up over its tokens per step", shares, 0.85)
    yield bar("prompt lookup over plain, drawn prose", known["prompt lookup over plain, drawn prose"], 0.97)
    above = sum(each["margin"] > each["noise"] for each in bench.diverged)
    yield bar(f"drafted greedy texts that differ beyond rounding, of {bench.drafted_texts}", [above], 0, at_most=True)
    yield bar("8 candidates over 1, int8", known["8 candidates over 1, int8"], 2.5, at_most=True)
    start = document["started"]
    beyond = start["after_mib"] - start["packed_mib"] - start["kv_mib"]
    yield bar("int8: MiB beyond packed weights and keys and values", [beyond], 150, at_most=True)
    yield bar("int8: seconds from opening to the first token", [start["open_to_first_token_s"]], 2, at_most=True)


def by_rate(pairs: list[tuple[float, float]]) -> list[dict[str, float | None]]:
    """Medians by what memory gave at that moment: neighbours on a shared machine make it another one within seconds."""
    found: list[dict[str, float | None]] = []
    for low, high in pairwise((0.0, *RATES, float("inf"))):
        inside = [value for rate, value in pairs if low <= rate / 1e9 < high]
        found.append({"count": len(inside), "median": statistics.median(inside) if len(inside) >= FEWEST else None})
    return found


def markdown(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        "# The native engine on a CPU",
        "",
        f"infopt {document['infopt']}, {machine}, {document['threads']} threads, {document['isa']}; demo model, {PROMPT} tokens "
        f"in, {NEW} out, greedy; {document['rounds']} rounds in which all arms take turns. Medians, smallest and largest.",
        "",
        "| bar | found | rounds | wanted | |",
        "|---|---:|---|---|---|",
        *(
            f"| {bar['what']} | {bar['found']:.3g} | {bar['low']:.3g} … {bar['high']:.3g} "
            f"| {'≤' if bar['at_most'] else '≥'} {bar['wanted']:g} | {'met' if bar['met'] else 'short'} |"
            for bar in document["bars"]
        ),
        "",
        "| tokens per second, or what is named | median | rounds |",
        "|---|---:|---|",
        *(
            f"| {arm} | {statistics.median(found):.4g} | {min(found):.4g} … {max(found):.4g} |"
            for arm, found in document["samples"].items()
        ),
        "",
        f"| where memory gave, GB/s | {' | '.join(_names())} |",
        f"|---|{'---:|' * len(_names())}",
        *(f"| {arm} | {' | '.join(map(_cell, bins))} |" for arm, bins in document["by_memory_rate"].items()),
        "",
        "| against stock float32 | KLD, nats | perplexity × |",
        "|---|---:|---:|",
        *(f"| {name} | {each['kld']:.5f} | {each['ppl_ratio']:.4f} |" for name, each in document["fidelity"].items()),
        "",
        *(f"- {line}" for line in document["drafts"]),
        *(
            f"- a drafted greedy text differs from token {each['token']:.0f} on, where the likeliest two were "
            f"{each['margin']:.3g} apart; logits of several tokens and of single ones differ by {each['noise']:.3g}"
            for each in document["diverged"]
        ),
        f"- start: {', '.join(f'{key} {value:.4g}' for key, value in document['started'].items())}",
    ]
    return "\n".join([*lines, ""])


def _cell(found: dict[str, Any]) -> str:
    return "–" if found["median"] is None else f"{found['median']:.3g} (of {found['count']})"


def _names() -> list[str]:
    return [f"below {RATES[0]}", *(f"{a} … {b}" for a, b in pairwise(RATES)), f"above {RATES[-1]}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", choices=("llama", "vllm"), default=())
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    start = started("int8")
    bench = Bench(set(asked.skip))
    bench.round(0)  # warms everything up; not counted
    for kept in (bench.samples, bench.limits, bench.same, bench.beside):
        kept.clear()
    bench.diverged, bench.drafted_texts = [], 0
    for number in range(1, asked.rounds + 1):
        bench.round(number)
        print(f"round {number} of {asked.rounds}", file=sys.stderr)
    bench.trial()
    gathered = environment.gather("cpu", THREADS, None)
    document: dict[str, Any] = {
        "schema_version": 2, "infopt": __version__, "threads": THREADS, "isa": library.load().infopt_isa().decode(),
        "machine": f"{gathered['cpu']}, {gathered['cores']} cores", "rounds": asked.rounds, "samples": bench.samples,
        "shares_of_limit": bench.limits, "equal_tokens": bench.same, "fidelity": bench.fidelity(), "drafts": bench.drafts,
        "by_memory_rate": {arm: by_rate(pairs) for arm, pairs in bench.beside.items()},
        "diverged": bench.diverged, "drafted_texts": bench.drafted_texts,
        "started": start,
    }  # fmt: skip
    document["bars"] = list(bars(bench, document))
    print(markdown(document))
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "native.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        (asked.out / "native.md").write_text(markdown(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
