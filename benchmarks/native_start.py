"""How much memory the native engine takes, and how long it takes to its first token, in a process of its own.

    python native_start.py int8|bfloat16|float32

Prints JSON. Mebibytes count from what the process held once its libraries were imported and had run a tiny model; files that
are only mapped, which the system takes back as it needs to, are told apart. `after_mib` is the highest while a request of 512
tokens and 128 new ones runs.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from pathlib import Path

STARTED = time.perf_counter()
MIB = 1 << 20


def status(field: str) -> float:
    """Of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


class Highest:
    """Of memory that is not a mapped file, watched every 2 ms."""

    def __init__(self) -> None:
        self.mib, self._is_over = 0.0, threading.Event()

    def __enter__(self) -> Highest:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._is_over.wait(0.002):
            self.mib = max(self.mib, status("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401 - loading is timed, not this

    from infopt.model import load, reference
    from infopt.model.plan import LoadPlan
    from infopt.runtime.loop import Ask, Loop
    from infopt.runtime.native_model import Settings, open_native

    def opened(name: str, kind: str) -> object:
        plan = LoadPlan(dtype="float32", device="cpu")
        return open_native(load.load(reference.parse(name), plan).model, Settings(2, weights=kind))  # type: ignore[arg-type]

    torch.set_num_threads(2)
    imported = time.perf_counter()
    opened("tiny", "auto")  # the libraries' own share of memory, and of time
    gc.collect()
    before, resident = status("RssAnon"), status("VmRSS")
    start = time.perf_counter()
    if len(sys.argv) > 2:  # watching takes time
        with Highest() as loading:
            model = opened("demo", sys.argv[1])
    else:
        loading, model = Highest(), opened("demo", sys.argv[1])
    Loop(model.step).run([Ask(tuple(range(100, 108)), 1)])  # type: ignore[attr-defined]
    first = time.perf_counter()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    Loop(model.step).run([Ask(tuple(range(100, 612)), 128)])  # type: ignore[attr-defined]
    step = model.step  # type: ignore[attr-defined]
    found = {
        "import_s": imported - STARTED, "open_to_first_token_s": first - start, "start_to_first_token_s": first - STARTED,
        "load_peak_mib": loading.mib - before, "after_mib": status("VmHWM") - resident,
        "packed_mib": step.weights_bytes / MIB, "kv_mib": step.pages.bytes / MIB,
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
