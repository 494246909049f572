"""Model references: what a user may write for a model, checked before any weight is read.

demo                      SmolLM2-135M-Instruct, dequantized (see `demo`)
tiny, tiny-qwen2, …       random models made in-process (see `tiny`)
path/to/folder            config.json and *.safetensors; with infopt.json it is an artifact
path/to/model.gguf        dequantized when loaded
owner/name                a hub id
MODEL+ADAPTER             any of these with a LoRA adapter (folder or hub id), merged when loaded
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from infopt.errors import InputError, nearest, unknown
from infopt.model import checkpoint, demo, gguf_file, hub, tiny
from infopt.model.cache import file_hash

Kind = Literal["hub", "folder", "gguf", "demo", "tiny", "artifact"]
KNOWN = ("demo", *tiny.KINDS)
_FORMS = "allowed: a folder, a .gguf file, a hub id, `demo` or `tiny`"
_CONTENT = (
    "config.json", "adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model", "vocab.json", "vocab.txt",
    "merges.txt",
)  # fmt: skip


@dataclass(frozen=True)
class ModelReference:
    """`text` is as written; `name` is the hub id, the tiny kind, or the path without its adapter."""

    text: str
    kind: Kind
    name: str
    path: Path | None = None
    """The folder or file; None for what is fetched or made."""
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    """A LoRA adapter's folder or hub id."""


def parse(text: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelReference:
    """The reference that `text` means. Nothing is downloaded; folders and files are checked by their headers.
    `revision` goes with hub ids and is dropped for anything else.

    Raises InputError naming what was found and what is allowed.
    """
    if "+" in text and not Path(text).expanduser().exists():
        base, _, adapter = text.rpartition("+")
        found = _parse_base(base, text, revision, trust_remote_code)
        if found.kind == "artifact":
            raise InputError(
                f"{text}: {base} is optimized already, and an adapter cannot be merged into it",
                hint="give MODEL+ADAPTER to infopt optimize",
            )
        _check_adapter(adapter)
        return replace(found, adapter=adapter)
    return _parse_base(text, text, revision, trust_remote_code)


def _parse_base(base: str, text: str, revision: str | None, trust: bool) -> ModelReference:
    path = Path(base).expanduser()
    if not base:
        raise InputError("an empty model reference", hint=_FORMS)
    if base in KNOWN:
        kind: Kind = "demo" if base == "demo" else "tiny"
        found = ModelReference(text, kind, base)
    elif path.is_dir():
        found = ModelReference(text, _check_folder(path), base, path, None, trust)
    elif path.is_file():
        _check_file(path)
        found = ModelReference(text, "gguf", base, path)
    else:
        _check_hub_id(base)
        return ModelReference(text, "hub", base, None, revision, trust)
    return found


def _check_hub_id(text: str) -> None:
    close = None if "/" in text else nearest(text, KNOWN)
    if close or text.startswith("tiny-"):
        raise InputError(unknown("model", text, KNOWN), hint=_FORMS)
    looks_like_path = text.startswith((".", "/", "~")) or text.endswith((".gguf", ".safetensors", "/"))
    if looks_like_path:
        raise InputError(f"{text}: no such file or folder", hint=_FORMS)
    if not hub.is_id(text):
        raise InputError(f"{text!r}: not a model reference", hint=_FORMS)


def _check_file(path: Path) -> None:
    if path.suffix == ".gguf":
        return gguf_file.check_magic(path)
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise InputError(f"{path}: one file of a model; allowed: its folder", hint=f"give {path.parent}")
    raise InputError(f"{path}: a {path.suffix or 'plain'} file, which is not a model", hint=_FORMS)


def _check_folder(folder: Path) -> Kind:
    if not (folder / "config.json").is_file():
        _refuse_other_folder(folder)
    checkpoint.check_architecture(checkpoint.read_config(folder), str(folder))
    checkpoint.check_weights(folder)
    return "artifact" if (folder / "infopt.json").is_file() else "folder"


def _refuse_other_folder(folder: Path) -> None:
    """Says what a folder without config.json is, where that can be told. Raises InputError, or returns."""
    if (folder / "run.json").is_file() or (folder / "samples.jsonl").is_file():
        raise InputError(
            f"{folder}: a results folder, not a model", hint="give the model that was measured; infopt compare takes results"
        )
    if (folder / "adapter_config.json").is_file():
        base = _read_adapter_config(folder).get("base_model_name_or_path")
        raise InputError(f"{folder}: a LoRA adapter without its model", hint=f"give MODEL+ADAPTER: {base or 'MODEL'}+{folder}")
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise InputError(f"{folder}: a folder of GGUF files, without config.json", hint=f"give the file: {ggufs[0]}")


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: no adapter_config.json, so this is not a LoRA adapter", hint="give MODEL+ADAPTER") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}", hint="copy or download the adapter again") from None
    return config if isinstance(config, dict) else {}


