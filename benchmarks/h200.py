"""Is the native engine right on a GPU, how fast is it, and how near to what the GPU could do?

    python benchmarks/h200.py [--part ceilings tests check decode batch small lookup formats bench] [--out FOLDER]
    python benchmarks/h200.py --predict                what the roofline says, on any machine
    python benchmarks/h200.py --device cpu --shape tiny  a rehearsal, by the kernels' twins

ceilings  what the GPU reads, copies and multiplies, and what a launch in a graph costs
tests     the suite's tests of the kernels and of the engine, on this GPU
check     logits of every kind of weights against float32 by the twins: error, argmax, KLD; texts against stock
decode    Llama-3.1-8B's shape, one row, 512 tokens in and 256 out: each kind of weights, eager and static + compile
batch     the same shape, 64 rows after 1,024 tokens
small     Llama-3.2-1B and Qwen3-0.6B
lookup    prompt lookup on text that repeats, and drafts of a set acceptance against the formula
formats   torchao, bitsandbytes and float8 beside the native kinds, at 1, 8, 32 and 64 rows
bench     `infopt bench` of a tiny model, which leaves a run folder

Weights are random: figures are of speed and memory. Arms take turns; a figure is the median of the rounds, with its range. What
FOLDER holds of other parts is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_arms
import numpy as np
import torch
from gpu_arms import Arm, NativeArm, Oracle, StockArm, freed
from gpu_models import SHAPES, Shape, transformer
from gpu_predict import Ceilings, measured_ceilings, predict, prediction_table, verified

from infopt import __version__, host
from infopt.kernels.gpu.choices import Table, device_table
from infopt.kernels.gpu.ops import TWINS
from infopt.measure import energy, nvml
from infopt.model.cache import cache_dir
from infopt.runtime.draft_length import DraftLength, expected
from infopt.runtime.drafts import PromptLookup
from infopt.runtime.graph_step import GraphStep
from infopt.runtime.steps import Run

ROOT = Path(__file__).parent.parent
PARTS = ("ceilings", "tests", "check", "decode", "batch", "small", "lookup", "formats", "bench")
#: Seconds over which energy is counted: NVML's counter ticks ten times a second.
ENERGY_S = 5.0


class Bench:
    def __init__(self, device: str, shape: str | None, rounds: int) -> None:
        self.device, self.only, self.rounds = device, shape, rounds
        self.on_gpu = device.startswith("cuda")
        self.table = device_table(cache_dir() / "kernels") if self.on_gpu else Table()
        self.ceilings = measured_ceilings(device)
        gpu, why = nvml.open_gpu(device)
        self.meter = energy.open_meter(device, time.perf_counter, gpu, why)
        self.found: dict[str, Any] = {}

    def shape(self, name: str) -> tuple[str, Shape]:
        return (self.only, SHAPES[self.only]) if self.only else (name, SHAPES[name])

    def prompts(self, shape: Shape, rows: int, tokens: int) -> list[list[int]]:
        source = torch.Generator().manual_seed(1)
        return torch.randint(shape.vocabulary, (rows, min(tokens, shape.context // 2)), generator=source).tolist()

    def compare(self, shape_name: str, arms: Sequence[Arm], prompts: list[list[int]], new: int) -> dict[str, Any]:
        """All arms in turns, round after round; the first round warms up: it compiles, captures and times kernels."""
        warm_s, texts = {}, {}
        times: dict[str, list[gpu_arms.Timed]] = {arm.name: [] for arm in arms}
        for arm in arms:
            begin = time.perf_counter()
            texts[arm.name] = arm.run(prompts, new).ids
            warm_s[arm.name] = time.perf_counter() - begin
            say(f"{shape_name}: {arm.name} warmed up in {warm_s[arm.name]:.1f} s")
        for _ in range(self.rounds):
            for arm in arms:
                times[arm.name].append(arm.run(prompts, new))
        rows, context = len(prompts), len(prompts[0]) + new / 2
        found = {}
        for arm in arms:
            rates = [rows * (new - 1) / each.decode_s for each in times[arm.name]]
            predicted = predict(SHAPES[shape_name], arm.name, arm.weights_bytes, rows, context, self.ceilings)
            found[arm.name] = {
                "tok_per_s": rates, "prefill_s": [each.prefill_s for each in times[arm.name]], "warm_s": warm_s[arm.name],
                "limit_tok_per_s": predicted.limit, "predicted_tok_per_s": predicted.expected, "bound": predicted.bound,
                "share_of_limit": float(np.median(rates)) / predicted.limit, "read_bytes": arm.weights_bytes,
                "capture_s": arm.step.capture_s if isinstance(arm, NativeArm) else None,
                "same_tokens": _same(texts[arm.name], texts[arms[0].name]), "joules_per_token": None,
            }  # fmt: skip
            say(f"{shape_name} × {rows}: {arm.name} {float(np.median(rates)):.0f} tok/s of {predicted.limit:.0f}")
        return found

    def joules(self, arm: Arm, prompts: list[list[int]], new: int) -> float | None:
        """Gross joules of a token, counted over seconds of decoding, prompts included."""
        self.synchronise()
        self.meter.begin()
        begin, tokens = time.perf_counter(), 0
        while time.perf_counter() - begin < ENERGY_S:
            arm.run(prompts, new)
            tokens += len(prompts) * new
        self.synchronise()
        joules = self.meter.end().joules
        return None if joules is None else joules / tokens

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _same(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Leading tokens that are equal."""
    return next((n for n, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))


