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

Weights are random: figures are of speed and memory. Arms take turns; a figure is the median of the rounds, with its range.
Each part runs in a process of its own; what FOLDER holds of others is kept.
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
from gpu_models import SHAPES, Shape, counting, transformer
from gpu_predict import measured_ceilings, predict, prediction_table, verified
from gpu_report import markdown

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

    def compare(
        self, shape_name: str, arms: Sequence[Arm], prompts: list[list[int]], new: int, rounds: int = 0
    ) -> dict[str, Any]:
        """All arms in turns, round after round; the first round warms up: it compiles, captures and times kernels. An arm that
        fails is left out of what follows, and its error is kept."""
        found: dict[str, Any] = {}
        times: dict[str, list[gpu_arms.Timed]] = {arm.name: [] for arm in arms}
        warm_s: dict[str, float] = {}
        for number in range(1 + (rounds or self.rounds)):
            for arm in arms:
                if arm.name in found:
                    continue
                begin = time.perf_counter()
                try:
                    times[arm.name].append(arm.run(prompts, new))
                except Exception as error:  # of any library, and the others have to go on
                    found[arm.name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
                    say(f"{shape_name}: {arm.name} failed: {found[arm.name]['failed']}")
                if number == 0:
                    warm_s[arm.name] = time.perf_counter() - begin
                    say(f"{shape_name} × {len(prompts)}: {arm.name} warmed up in {warm_s[arm.name]:.1f} s")
        for arm in arms:
            if arm.name not in found:
                found[arm.name] = self._row(SHAPES[shape_name], arm, times[arm.name], prompts, new) | {"warm_s": warm_s[arm.name]}
        return found

    def _row(self, shape: Shape, arm: Arm, times: list[gpu_arms.Timed], prompts: list[list[int]], new: int) -> dict[str, Any]:
        rows, context, (warm, *counted) = len(prompts), len(prompts[0]) + new / 2, times
        rates = [rows * (new - 1) / each.decode_s for each in counted]
        predicted = predict(shape, arm.kind, arm.weights_bytes, rows, context, self.ceilings)
        say(f"{arm.name} × {rows}: {float(np.median(rates)):.0f} tok/s of {predicted.limit:.0f}")
        return {
            "tok_per_s": rates, "steady_tok_per_s": [rows / each.step_s for each in counted],
            "prefill_s": [each.prefill_s for each in counted], "tokens_per_step": [each.tokens_per_step for each in counted],
            "limit_tok_per_s": predicted.limit, "predicted_tok_per_s": predicted.expected, "bound": predicted.bound,
            "launches": predicted.launches, "share_of_limit": float(np.median(rates)) / predicted.limit,
            "read_bytes": arm.weights_bytes, "remarks": arm.step.remarks if isinstance(arm, NativeArm) else (),
            "text": list(warm.ids), "joules_per_token": None,
        }  # fmt: skip

    def joules(self, arm: Arm, prompts: list[list[int]], new: int) -> float | None:
        """Gross joules of a decoded token: what a run with many new tokens takes beyond one with a single."""
        many, one = (self._joules_a_run(arm, prompts, count) for count in (new, 1))
        return None if many is None or one is None else (many - one) / (len(prompts) * (new - 1))

    def _joules_a_run(self, arm: Arm, prompts: list[list[int]], new: int) -> float | None:
        arm.run(prompts, new)
        self.synchronise()
        self.meter.begin()
        begin, runs = time.perf_counter(), 0
        while time.perf_counter() - begin < ENERGY_S:
            arm.run(prompts, new)
            runs += 1
        self.synchronise()
        joules = self.meter.end().joules
        return None if joules is None else joules / runs

    def timed_kernels(self) -> list[dict[str, Any]]:
        """Products that were timed here alone, and the bytes a second of the fastest."""
        return [
            {"product": name, "seconds": [[vars(choice), seconds] for choice, seconds in tried]}
            for name, tried in self.table.seconds.items()
        ]

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
        [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *names], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    say(done.stdout[-3000:])
    return {"passed": done.returncode == 0, "tail": done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr[-500:]}


@torch.inference_mode()
def check(bench: Bench) -> dict[str, Any]:
    """Every kind of weights by its kernels and in the model's type, against the same weights by the twins in float32: a prompt,
    a few tokens, single ones, and single ones of many rows."""
    name, shape = bench.shape("0.6B")
    found, many = {}, 64 if bench.on_gpu else 3
    ids = bench.prompts(shape, 1, 100)[0]
    openings = [ids[:20], *([token, *ids[1:20]] for token in range(many - 1))]
    for arm in [each for each in _arms(bench, shape, gpu_arms.NATIVE, ()) if isinstance(each, NativeArm)]:
        reference = GraphStep(verified(arm.step.model), ops=TWINS)
        ours, exact = (_logits(step, ids, openings) for step in (arm.step, reference))
        p, q = exact.log_softmax(-1), ours.log_softmax(-1)
        found[arm.name] = {
            "error": float((ours - exact).abs().max() / exact.std()), "kld": float((p.exp() * (p - q)).sum(-1).mean()),
            "top1_agreement": float((ours.argmax(-1) == exact.argmax(-1)).float().mean()),
        }  # fmt: skip
        say(f"check {name}: {arm.name} {found[arm.name]}")
    return {"shape": name, "rows": many, "arms": found}


def _logits(step: GraphStep, ids: list[int], openings: list[list[int]]) -> torch.Tensor:
    sequence = step.open()
    parts = [ids[:60], ids[60:63], *([token] for token in ids[63:])]
    found = [step.run([Run(sequence, part, all_logits=True)]).logits for part in parts]
    kept = [part.clone() for part in found if part is not None]
    step.close(sequence)
    rows = [step.open() for _ in openings]
    for row, opening in zip(rows, openings, strict=True):
        step.run([Run(row, opening)], want_logits=False)
    last = step.run([Run(row, [7]) for row in rows]).logits
    assert last is not None
    return torch.cat([*kept, last])


def decode(bench: Bench) -> dict[str, Any]:
    name, shape = bench.shape("8B")
    arms, prompts = _arms(bench, shape, gpu_arms.NATIVE, gpu_arms.STOCK), bench.prompts(shape, 1, 512)
    found = bench.compare(name, arms, prompts, 256 if bench.on_gpu else 8)
    stock: Any = next(arm for arm in arms if isinstance(arm, StockArm))
    agreed = gpu_arms.agreement(stock.model, prompts[0], found["native bfloat16"]["text"])
    for arm in arms if bench.on_gpu else []:
        if arm.name in ("native bfloat16", "native int4", "static + compile"):
            found[arm.name]["joules_per_token"] = bench.joules(arm, prompts, 256)
    return {"shape": name, "rows": 1, "prompt": len(prompts[0]), "arms": found, "stock_agrees": agreed}


def batch(bench: Bench) -> dict[str, Any]:
    name, shape = bench.shape("8B")
    arms = _arms(bench, shape, ("bfloat16", "int4"), gpu_arms.STOCK[1:] if bench.on_gpu else gpu_arms.STOCK)
    prompts = bench.prompts(shape, 64 if bench.on_gpu else 3, 1024)
    found = bench.compare(name, arms, prompts, 128 if bench.on_gpu else 8, rounds=3)
    for arm in arms[:2] if bench.on_gpu else []:
        found[arm.name]["joules_per_token"] = bench.joules(arm, prompts, 128)
    return {"shape": name, "rows": len(prompts), "prompt": len(prompts[0]), "arms": found}


def small(bench: Bench) -> dict[str, Any]:
    found = {}
    for each in ("1B", "0.6B"):
        name, shape = bench.shape(each)
        prompts = bench.prompts(shape, 1, 512)
        arms = _arms(bench, shape, ("bfloat16", "int4"), gpu_arms.STOCK[1:] if bench.on_gpu else gpu_arms.STOCK)
        compared = bench.compare(name, arms, prompts, 256 if bench.on_gpu else 8)
        found[each] = {"shape": name, "rows": 1, "prompt": len(prompts[0]), "arms": compared}
        del arms
        freed()
    return found


def lookup(bench: Bench) -> dict[str, Any]:
    """A model that counts: what follows a token is the next one, by a wide margin, so that its prompt can hold what it will say
    and a draft's acceptance is what it is meant to be."""
    name, shape = bench.shape("8B")
    new = 256 if bench.on_gpu else 24
    step = gpu_arms.native("bfloat16", counting(shape, bench.device), bench.device, bench.table, shape).step
    chain = list(range(1, 2 * new))
    prompt = [*chain, *chain[:8]]
    text = [*prompt, *chain[8:], *range(2 * new, 3 * new)]
    drafted = {alpha: (count, Oracle([text], alpha, count, shape.vocabulary)) for alpha, count in ((0.5, 3), (0.7, 5), (0.9, 8))}
    arms: list[Arm] = [NativeArm("plain", step, "bfloat16")]
    arms.append(NativeArm("prompt lookup", step, None, PromptLookup(), DraftLength(most=12)))
    arms += [
        NativeArm(f"acceptance {alpha}", step, None, oracle, DraftLength(count, is_fixed=True))
        for alpha, (count, oracle) in drafted.items()
    ]
    compared = bench.compare(name, arms, [prompt], new)
    base = float(np.median(compared["plain"]["tok_per_s"]))
    drafts = {}
    for alpha, (count, _) in drafted.items():
        arm, many = compared[f"acceptance {alpha}"], _verify_s(bench, step, prompt, count + 1)
        cost = many * base  # steps of one token, as fast as plain decoding makes them
        drafts[f"{alpha}"] = {
            "drafted": count, "speedup": float(np.median(arm["tok_per_s"])) / base, "predicted": expected(alpha, count) / cost,
            "tokens_per_step": float(np.mean(arm["tokens_per_step"])), "cost_of_verifying": cost,
        }  # fmt: skip
        say(f"lookup: acceptance {alpha}: {drafts[f'{alpha}']}")
    said = text[len(prompt) :][:new]
    speedup = float(np.median(compared["prompt lookup"]["tok_per_s"])) / base
    same = all(arm["text"] == said for arm in compared.values())
    return {"shape": name, "rows": 1, "prompt": len(prompt), "arms": compared, "speedup": speedup, "same_text": same,
            "drafts": drafts}  # fmt: skip


def _verify_s(bench: Bench, step: GraphStep, ids: list[int], tokens: int) -> float:
    """Median seconds of a step of so many tokens after `ids`, as the loop asks for it."""
    sequence, found = step.open(), []
    step.run([Run(sequence, ids)], want_logits=False)
    for _ in range(22):
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
            arms.append(gpu_arms.others(each, model))
        except Exception as error:  # each library has its own ways of not running
            refused[each] = f"{type(error).__name__}: {error}"[:300]
            say(f"formats: {each} does not run: {refused[each]}")
        freed()
    del model
    freed()
    found = {}
    for rows in (1, 64, 8, 32) if bench.on_gpu else (1, 2):
        prompts = bench.prompts(shape, rows, 256)
        found[str(rows)] = bench.compare(name, arms, prompts, 32 if bench.on_gpu else 8, rounds=2)
    return {"shape": name, "prompt": 256, "rows": found, "refused": refused}


def command(bench: Bench, out: Path) -> dict[str, Any]:
    """The command itself: which engine it picks, and its run folder."""
    device, results = bench.device.split(":")[0], str(out / "results")
    line = [sys.executable, "-m", "infopt", "bench", "tiny", "--device", device, "--results", results, "--no-quality"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    say(done.stdout[-1500:])
    told = (done.stdout + done.stderr).splitlines()
    return {"exit": done.returncode, "said": [line for line in told if "native engine" in line][:2]}


RUN: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "tests": tests, "check": check, "decode": decode, "batch": batch, "small": small, "lookup": lookup, "formats": formats,
}  # fmt: skip


def run_part(part: str, asked: argparse.Namespace) -> int:
    """One part in this process; what it found is merged into what lies in FOLDER."""
    if torch.cuda.is_available():  # else a second shape compiles the peers for all shapes, and a ninth not at all
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 64
    bench = Bench(asked.device, asked.shape, asked.rounds)
    begin = time.perf_counter()
    ran = {"ceilings": lambda bench: vars(bench.ceilings), "bench": lambda bench: command(bench, asked.out)} | RUN
    found, document = ran[part](bench), read(asked.out)
    document |= {
        "schema_version": 1, "infopt": __version__, "versions": host.versions(), "rounds": asked.rounds,
        "machine": torch.cuda.get_device_name() if bench.on_gpu else "a CPU, by the kernels' twins", part: found,
    }  # fmt: skip
    document.setdefault("ceilings", vars(bench.ceilings))
    document.setdefault("kernels", {})[part] = bench.timed_kernels()
    document.setdefault("seconds", {})[part] = time.perf_counter() - begin
    write(asked.out, document)
    return 0


def read(folder: Path) -> dict[str, Any]:
    path = folder / "h200.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def write(folder: Path, document: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "h200.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / "h200.md").write_text(markdown(document), encoding="utf-8")