def _check_adapter(adapter: str) -> None:
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        check_adapter_folder(folder)
    elif not hub.is_id(adapter) or adapter.startswith(("/", ".", "~")):
        raise InputError(
            f"{adapter!r}: no such adapter folder", hint="MODEL+ADAPTER takes a folder with adapter_config.json, or a hub id"
        )


def check_adapter_folder(folder: Path) -> None:
    """Raises InputError unless `folder` holds a LoRA adapter in safetensors."""
    kind = _read_adapter_config(folder).get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{folder}: an adapter of type {kind}; allowed: LORA", hint="merge it yourself and give the merged folder"
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        found = (
            "only pickle weights (adapter_model.bin)"
            if (folder / "adapter_model.bin").is_file()
            else "no adapter_model.safetensors"
        )
        raise InputError(f"{folder}: {found}; allowed: safetensors", hint="load it with peft and save_pretrained it again")
    checkpoint.read_header(weights)


def local_path(reference: ModelReference) -> Path:
    """The folder (or .gguf file) with the model's weights; a hub model is downloaded if need be, `tiny` made.

    Raises InputError when it cannot be had or is not what infopt loads.
    """
    if reference.kind == "demo":
        return demo.folder()
    if reference.kind == "tiny":
        return tiny.folder(reference.name)
    if reference.kind == "hub":
        config_path(reference)
        folder = hub.snapshot(reference.name, reference.revision, with_code=reference.trust_remote_code)
        checkpoint.check_weights(folder)
        return folder
    assert reference.path is not None
    return reference.path


def config_path(reference: ModelReference) -> Path:
    """The folder of `config.json`, or the .gguf file that holds the config: for a hub model no weight is downloaded."""
    if reference.kind != "hub":
        return local_path(reference)
    folder = hub.snapshot(reference.name, reference.revision, config_only=True, with_code=reference.trust_remote_code)
    checkpoint.check_architecture(checkpoint.read_config(folder), reference.name)
    return folder


def adapter_path(reference: ModelReference) -> Path | None:
    """The adapter's folder, downloaded if need be."""
    if reference.adapter is None:
        return None
    folder = Path(reference.adapter).expanduser()
    if folder.is_dir():
        return folder
    folder = hub.snapshot(reference.adapter)
    check_adapter_folder(folder)
    return folder


def content_hash(folder: Path) -> str:
    """sha256 over weights, config and tokenizer: each file's name and sha256, in order."""
    files = [*checkpoint.weight_files(folder), *(folder / name for name in _CONTENT if (folder / name).is_file())]
    return _combine(f"{path.name} {file_hash(path)}" for path in sorted(files))


def fingerprint(reference: ModelReference) -> str:
    """sha256 that changes when the model does. For an artifact its recipe counts: some steps run when it is opened."""
    if reference.kind == "tiny":
        parts = [tiny.spec_hash(reference.name)]
    else:
        path = local_path(reference)
        parts = [file_hash(path) if path.is_file() else content_hash(path)]
        if reference.kind == "artifact" and (path / "recipe.yaml").is_file():
            parts.append(file_hash(path / "recipe.yaml"))
    adapter = adapter_path(reference)
    if adapter is not None:
        parts += [file_hash(adapter / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    return parts[0] if len(parts) == 1 else _combine(parts)


def _combine(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
