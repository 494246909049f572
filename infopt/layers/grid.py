"""The grid that weights are rounded to, as arithmetic: bytes, allowed group sizes, chosen layers. Torch-free."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from infopt.errors import RecipeError, unknown
from infopt.protocols import Machine, Prediction, Shapes

ScaleDType = Literal["auto", "float32", "bfloat16", "float16"]
Kind = Literal["int", "fp8", "mxfp4", "nvfp4"]
Activations = Literal["none", "token", "token_asymmetric", "group"]
USUAL_GROUPS = (16, 32, 48, 64, 96, 128, 192, 256, 512)
HEAD = "lm_head"
#: Bytes moved per weight while one layer is rounded and packed, in float32 and int32; fitted to measured seconds.
TRAFFIC_BYTES = 140
#: The same for 4-bit floats, which compressed-tensors rounds and packs through a mask per number.
FLOAT4_TRAFFIC_BYTES = 700
#: Bytes held per weight of the layer at hand: float32 copies, its grid indices, and the packer's int32 and int64 buffers.
HELD_BYTES = 40
#: Bytes moved per weight while bitsandbytes quantizes what transformers reads; fitted to measured seconds.
LOAD_TRAFFIC_BYTES = 600


@dataclass(frozen=True)
class Grid:
    """`bits` per weight; one scale per `group_size` input features of a row, or per row when None (per channel).

    `kind`: int: q·scale, or (q − zero)·scale when not symmetric. fp8: E4M3 numbers times scale. mxfp4, nvfp4: E2M1 numbers
    (0, ½, 1, 1½, 2, 3, 4, 6) times a power of two per 32, or times an E4M3 scale per 16 and one float32 per layer.
    `scale_dtype` is what int and fp8 scales are rounded to and stored in; `auto` is the model's dtype.
    `activations`: a layer's input is rounded to the same kind of numbers while it runs, with one scale per token (int at
    8 bits, fp8), one scale and one zero point per token (`token_asymmetric`, int at 8 bits) or one scale per group (mxfp4).
    """

    bits: int
    group_size: int | None = None
    scale_dtype: ScaleDType = "auto"
    symmetric: bool = True
    kind: Kind = "int"
    activations: Activations = "none"

    @property
    def format(self) -> str:
        """Of compressed-tensors: how the weight lies in the file."""
        if self.kind == "int":
            return "pack-quantized" if self.activations == "none" else "int-quantized"
        return {"fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}[self.kind]

    def stored_bytes(self, shape: tuple[int, int], model_bytes: float) -> int:
        """Bytes of one stored [out, in] weight with its scales, zero points, and shape (two int64) where there is one.

        `model_bytes`: bytes per element of the model's dtype. Packed words are int32, so rows round up.
        """
        out, inner = shape
        groups = inner // self.group_size if self.group_size else 1
        scale = model_bytes if self.scale_dtype == "auto" else (4 if self.scale_dtype == "float32" else 2)
        if self.kind in ("mxfp4", "nvfp4"):
            # The float32 scales of an nvfp4 layer: its weight's, and its input's where that is rounded.
            wholes = 0 if self.kind == "mxfp4" else 1 if self.activations == "none" else 2
            return out * (inner // 2 + groups) + 4 * wholes
        if self.format != "pack-quantized":
            return out * inner + round(out * groups * scale) + (0 if self.symmetric else out * groups)
        words = out * math.ceil(inner * self.bits / 32) + (0 if self.symmetric else math.ceil(out * self.bits / 32) * groups)
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
    """Refuses a model without linear layers, a pattern that names nothing, a head that shares its weight with the embedding.

    Raises RecipeError.
    """
    if not shapes.linear:
        raise RecipeError(
            path,
            f"{shapes.architecture} has no linear layers that this step can round",
            hint="nf4 and bnb_int8 also round layers of GPT-2's kind (Conv1D)",
        )
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


def check_inside_blocks(shapes: Shapes, ignore: Iterable[str], path: str) -> None:
    """Refuses layers outside of the decoder blocks, for methods that go through these one by one. Raises RecipeError.

    The blocks are the list that holds most weights: `model.layers` of `model.layers.0.mlp.up_proj`.
    """

    def place(name: str) -> str:
        return re.split(r"\.\d+\.", name, maxsplit=1)[0]

    weights: Counter[str] = Counter()
    for name, (out, inner) in shapes.linear.items():
        weights[place(name)] += out * inner
    blocks, _ = weights.most_common(1)[0]
    beside = [name for name in chosen(shapes, ignore) if place(name) != blocks]
    if beside:
        parts = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in beside))
        raise RecipeError(
            f"{path}.ignore",
            f"{beside[0]} lies beside the decoder blocks, which is all that this step goes through",
            hint=f"add {parts} to ignore",
        )


def predict(
    grid: Grid, layers: Mapping[str, tuple[int, int]], shapes: Shapes, before: Prediction, machine: Machine
) -> Prediction:
    """What rounding and packing `layers` costs: bytes from the format, seconds from the machine's read rate."""
    sizes = [out * inner for out, inner in layers.values()]
    element = before.weights_bytes / shapes.parameters
    stored = sum(grid.stored_bytes(shape, element) for shape in layers.values())
    rate = machine.read_bytes_per_s
    traffic = FLOAT4_TRAFFIC_BYTES if grid.kind in ("mxfp4", "nvfp4") else TRAFFIC_BYTES
    return Prediction(
        weights_bytes=before.weights_bytes - round(sum(sizes) * element) + stored,
        peak_bytes=max(before.peak_bytes, before.weights_bytes + stored + HELD_BYTES * max(sizes, default=0)),
        seconds=sum(sizes) * traffic / rate if rate else None,
    )