def _arms(bench: Bench, shape: Shape, native: Sequence[str], stock: Sequence[str]) -> list[Arm]:
    model = transformer(shape, bench.device)
    arms: list[Arm] = []
    for name in native:
        if name == "float8" and bench.on_gpu and torch.cuda.get_device_capability() < (8, 9):
            continue
        arms.append(gpu_arms.native(name, model, bench.device, bench.table, shape))
        freed()
    few = stock if bench.on_gpu else stock[:1]  # compiling on a CPU takes minutes
    return [*arms, *(StockArm(name, model, is_compiled=name != "eager") for name in few)]


def tests(bench: Bench) -> dict[str, Any]:
    """Where there is a GPU the tests take it."""
    names = ["tests/kernels/gpu", "tests/runtime/test_graph_step.py", "--deselect", "tests/kernels/gpu/test_gpu_machine_code.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names], cwd=ROOT, capture_output=True, text=True
    )
    say(done.stdout[-3000:])
    return {"passed": done.returncode == 0, "tail": done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr[-500:]}


@torch.inference_mode()
def check(bench: Bench) -> dict[str, Any]:
    """Every kind of weights by its kernels and in the model's type, against the same weights by the twins in float32."""
    name, shape = bench.shape("0.6B")
    model, found = transformer(shape, bench.device), {}
    ids = bench.prompts(shape, 1, 100)[0]
    for arm in [each for each in _arms(bench, shape, gpu_arms.NATIVE, ()) if isinstance(each, NativeArm)]:
        reference = GraphStep(verified(arm.step.model), ops=TWINS)
        logits = []
        for step in (arm.step, reference):
            sequence = step.open()
            parts = [step.run([Run(sequence, part, all_logits=True)]).logits for part in (ids[:60], ids[60:63], *_ones(ids[63:]))]
            logits.append(torch.cat([part.clone() for part in parts if part is not None]))
            step.close(sequence)
        ours, exact = logits
        p, q = exact.log_softmax(-1), ours.log_softmax(-1)
        found[arm.name] = {
            "error": float((ours - exact).abs().max() / exact.std()), "kld": float((p.exp() * (p - q)).sum(-1).mean()),
            "top1_agreement": float((ours.argmax(-1) == exact.argmax(-1)).float().mean()),
        }  # fmt: skip
        say(f"check {name}: {arm.name} {found[arm.name]}")
    del model
    return {"shape": name, "arms": found}


def _ones(ids: Sequence[int]) -> list[list[int]]:
    return [[token] for token in ids]


def decode(bench: Bench) -> dict[str, Any]:
    name, shape = bench.shape("8B")
    arms, prompts = _arms(bench, shape, gpu_arms.NATIVE, gpu_arms.STOCK), bench.prompts(shape, 1, 512)
    found = bench.compare(name, arms, prompts, 256 if bench.on_gpu else 8)
    for arm in arms if bench.on_gpu else []:
        found[arm.name]["joules_per_token"] = bench.joules(arm, prompts, 256)
    return {"shape": name, "rows": 1, "prompt": len(prompts[0]), "arms": found}


