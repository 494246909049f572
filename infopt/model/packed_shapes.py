"""Which of two packings a file's integers are in, told from shapes before a weight is read.

compressed-tensors stores `bits`-wide integers in int32 words, as `pack-quantized`. Widths that divide 32 lie alike in every
release. For 3, 5, 6 and 7 bits releases up to 0.17 put ⌊32 / bits⌋ values into a word and leave the rest of it empty, later
ones let a value run on into the next word, as vLLM's kernels do; the format's name is the same. Read the wrong way, a file gives
other weights, and where the shapes happen to fit, no error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from infopt.errors import InputError
from infopt.model import checkpoint

Packing = Literal["dense", "padded"]
FORMAT = "pack-quantized"


def words(values: int, bits: int, packing: Packing) -> int:
    """int32 words that a row of `values` integers takes."""
    return math.ceil(values * bits / 32) if packing == "dense" else math.ceil(values / (32 // bits))


def installed() -> Packing:
    """What the compressed-tensors of this environment writes and reads."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    columns = pack_to_int32(torch.zeros(1, 32, dtype=torch.int8), 3).shape[1]
    return "dense" if columns == words(32, 3, "dense") else "padded"


def packing_of(columns: int, values: int, bits: int) -> Packing | None:
    """The packing of a row of `values` integers stored in `columns` words; None where both take as many.

    Raises ValueError when neither does. A multiple of 32 is never the same in both, unless `bits` divides 32.
    """
    fits: list[Packing] = [packing for packing in ("dense", "padded") if words(values, bits, packing) == columns]
    if not fits:
        raise ValueError(f"{columns} words for {values} values of {bits} bits")
    return fits[0] if len(fits) == 1 else None


def check_packing(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses a model folder whose packed integers the installed compressed-tensors would read as other numbers.

    `config`: its `config.json`. A model all of whose rows fit both packings (short, odd-sized ones) passes. Raises
    InputError, also for packed weights whose shape is that of neither.
    """
    section = config.get("quantization_config") or {}
    if section.get("quant_method") != "compressed-tensors":
        return
    widths = Widths(section)
    if not any(32 % bits for bits in widths.all()):
        return
    expected = installed()
    for name, bits, columns, values in _odd_layers(folder, widths):
        try:
            found = packing_of(columns, values, bits)
        except ValueError as error:
            raise InputError(f"{folder}: {name} is packed into {error}", hint="copy or download the model again") from None
        if found not in (None, expected):
            writer = section.get("version")
            raise InputError(
                f"{folder}: its {bits}-bit weights are {_HOW[found]}, the compressed-tensors here reads them {_HOW[expected]}",
                hint=f"make it again here, or open it with compressed-tensors {writer or _RELEASE[found]}; "
                "4 and 8 bits are the same in both",
            )


_HOW: dict[Packing | None, str] = {"dense": "packed without gaps", "padded": "packed in whole values per 32-bit word"}
_RELEASE: dict[Packing | None, str] = {"dense": "0.18 or later", "padded": "0.17 or earlier"}


class Widths:
    """Bits per layer, as the groups of a `quantization_config` give them."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        groups = (section.get("config_groups") or {}).values()
        packed = [g for g in groups if (g.get("format") or section.get("format")) == FORMAT and g.get("weights")]
        self._of_target = {target: int(g["weights"]["num_bits"]) for g in packed for target in g["targets"]}

    def all(self) -> set[int]:
        return set(self._of_target.values())

    def of(self, layer: str) -> int | None:
        """A target is a layer's name, `re:` and a pattern that its name starts with, or a class: the first kind wins."""
        if layer in self._of_target:
            return self._of_target[layer]
        patterns = ((target, bits) for target, bits in self._of_target.items() if target.startswith("re:"))
        named = next((bits for target, bits in patterns if re.match(target.removeprefix("re:"), layer)), None)
        return self._of_target.get("Linear") if named is None else named


def _odd_layers(folder: Path, widths: Widths) -> Iterator[tuple[str, int, int, int]]:
    """(name, bits, stored columns, input features) of the layers whose width does not divide 32."""
    suffix = ".weight_packed"
    stored = {
        key: (path, entry) for path in checkpoint.weight_files(folder) for key, entry in checkpoint.read_header(path).items()
    }
    for key, (_, entry) in stored.items():
        name = key.removesuffix(suffix)
        bits = widths.of(name) if key.endswith(suffix) else None
        if bits and 32 % bits and f"{name}.weight_shape" in stored:
            shape = checkpoint.read_integers(*stored[f"{name}.weight_shape"])
            yield name, bits, entry["shape"][-1], shape[-1]