def check(rule: Grid, shapes: Shapes, ignore: Iterable[str], path: str) -> None:
    """Refuses what cannot be rounded to `rule`, or not with these layers left alone. Raises RecipeError."""
    check_ignore(shapes, ignore, path)
    layers = chosen(shapes, ignore)
    if rule.kind in ("mxfp4", "nvfp4"):
        check_fixed_groups(layers, rule.kind, path)
    else:
        check_activations(rule, path)
        check_groups(layers, rule.group_size, f"{path}.group_size")


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


def check_activations(grid: Grid, path: str) -> None:
    """Refuses integer activations that no engine multiplies: they need 8-bit weights, one scale per row, no zero points.

    Raises RecipeError.
    """
    if grid.activations == "none":
        return
    for option, found, allowed in (
        ("bits", grid.bits, 8), ("group_size", grid.group_size, None), ("symmetric", grid.symmetric, True),
    ):  # fmt: skip
        if found != allowed:
            raise RecipeError(
                f"{path}.{option}",
                f"found {json.dumps(found)}; allowed with activations: {grid.activations} is {json.dumps(allowed)}",
                hint=f"set {option}: {json.dumps(allowed)}, or activations: none",
            )


def check_fixed_groups(layers: Mapping[str, tuple[int, int]], kind: Kind, path: str) -> None:
    """Refuses layers whose inputs do not divide into the groups of mxfp4 (32) or nvfp4 (16). Raises RecipeError."""
    size = 32 if kind == "mxfp4" else 16
    for name, (_, inner) in layers.items():
        if inner % size:
            part = name.rpartition(".")[2]
            raise RecipeError(
                path,
                f"{kind} has one scale per {size} inputs, which does not divide the {inner} inputs of {name}",
                hint=f"add {part} to ignore, or use rtn, whose group_size is free",
            )


def predict_load(shapes: Shapes, stored: int, before: Prediction, machine: Machine) -> Prediction:
    """What quantizing layer by layer while the weights are read costs: the model shrinks to `stored` bytes as it loads."""
    largest = max((out * inner for out, inner in shapes.linear.values()), default=0)
    rate = machine.read_bytes_per_s
    seconds = shapes.linear_parameters * LOAD_TRAFFIC_BYTES / rate if rate else None
    return Prediction(weights_bytes=stored, peak_bytes=stored + 8 * largest, seconds=seconds)
