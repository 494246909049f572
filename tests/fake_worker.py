"""A measuring process that measures nothing: it speaks the protocol of `infopt.worker`, with times from a script.

The model's name is the script, words joined by dashes: `fast`, `slow` (×1.5), `drift` (every round slower), `one` (one
token), `errs` (the last request of a block fails), `dies`, `garbage`, `bytes`, `leaves` or `hangs` (in block 2), `refused`
or `oom` (at open), `broken` (weight steps fail), `busy` (other load in every first try), `badly` (quality fails), `small`,
`unfit` (its quality is refused).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

MACHINE = {"device": "cpu", "read_bytes_per_s": 1e9, "flops": {"float32": 1e9}, "last_level_cache_bytes": 1, "memory_bytes": 1}
SHAPES = {
    "architecture": "scripted", "layers": 1, "hidden": 1, "heads": 1, "kv_heads": 1, "head_dim": 1, "vocabulary": 1,
    "context": 99, "linear": {"a": [1, 1]}, "head": [1, 1], "is_head_tied": True, "embedding": 1, "other": 0,
}  # fmt: skip
TRAFFIC = {"shapes": SHAPES, "weights_bytes": 100, "kv_element_bytes": 4, "dtype": "float32"}
ENVIRONMENT = {"device": "cpu", "cpu": "scripted", "threads": 1, "torch": "2", "transformers": "5", "fingerprint": "f"}


def emit(event: str, **content: Any) -> None:
    print(json.dumps({"event": event, **content}), flush=True)


def number(key: str, unit: str, value: float, **bounds: float) -> dict[str, Any]:
    return {key: {"value": value, "unit": unit, "id": f"{key}.v1", **bounds}}


class Script:
    label = ""
    words: tuple[str, ...] = ()
    tries = 0

    def do_prepare(self, arm: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        if "broken" in arm["model"]:
            emit("error", kind="LoadBackError", message="does not reload", hint="try again")
        emit("progress", line="preparing")
        return {"folder": None, "seconds": 0.0}

    def do_open(
        self, arm: dict[str, Any], options: dict[str, Any], workload: dict[str, Any], machine: dict[str, Any] | None
    ) -> dict[str, Any]:
        assert machine in (None, MACHINE)
        self.label, self.words = arm["label"], tuple(arm["model"].split("-"))
        if "refused" in self.words:
            emit("error", kind="InputError", message="the prompt is too long", hint="a shorter one")
        if "oom" in self.words:
            emit("error", kind="WorkerError", message="out of memory", hint=None)
        size = 50.0 if "small" in self.words else 100.0
        return {
            "reference": f"{arm['model']}, scripted", "reference_hash": "0", "device": "cpu", "dtype": "float32",
            "environment": ENVIRONMENT, "workload": {"name": "scripted", "prompt_tokens": 8, "new_tokens": 5, "batch": 1},
            "workload_hash": "w", "machine": MACHINE, "traffic": TRAFFIC,
            "figures": number("load_s", "s", 1.0) | number("weights_bytes", "bytes", size),
        }  # fmt: skip

    def do_block(
        self, index: int, round: int, position: int, is_first: bool, warmup_cap: int, warmup_later: int
    ) -> dict[str, Any]:
        self.tries += 1
        for request in range(3):
            emit("sample", sample=self.sample(index, request, warmup=request == 0))
            if index == 1 and request == 1:
                self.fail()
        is_busy = "busy" in self.words and self.tries % 2 == 1
        return {
            "arm": self.label, "index": index, "round": round, "position": position, "wall_s": 1.0,
            "flags": ["contended: others used 1.00 cores, 0.15 allowed"] if is_busy else [],
            "other_cpu_cores": 1.0 if is_busy else 0.0, "energy_j": float(os.getpid()),
        }  # fmt: skip

    def fail(self) -> None:
        if "dies" in self.words:
            os.kill(os.getpid(), signal.SIGKILL)
        if "leaves" in self.words:
            print("first line\nlast words", file=sys.stderr, flush=True)
            os._exit(3)
        if "garbage" in self.words:
            print("Loading weights: 100%", flush=True)
        if "bytes" in self.words:
            os.write(1, b"\xff\xfe\n")
        if "hangs" in self.words:
            time.sleep(60)

    def sample(self, block: int, request: int, warmup: bool) -> dict[str, Any]:
        step = 0.010 * (1.5 if "slow" in self.words else 1.0) * (1.2**block if "drift" in self.words else 1.0)
        step *= 1 + 0.002 * ((block * 7 + len(self.label)) % 5)
        out = 1 if "one" in self.words else 5
        error = "IndexError: too long" if "errs" in self.words and request == 2 else None
        return {
            "arm": self.label, "block": block, "index": request, "warmup": warmup, "batch": 1, "prompt_tokens": 8,
            "out_tokens": out, "emission_s": [0.1 + step * i for i in range(out)], "emission_tokens": [1] * out,
            "prefill_s": 0.05, "error": error,
        }  # fmt: skip

    def do_finish(self) -> dict[str, Any]:
        return {"figures": number("host_rss_peak_bytes", "bytes", 1000.0)}

    def do_check(self, arm: Any, options: Any, workloads: list[dict[str, Any]]) -> None:
        if any(each["prompt_tokens"] > 1000 for each in workloads):
            emit("error", kind="InputError", message="the prompt is too long", hint="a shorter one")

    def do_check_quality(self, reference: Any, candidates: Any, options: Any, settings: Any) -> None:
        if any("unfit" in arm["model"] for arm in candidates):
            emit("error", kind="InputError", message="quality cannot be judged: vocabularies differ", hint=None)

    def do_fingerprint(self, model: str, options: Any) -> str:
        return "0"

    def do_assess(self, reference: Any, candidates: Any, options: Any, settings: Any) -> None:
        for arm in candidates:
            if "badly" in arm["model"]:
                emit("error", kind="WorkerError", message="out of memory", hint=None)
                return
            quality = {
                "figures": number("ppl_ratio", "ratio", 1.0, low=0.99, high=1.01),
                "reference": reference["model"],
                "failed": {},
            }
            emit("quality", label=arm["label"], quality=quality)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    script = Script()
    for line in sys.stdin:
        arguments = json.loads(line)
        emit("answer", value=getattr(script, f"do_{arguments.pop('command')}")(**arguments))


if __name__ == "__main__":
    main()
