"""GGUF files: checked in one line, described, and read by transformers without its repeated work."""

from __future__ import annotations

import functools
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infopt.errors import InputError

_VERSIONS = (2, 3)
_AGAIN = "copy or download the file again"


def check_magic(path: Path) -> None:
    """Raises InputError unless the file starts like a GGUF file that can be read here."""
    with path.open("rb") as stream:
        start = stream.read(8)
    if len(start) < 8 or start[:4] != b"GGUF":
        raise InputError(f"{path}: not a GGUF file (it starts with {start[:4]!r})", hint=_AGAIN)
    (version,) = struct.unpack("<I", start[4:])
    if version not in _VERSIONS:
        raise InputError(f"{path}: GGUF version {version}; allowed: 2 or 3, little endian", hint="convert it again")


def open_reader(path: Path) -> Any:
    """A `gguf.GGUFReader` over the whole file. Raises InputError when it is corrupt or truncated."""
    check_magic(path)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise InputError(f"{path}: corrupt or truncated GGUF ({type(error).__name__})", hint=_AGAIN) from None
    if not reader.tensors or value(reader, "general.architecture") is None:
        raise InputError(f"{path}: a GGUF file without a model in it", hint="give the file that holds the weights")
    return reader


def value(reader: Any, name: str) -> Any:
    """A metadata value, or None when the file does not have it."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def values(reader: Any, prefix: str) -> dict[str, Any]:
    """Every metadata value whose name starts with `prefix`."""
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith(prefix)}


def formats(reader: Any) -> str:
    """The storage types of the matrices, most frequent first: `Q4_1/Q8_0`."""
    count = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    return "/".join(name for name, _ in count.most_common())


def describe(path: Path, reader: Any) -> str:
    """`model.gguf, dequantized from Q4_1/Q8_0`."""
    packed = [name for name in formats(reader).split("/") if name not in ("F32", "F16", "BF16")]
    return f"{path.name}, dequantized from {'/'.join(packed)}" if packed else path.name


def tensor_bytes(reader: Any) -> int:
    """Bytes of all stored tensors, metadata not counted."""
    return sum(int(tensor.n_bytes) for tensor in reader.tensors)


@contextmanager
def shared_reader(path: Path) -> Iterator[Any]:
    """Inside the block transformers reads `path` once, and builds its name map once.

    On its own it parses the file for the config, the weights and the tokenizer in turn, and rebuilds the map for
    every submodule, which takes most of its loading time.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    loader: Any = modeling_gguf_pytorch_utils
    library: Any = gguf
    reader = open_reader(path)
    before = (library.GGUFReader, library.get_tensor_name_map, loader.tqdm)
    library.GGUFReader = lambda *arguments, **named: reader
    library.get_tensor_name_map = functools.lru_cache(before[1])
    loader.tqdm = lambda items, **named: items
    try:
        yield reader
    finally:
        library.GGUFReader, library.get_tensor_name_map, loader.tqdm = before


def repair_tokenizer(tokenizer: Any, reader: Any) -> None:
    """Sets what transformers drops or, in some versions, gets wrong: special tokens, context length, space clean-up."""
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = value(reader, f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(int(index)))
    context = value(reader, f"{value(reader, 'general.architecture')}.context_length")
    if context is not None:
        tokenizer.model_max_length = int(context)
    tokenizer.clean_up_tokenization_spaces = False
