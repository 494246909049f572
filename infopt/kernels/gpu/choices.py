"""Which way a product takes on this GPU: found by timing the candidates once, and kept on disk.

A choice belongs to a kind of weight, its shape, a number of rows (powers of two stand for those up to them) and what is fused.
Where nothing was timed yet the first candidate is taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from infopt.kernels.gpu.weight import Weight
from infopt.result import write_atomic

Way = Literal["vector", "slices", "tiles", "library", "scaled"]
#: Rows beyond which all products are timed as for so many.
MOST_ROWS = 512
#: Up to so many rows products are sliced: warps of a program share no rows of W.
SLICED_ROWS = 16
#: From so many rows on float8 weights are multiplied with activations rounded to float8 too; never by which is faster, since it
#: is another result.
SCALED_ROWS = 17
#: Of a large GPU: bytes a second from memory, and through its second-level cache; warps that keep it loading.
READ, THROUGH, WARPS = 4.3e12, 5.5e12, 8 * 132
#: Of each candidate when they are timed, after a first one.
TURNS = 7
#: Counts up when kernels change, so that older timings are not believed.
METHOD = 2


@dataclass(frozen=True)
class Choice:
    """`library`: torch's own product, of integers' numbers spread out before it; `scaled`: its product of float8 with float8.
    `block` rows of W and `rows` of x a program; tiles of `inputs` inputs, these in `splits` parts; slices `ways` of them side by
    side."""

    way: Way
    block: int = 0
    rows: int = 0
    warps: int = 4
    inputs: int = 0
    splits: int = 1
    stages: int = 3
    ways: int = 0


@dataclass(frozen=True)
class Asked:
    """A product that a way is sought for. `dtype`: of activations; `feeds_norm`: it leaves squares. Whether its feed is still to
    be divided by its root mean square makes no difference to which way is fastest."""

    weight: Weight
    rows: int
    dtype: torch.dtype
    activation: int | None = None
    feeds_norm: bool = False

    @property
    def key(self) -> str:
        weight = self.weight
        shape = f"{weight.kind} {weight.rows}x{weight.inner} group {weight.group} zeros {int(weight.zeros is not None)}"
        fused = f"norm {int(self.feeds_norm)} activation {-1 if self.activation is None else self.activation}"
        return f"{shape} rows {bucket(self.rows)} {str(self.dtype).removeprefix('torch.')} {fused}"


def bucket(rows: int) -> int:
    """The power of two that stands for so many rows."""
    return min(MOST_ROWS, 1 << (rows - 1).bit_length())


def candidates(asked: Asked) -> list[Choice]:
    """What is worth a try, the likeliest first."""
    weight, count = asked.weight, bucket(asked.rows)
    is_scaled = weight.kind == "float8" and asked.dtype == torch.bfloat16 and weight.inner % 16 == 0
    if is_scaled and count >= SCALED_ROWS:
        return [Choice("scaled")]
    library = [Choice("library")]
    if count == 1 and not weight.bits:  # more rows of W are more loads at a time, and registers
        vectors = [Choice("vector", block, 1, warps) for block, warps in ((4, 4), (8, 4), (4, 2), (8, 2))]
        return [*vectors, *_slices(asked, count)[:2], *library]
    if count <= SLICED_ROWS:
        return [*_slices(asked, count), *_tiles(asked, count)[:1], *library]
    return [*_tiles(asked, count), *library] if count <= 64 else [*library, *_tiles(asked, count)]


def _slices(asked: Asked, count: int) -> list[Choice]:
    weight, tile = asked.weight, max(8, count)
    inputs = 128 if weight.bits else 64 if asked.dtype != torch.float32 else 32
    sizes = (
        (16, 8, 4, 3),
        (16, 16, 8, 2),
        (32, 8, 4, 3),
        (32, 8, 8, 3),
        (64, 8, 8, 2),
        *[(128, 8, 8, 2)] * (tile == 8 and weight.bits == 4),
    )
    made = [Choice("slices", block, tile, warps, inputs, 1, stages, ways) for block, ways, warps, stages in sizes]
    return _likeliest(weight, count, made)[:4]


def _tiles(asked: Asked, count: int) -> list[Choice]:
    weight, tile = asked.weight, min(64, max(16, count))
    inputs = 128 if weight.bits else 64
    sizes = [(64, 4, 4), (128, 4, 4), (128, 8, 4), (256, 8, 3)] if count >= 64 else [(64, 4, 4), (128, 8, 4)]
    if asked.dtype == torch.float32 and not weight.bits:  # no tensor cores, and all in registers
        sizes, inputs = sizes[:1], 32
    splits = [parts for parts in (1, 2, 4, 8) if parts == 1 or weight.padded_inner >= 512 * parts]
    made = [Choice("tiles", block, tile, warps, inputs, parts, stages) for block, warps, stages in sizes for parts in splits]
    return _likeliest(weight, count, made)[:5]


def _likeliest(weight: Weight, count: int, choices: Sequence[Choice]) -> list[Choice]:
    """By the longer of reading the weight from memory and all that goes through the second-level cache, on a large GPU; longer
    where there are too few warps to keep it loading."""

    def seconds(choice: Choice) -> float:
        warps = len(weight.data) // choice.block * -(-count // choice.rows) * choice.splits * choice.warps
        return max(weight.nbytes / READ, through(weight, count, choice) / THROUGH) / min(1, warps / WARPS)

    return sorted((choice for choice in choices if len(weight.data) % choice.block == 0), key=seconds)


def through(weight: Weight, count: int, choice: Choice) -> float:
    """Bytes that a product of `count` rows of x reads and writes of all but its result: the weight for every block of them, these
    for every block of the weight's rows, and the sums of splits."""
    if choice.way in ("library", "scaled"):
        return float(weight.nbytes)
    turns, blocks = -(-count // choice.rows), len(weight.data) // choice.block
    sums = 8 * choice.splits * count * len(weight.data) if choice.splits > 1 else 0
    return float(weight.nbytes * turns + 2 * weight.inner * count * blocks + sums)


@dataclass
class Table:
    """Choices by key; the seconds of all that were tried here, and why others did not run; the first candidates where nothing was
    tried. `path` None: kept in memory alone; `is_timed` False: first candidates are taken as they are."""

    path: Path | None = None
    is_timed: bool = True
    chosen: dict[str, Choice] = field(default_factory=dict)
    seconds: dict[str, list[tuple[Choice, float]]] = field(default_factory=dict)
    failed: dict[str, list[tuple[Choice, str]]] = field(default_factory=dict)
    likeliest: dict[str, Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["method"] == METHOD:
                self.chosen = {name: Choice(**choice) for name, choice in stored["chosen"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a broken file is written anew

    def find(self, asked: Asked) -> Choice:
        name = asked.key
        if name in self.chosen:
            return self.chosen[name]
        if name not in self.likeliest:  # prompts ask for each of a model's products
            self.likeliest[name] = candidates(asked)[0]
        return self.likeliest[name]

    def refuse(self, choice: Choice, why: Exception, asked: Asked) -> None:
        """Takes the next candidate from now on, since this one does not run here. Raises `why` where none is left, or where it is
        a mistake and no lack of room."""
        if not is_too_large(why) or isinstance(why, torch.OutOfMemoryError):  # which says nothing of a way
            raise why
        refused = self.failed.setdefault(asked.key, [])
        refused.append((choice, f"{type(why).__name__}: {why}"[:200]))
        left = [each for each in candidates(asked) if each not in [other for other, _ in refused]]
        if not left:
            raise why
        self.chosen.pop(asked.key, None)
        self.likeliest[asked.key] = left[0]

    def tune(
        self, asked: Asked, race: Callable[[Sequence[Choice]], tuple[dict[Choice, float], dict[Choice, str]]]
    ) -> None:  # fmt: skip
        """Keeps the fastest of the candidates, where none was chosen yet. `race`: seconds of those that run, and why others do
        not."""
        name = asked.key
        if not self.is_timed or name in self.chosen:
            return
        found, failed = race(candidates(asked))
        self.failed |= {name: list(failed.items())} if failed else {}
        self.seconds[name] = sorted(found.items(), key=lambda each: each[1])
        self.chosen[name] = self.seconds[name][0][0]
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        stored = {"method": METHOD, "chosen": {name: asdict(choice) for name, choice in sorted(self.chosen.items())}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(stored, indent=1) + "\n")


def device_table(folder: Path) -> Table:
    """That of the current GPU and this Triton."""
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = "".join(letter if letter.isalnum() else "-" for letter in properties.name)
    return Table(folder / f"{name}-{properties.multi_processor_count}-triton-{triton.__version__}.json")


def race(
    runs: dict[Choice, Callable[[Weight], object]], weights: Sequence[Weight]
) -> tuple[dict[Choice, float], dict[Choice, str]]:
    """Median seconds of a product by each, on the GPU, in turns: one whose clock rises while the first is timed says nothing. And
    what those said that do not run, for want of registers, shared memory or a library's support.

    Products go round `weights` of one shape, so that no cache holds them, in a graph, so that launching costs what it will.
    """
    graphs: dict[Choice, torch.cuda.CUDAGraph] = {}
    failed: dict[Choice, str] = {}
    for choice, run in runs.items():
        try:
            for weight in weights[:2]:
                run(weight)  # compiles
        except Exception as error:  # Triton and the libraries raise of every kind
            if not is_too_large(error):
                raise
            failed[choice] = f"{type(error).__name__}: {error}"[:200]
            continue
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in weights:
                run(weight)
        graphs[choice] = graph
    found: dict[Choice, list[float]] = {choice: [] for choice in graphs}
    for _ in range(1 + TURNS):
        for choice, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            graph.replay()
            end.record()
            end.synchronize()
            found[choice].append(float(start.elapsed_time(end)) / 2e3 / len(weights))
    return {choice: sorted(times[1:])[TURNS // 2] for choice, times in found.items()}, failed


def is_too_large(error: Exception) -> bool:
    """Whether a kernel asks for more than this GPU has, or a library has none for it: no mistake of ours."""
    said = f"{type(error).__name__} {error}".lower()
    return any(
        word in said for word in ("outofresources", "out of resource", "ptxas", "out of memory", "not supported", "not_supported")
    )


def enough(weights: Iterable[Weight], cache_bytes: int) -> list[Weight]:
    """As many as are twice what a cache of `cache_bytes` holds, and three at least if there are so many."""
    found: list[Weight] = []
    for weight in weights:
        if sum(each.nbytes for each in found) > 2 * cache_bytes and len(found) >= 3:
            break
        found.append(weight)
    return found