def run_all(asked: argparse.Namespace) -> int:
    """Each part in a process of its own: one that fails, or breaks the GPU's context, takes no other with it."""
    if asked.merge:
        write(asked.out, read(asked.merge) | read(asked.out))
    failed = []
    for part in asked.part:
        options = ["--part", part, "--device", asked.device, "--rounds", str(asked.rounds), "--out", str(asked.out), "--here"]
        options += ["--shape", asked.shape] if asked.shape else []
        begin = time.perf_counter()
        try:
            code: int | str = subprocess.run([sys.executable, __file__, *options], timeout=asked.limit_s).returncode
        except subprocess.TimeoutExpired:
            code = f"more than {asked.limit_s} s"
        say(f"{part}: {time.perf_counter() - begin:.0f} s{f', failed: {code}' if code else ''}")
        failed += [part] if code else []
    print(markdown(read(asked.out)))
    return int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=240, help="seconds that a part may take")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--merge", type=Path, help="a folder whose parts are kept, if OUT has none of them")
    parser.add_argument("--here", action="store_true", help="one part, in this process")
    parser.add_argument("--out", type=Path, default=Path("h200"))
    asked = parser.parse_args()
    if asked.predict:
        print(prediction_table())
        return 0
    return run_part(asked.part[0], asked) if asked.here else run_all(asked)


if __name__ == "__main__":
    sys.exit(main())