def batch(bench: Bench) -> dict[str, Any]:
    name, shape = bench.shape("8B")
    arms = _arms(bench, shape, ("bfloat16", "int4"), gpu_arms.STOCK)
    prompts = bench.prompts(shape, 64 if bench.on_gpu else 3, 1024)
    found = bench.compare(name, arms, prompts, 128 if bench.on_gpu else 8)
    for arm in arms[:2] if bench.on_gpu else []:
        found[arm.name]["joules_per_token"] = bench.joules(arm, prompts, 128)
    return {"shape": name, "rows": len(prompts), "prompt": len(prompts[0]), "arms": found}


def small(bench: Bench) -> dict[str, Any]:
    found = {}
    for each in ("1B", "0.6B"):
        name, shape = bench.shape(each)
        prompts = bench.prompts(shape, 1, 512)
        arms = bench.compare(name, _arms(bench, shape, ("bfloat16", "int4"), gpu_arms.STOCK), prompts, 256 if bench.on_gpu else 8)
        found[each] = {"shape": name, "rows": 1, "prompt": len(prompts[0]), "arms": arms}
        freed()
    return found


def lookup(bench: Bench) -> dict[str, Any]:
    """A model whose next token hangs on the last alone says in circles, so that its prompt can hold what it will say."""
    name, shape = bench.shape("8B")
    new = 256 if bench.on_gpu else 24
    step = gpu_arms.native("bfloat16", transformer(shape, bench.device, stray=1e-3), bench.device, bench.table, shape).step
    plain = NativeArm("plain", step)
    opening = bench.prompts(shape, 1, 8)[0]
    said = list(plain.run([opening], min(1024, shape.context // 4)).ids)
    repeating = [*opening, *said, *opening]
    arms: list[Arm] = [plain, NativeArm("prompt lookup", step, PromptLookup(), DraftLength(most=12))]
    compared = bench.compare(name, arms, [repeating], new)
    base = float(np.median(compared["plain"]["tok_per_s"]))
    text = [*repeating, *plain.run([repeating], new + 20).ids]
    drafts = {}
    for alpha, count in ((0.5, 3), (0.7, 5), (0.9, 8)):
        oracle = NativeArm("oracle", step, Oracle([text], alpha, count, shape.vocabulary), DraftLength(count, is_fixed=True))
        runs = [oracle.run([repeating], new) for _ in range(bench.rounds + 1)][1:]
        rate = float(np.median([(new - 1) / each.decode_s for each in runs]))
        one, many = _verify_s(bench, step, repeating, 1), _verify_s(bench, step, repeating, count + 1)
        drafts[f"{alpha}"] = {
            "drafted": count, "speedup": rate / base, "predicted": expected(alpha, count) / (many / one),
            "cost_of_verifying": many / one, "same_text": all(list(run.ids) == text[len(repeating) :][:new] for run in runs),
        }  # fmt: skip
        say(f"lookup: acceptance {alpha}: {drafts[f'{alpha}']}")
    lossless = _same(arms[1].run([repeating], new).ids, text[len(repeating) :]) >= new
    speedup = float(np.median(compared["prompt lookup"]["tok_per_s"])) / base
    return {"shape": name, "rows": 1, "prompt": len(repeating), "arms": compared, "speedup": speedup, "same_text": lossless,
            "drafts": drafts}  # fmt: skip


def _verify_s(bench: Bench, step: GraphStep, ids: list[int], tokens: int) -> float:
    """Median seconds of a step of so many tokens after `ids`."""
    sequence, found = step.open(), []
    step.run([Run(sequence, ids)], want_logits=False)
    for _ in range(12):
        begin = time.perf_counter()
        step.run([Run(sequence, ids[:tokens], all_logits=True)], want_logits=False)
        bench.synchronise()
        found.append(time.perf_counter() - begin)
        step.cut(sequence, len(ids))
    step.close(sequence)
    return float(np.median(found[2:]))


def formats(bench: Bench) -> dict[str, Any]:
    name, shape = bench.shape("8B")
    model, refused = transformer(shape, bench.device), {}
    arms = _arms(bench, shape, gpu_arms.NATIVE, ())
    for each in gpu_arms.OTHERS if bench.on_gpu else ():
        try:
            arms.append(arm := gpu_arms.others(each, model))
            arm.run(bench.prompts(shape, 1, 64), 4)
        except Exception as error:  # each library has its own ways of not running
            arms = [kept for kept in arms if kept.name != each]
            refused[each] = f"{type(error).__name__}: {error}"[:300]
            say(f"formats: {each} does not run: {refused[each]}")
        freed()
    found = {}
    for rows in (1, 8, 32, 64) if bench.on_gpu else (1, 2):
        prompts = bench.prompts(shape, rows, 256)
        found[str(rows)] = bench.compare(name, arms, prompts, 64 if bench.on_gpu else 8)
    return {"shape": name, "prompt": 256, "rows": found, "refused": refused}


def bench_command(bench: Bench, out: Path) -> dict[str, Any]:
    """The command itself: which engine it picks, and its run folder."""
    device, results = bench.device.split(":")[0], str(out / "results")
    command = [sys.executable, "-m", "infopt", "bench", "tiny", "--device", device, "--results", results, "--no-quality"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    say(done.stdout[-1500:])
    told = (done.stdout + done.stderr).splitlines()
    return {"exit": done.returncode, "said": [line for line in told if "native engine" in line][:2]}


RUN: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "tests": tests, "check": check, "decode": decode, "batch": batch, "small": small, "lookup": lookup, "formats": formats,
}  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    """The same for people."""
    lines = ["# The native engine on a GPU", "", f"{document['machine']}. Random weights: figures are of speed.", ""]
    lines += [Ceilings(**document["ceilings"]).about] if "ceilings" in document else []
    tables: dict[str, Any] = {part: document[part] for part in ("decode", "batch", "lookup") if part in document}
    tables |= {f"small, {name}": each for name, each in document.get("small", {}).items()}
    if "formats" in document:
        about = {"shape": document["formats"]["shape"], "prompt": document["formats"]["prompt"]}
        tables |= {f"formats, {n} rows": about | {"rows": n, "arms": each} for n, each in document["formats"]["rows"].items()}
    for part, found in tables.items():
        lines += ["", f"## {part}: {found['shape']}, {found['rows']} rows after {found['prompt']} tokens", ""]
        lines += ["| arm | tok/s (range) | limit | of it | predicted | bound | warm-up, s | J/token | first tokens equal |"]
        lines += ["|---|---:|---:|---:|---:|---|---:|---:|---:|"]
        for name, arm in found["arms"].items():
            rates, joules = arm["tok_per_s"], arm["joules_per_token"]
            spread = f"{np.median(rates):.0f} ({min(rates):.0f} … {max(rates):.0f})"
            lines.append(
                f"| {name} | {spread} | {arm['limit_tok_per_s']:.0f} | {arm['share_of_limit']:.0%} | "
                f"{arm['predicted_tok_per_s']:.0f} | {arm['bound']} | {arm['warm_s']:.1f} | "
                f"{'–' if joules is None else f'{joules:.3f}'} | {arm['same_tokens']} |"
            )
    for name, each in document.get("check", {}).get("arms", {}).items():
        lines.append(f"\n{name}: largest error {each['error']:.3g} of the logits' spread, KLD {each['kld']:.2e} nats, "
                     f"argmax equal {each['top1_agreement']:.1%}")  # fmt: skip
    for alpha, each in document.get("lookup", {}).get("drafts", {}).items():
        lines.append(f"\nAcceptance {alpha}, {each['drafted']} drafted: {each['speedup']:.2f} ×, by the formula "
                     f"{each['predicted']:.2f} ×; same text: {'yes' if each['same_text'] else 'no'}")  # fmt: skip
    lines += [f"\n{name} does not run: {why}" for name, why in document.get("formats", {}).get("refused", {}).items()]
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.predict:
        print(prediction_table())
        return 0
    path = asked.out / "h200.json" if asked.out else None
    document = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    bench = Bench(asked.device, asked.shape, asked.rounds)
    document |= {
        "schema_version": 1, "infopt": __version__, "versions": host.versions(), "rounds": asked.rounds,
        "machine": torch.cuda.get_device_name() if bench.on_gpu else "a CPU, by the kernels' twins",
        "ceilings": vars(bench.ceilings),
    }  # fmt: skip
    for part in asked.part:
        begin = time.perf_counter()
        if part in RUN:
            document[part] = RUN[part](bench)
        elif part == "bench" and asked.out:
            document[part] = bench_command(bench, asked.out)
        freed()
        say(f"{part}: {time.perf_counter() - begin:.0f} s")
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
    print(markdown(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
