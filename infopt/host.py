"""The machine at hand: its device, its threads, its measured peaks, and the libraries on it."""

from __future__ import annotations

from collections.abc import Sequence

from infopt.errors import InputError
from infopt.measure import environment, nvml, peaks
from infopt.measure.clock import WallClock
from infopt.model.cache import cache_dir
from infopt.protocols import Machine
from infopt.techniques.base import Technique


def device_name(asked: str) -> str:
    """`auto` is CUDA where there is one, else the CPU. Raises InputError for what infopt cannot time."""
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    WallClock(chosen)
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {chosen!r}: this torch ({torch.__version__}) sees no CUDA device", hint="infopt doctor")
    return chosen


def set_threads(threads: int | None) -> int:
    """Threads that torch uses from now on."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return int(torch.get_num_threads())


def measured(device: str, threads: int) -> Machine:
    """This machine's measured peaks, from the cache when it is the same machine with the same threads."""
    gpu, _ = nvml.open_gpu(device)
    fingerprint = environment.fingerprint(environment.gather(device, threads, gpu))
    return peaks.cached_machine(cache_dir() / "peaks.json", fingerprint, lambda: peaks.measure_machine(device))


def versions(found: Sequence[Technique] = ()) -> dict[str, str]:
    """The libraries that decide what an artifact holds, and the environments that `found` ran in."""
    from importlib.metadata import PackageNotFoundError, version

    known = {f"environment {env.name}": env.provenance() for each in found if (env := each.needs.environment)}
    for name in ("infopt", "torch", "transformers", "compressed-tensors", "bitsandbytes", "optimum-quanto", "torchao"):
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known
