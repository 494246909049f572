"""The integer grid that weights are rounded to, as arithmetic: bytes, allowed group sizes, chosen layers. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from infopt.errors import RecipeError, unknown
from infopt.protocols import Machine, Prediction, Shapes

ScaleDType = Literal["auto", "float32", "bfloat16", "float16"]
USUAL_GROUPS = (16, 32, 48, 64, 96, 128, 192, 256, 512)
HEAD = "lm_head"
#: Bytes moved per weight while one layer is rounded and packed, in float32 and int32; fitted to measured seconds.
TRAFFIC_BYTES = 140
#: Bytes held per weight of the layer at hand: float32 copies, its grid indices, and the packer's int32 and int64 buffers.
HELD_BYTES = 40
#: Bytes moved per weight while bitsandbytes quantizes what transformers reads; fitted to measured seconds.
LOAD_TRAFFIC_BYTES = 600


@dataclass(frozen=True)
class Grid:
    """`bits` per weight; one scale per `group_size` input features of a row, or per row when None (per channel).

    Symmetric: q·scale, asymmetric: (q − zero)·scale. `scale_dtype` is what scales are rounded to and stored in; `auto`
    is the model's dtype.
    """

    bits: int
    group_size: int | None = None
    scale_dtype: ScaleDType = "auto"
    symmetric: bool = True

    def stored_bytes(self, shape: tuple[int, int], model_bytes: float) -> int:
        """Bytes of one packed [out, in] weight with its scales and shape (two int64).

        `model_bytes`: bytes per element of the model's dtype. Words are int32, so rows round up.
        """
        out, inner = shape
        groups = inner // self.group_size if self.group_size else 1
        scale = model_bytes if self.scale_dtype == "auto" else (4 if self.scale_dtype == "float32" else 2)
        words = out * math.ceil(inner * self.bits / 32)
        return 4 * words + round(out * groups * scale) + 16


def is_ignored(name: str, ignore: Iterable[str]) -> bool:
    """Whether a module is left alone: a pattern is a glob over its dotted name, or its last part (`lm_head`, `q_proj`)."""
    return any(fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern for pattern in ignore)


def chosen(shapes: Shapes, ignore: Iterable[str]) -> dict[str, tuple[int, int]]:
    """The linear layers that no pattern of `ignore` names, an untied head included: dotted name → (out, in)."""
    patterns = tuple(ignore)
    head = {HEAD: shapes.head} if shapes.head and not shapes.is_head_tied else {}
    return {name: shape for name, shape in {**shapes.linear, **head}.items() if not is_ignored(name, patterns)}


def check_ignore(shapes: Shapes, ignore: Iterable[str], path: str) -> None:
    """Refuses a pattern that names nothing, and a head that shares its weight with the embedding. Raises RecipeError."""
    patterns = tuple(ignore)
    names = [*shapes.linear, HEAD]
    for index, pattern in enumerate(patterns):
        if not any(is_ignored(name, (pattern,)) for name in names):
            parts = {name.rpartition(".")[2] for name in names}
            raise RecipeError(f"{path}.ignore[{index}]", unknown("module", pattern, parts))
    if shapes.is_head_tied and not is_ignored(HEAD, patterns):
        raise RecipeError(
            f"{path}.ignore",
            f"this model's {HEAD} shares its weight with the input embedding and cannot be packed",
            hint=f"add {HEAD} to ignore",
        )


def predict(
    grid: Grid, layers: Mapping[str, tuple[int, int]], shapes: Shapes, before: Prediction, machine: Machine
) -> Prediction:
    """What rounding and packing `layers` costs: bytes from the format, seconds from the machine's read rate."""
    sizes = [out * inner for out, inner in layers.values()]
    element = before.weights_bytes / shapes.parameters
    stored = sum(grid.stored_bytes(shape, element) for shape in layers.values())
    rate = machine.read_bytes_per_s
    return Prediction(
        weights_bytes=before.weights_bytes - round(sum(sizes) * element) + stored,
        peak_bytes=max(before.peak_bytes, before.weights_bytes + stored + HELD_BYTES * max(sizes, default=0)),
        seconds=sum(sizes) * TRAFFIC_BYTES / rate if rate else None,
    )


def check_groups(layers: Mapping[str, tuple[int, int]], group_size: int | None, path: str) -> None:
    """Refuses a group size that does not divide every layer's input features. Raises RecipeError naming those that do."""
    if group_size is None or not layers:
        return
    bad = next(((name, inner) for name, (_, inner) in layers.items() if inner % group_size), None)
    if bad is None:
        return
    divisor = math.gcd(*(inner for _, inner in layers.values()))
    usual = [str(size) for size in USUAL_GROUPS if divisor % size == 0]
    allowed = f"{', '.join(usual)} or null (one scale per row)" if usual else "null (one scale per row)"
    raise RecipeError(path, f"found {group_size}, which does not divide the {bad[1]} inputs of {bad[0]}; allowed: {allowed}")


def predict_load(shapes: Shapes, stored: int, before: Prediction, machine: Machine) -> Prediction:
    """What quantizing layer by layer while the weights are read costs: the model shrinks to `stored` bytes as it loads."""
    largest = max((out * inner for out, inner in shapes.linear.values()), default=0)
    rate = machine.read_bytes_per_s
    seconds = shapes.linear_parameters * LOAD_TRAFFIC_BYTES / rate if rate else None
    return Prediction(weights_bytes=stored, peak_bytes=stored + 8 * largest, seconds=seconds)
