"""What a model folder holds, from its config and its safetensors headers; no weight is read.

safetensors: 8 bytes of header length (little endian), that many bytes of JSON (tensor name → dtype, shape, offsets into
the rest of the file), then the data. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from infopt.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_AGAIN = "copy or download the model again"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LARGEST_HEADER_BYTES = 100_000_000
_CONVERT = (
    'if you trust its author (pickle files run code): python -c "import sys, transformers as t; old, new = sys.argv[1:]; '
    "t.AutoModelForCausalLM.from_pretrained(old, use_safetensors=False, dtype='auto').save_pretrained(new); "
    't.AutoTokenizer.from_pretrained(old).save_pretrained(new)" {folder} {folder}-safetensors'
)
_OTHER_INPUTS = ("vision_config", "audio_config", "speech_config", "thinker_config", "vq_config", "vision_encoder")
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`. Raises InputError when it is missing or not a JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: no config.json, so this is not a model folder", hint="give a folder that has one") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}", hint=_AGAIN) from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: a JSON {type(config).__name__}; allowed: an object", hint=_AGAIN)
    return config


def check_architecture(config: dict[str, Any], where: str) -> None:
    """Refuses what is not a text-only decoder: infopt is not tested with it. Raises InputError."""
    names = config.get("architectures") or []
    shown = ", ".join(map(str, names)) or str(config.get("model_type"))
    hint = "allowed: decoder-only text models (…ForCausalLM)"
    if config.get("is_encoder_decoder"):
        raise InputError(f"{where}: {shown} is an encoder–decoder model, which infopt is not tested with", hint=hint)
    if any(key in config for key in _OTHER_INPUTS):
        raise InputError(f"{where}: {shown} is a multimodal model, which infopt is not tested with", hint=hint)
    if names and not any(str(name).endswith(_CAUSAL) for name in names):
        raise InputError(f"{where}: {shown} is not a causal language model", hint=hint)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files transformers would load, an adapter beside the model included.

    Raises InputError when there are none, or a shard is missing.
    """
    adapter = [folder / ADAPTER] if (folder / ADAPTER).is_file() and (folder / ADAPTER_CONFIG).is_file() else []
    return [*_model_files(folder), *adapter]


def _model_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES and p.is_file())
    if pickles:
        raise InputError(
            f"{folder}: only pickle weights ({pickles[0]}), which can run code when read; allowed: safetensors",
            hint=_CONVERT.format(folder=folder),
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    found = f"only {', '.join(others)}" if others else "no weights"
    raise InputError(f"{folder}: {found}; allowed: {SINGLE}, or shards with {INDEX}", hint=_AGAIN)


def _shards(folder: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX}: not an index of shards: {error}", hint=_AGAIN) from None
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking or not names:
        named = f"{lacking[0]} is missing" if lacking else "it lists no shards"
        raise InputError(f"{folder}: {INDEX}: {named} ({len(lacking)} of {len(names)})", hint=_AGAIN)
    return [folder / name for name in names]


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name → {dtype, shape, data_offsets}. Raises InputError when the header or the file's length is wrong."""

    def broken(what: str) -> InputError:
        return InputError(f"{path}: corrupt or truncated safetensors: {what}", hint=_AGAIN)

    total = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise broken(f"{total} bytes long")
        (length,) = struct.unpack("<Q", start)
        if length > min(total - 8, _LARGEST_HEADER_BYTES):
            raise broken(f"a header of {length} bytes in a file of {total}")
        text = stream.read(length)
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        is_ordered = all(0 <= entry["data_offsets"][0] <= entry["data_offsets"][1] for entry in tensors.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise broken("its header is not a table of tensors") from None
    if not is_ordered or end != total - 8 - length:
        raise broken(f"its tensors end at byte {8 + length + end}, the file at {total}")
    return tensors


def read_integers(path: Path, entry: dict[str, Any]) -> tuple[int, ...]:
    """The values of one int64 tensor, by its entry in the header: of a shape that is stored as a tensor. Raises InputError."""
    if entry["dtype"] != "I64":
        raise InputError(f"{path}: a stored shape has dtype {entry['dtype']}; allowed: I64", hint=_AGAIN)
    begin, end = entry["data_offsets"]
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        stream.seek(8 + length + begin)
        data = stream.read(end - begin)
    return struct.unpack(f"<{len(data) // 8}q", data)


def check_weights(folder: Path) -> None:
    """Reads every header. Raises InputError for missing, pickled, corrupt or truncated weights."""
    for path in weight_files(folder):
        read_header(path)


def tensor_bytes(folder: Path) -> int:
    """Bytes of all stored tensors, packed as they are on the disk, headers not counted."""
    headers = [read_header(path) for path in weight_files(folder)]
    return sum(e["data_offsets"][1] - e["data_offsets"][0] for header in headers for e in header.values())
