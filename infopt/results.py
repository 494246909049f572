"""`infopt results`: what lies in the results folder; showing it, exporting it, removing it.

A folder is a result when it holds `run.json` or `compare.json`. One that holds only samples was cut off before the
end, and is named as such: its samples are safe, its figures were never computed.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from infopt import units
from infopt.comparison import Comparison, read_comparison
from infopt.errors import DiskFullError, InputError
from infopt.report import exports, summary
from infopt.result import Run, read_run, write_atomic

DEFAULT_FOLDER = Path("results")
Status = Literal["complete", "incomplete", "half-written", "unreadable"]
_DOCUMENTS = {"run": "run.json", "comparison": "compare.json"}
_NAME = re.compile(r"\d{8}T\d{6}Z-")
_RERUN = "run the bench or the comparison again; `infopt results rm` removes the folder"


@dataclass(frozen=True)
class Entry:
    """One folder. `about` is one line: what it holds, or what is wrong with it."""

    folder: Path
    kind: Literal["run", "comparison"] | None
    status: Status
    created_utc: str | None
    about: str

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def entries(folder: Path = DEFAULT_FOLDER) -> tuple[Entry, ...]:
    """Every result directly in `folder`, oldest first by name. Raises InputError when there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="infopt bench writes the first result")
    candidates = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("."))
    return tuple(entry for path in candidates if (entry := entry_of(path)) is not None)


def entry_of(folder: Path) -> Entry | None:
    """The folder as one line, or None when it is no result at all."""
    kind = _kind(folder)
    if kind is None:
        return Entry(folder, None, "half-written", None, _cut_off(folder)) if _has_samples(folder) else None
    try:
        result = load(folder)
    except InputError as error:
        return Entry(folder, kind, "unreadable", None, str(error))
    about = result.incomplete_reason or "no reason recorded"
    if result.is_complete:
        about = _about(result)
    return Entry(folder, kind, "complete" if result.is_complete else "incomplete", result.created_utc, about)


def load(path: Path) -> Run | Comparison:
    """The result in a folder, or whose document `path` is. Raises InputError, which names a half-written folder as such."""
    folder = path.parent if path.name in _DOCUMENTS.values() else path
    kind = _kind(folder)
    if kind == "run":
        return read_run(folder)
    if kind == "comparison":
        return read_comparison(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="infopt results list")
    if _has_samples(folder):
        raise InputError(f"{folder}: half-written, {_cut_off(folder)}", hint=_RERUN)
    raise InputError(f"{folder}: holds no result; expected run.json or compare.json", hint="infopt results list")


def export(path: Path, name: str, output: Path | None = None) -> tuple[Path, ...] | str:
    """Renders a stored result. Without `output`, the text of a format that makes one file.

    With it, the files written: into the folder `output`, or to that very file when the format makes only one.
    Raises InputError, DiskFullError.
    """
    made = exports.export(load(path), name)
    if output is None:
        if len(made) > 1:
            raise InputError(f"{name} makes {len(made)} files: {', '.join(made)}", hint="name a folder with -o FOLDER")
        return next(iter(made.values()))
    is_folder = output.is_dir() or len(made) > 1 or (not output.suffix and not output.exists())
    targets = {(output / file if is_folder else output): text for file, text in made.items()}
    try:
        for target, text in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, text)
    except FileExistsError as error:
        raise InputError(f"{error.filename}: a file stands where a folder is wanted", hint="choose another -o") from None
    except OSError as error:
        raise DiskFullError(f"{output}: cannot be written ({error.strerror})") from None
    return tuple(targets)


def remove(folder: Path) -> None:
    """Removes a result's folder, half-written ones too. Raises InputError for anything that is no result."""
    if folder.is_symlink():
        raise InputError(f"{folder}: a link, not a results folder", hint="remove the link itself")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="infopt results list")
    if _kind(folder) is None and not _has_samples(folder):
        raise InputError(f"{folder}: not a results folder, so it is left alone", hint="infopt results list")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{folder}: holds the folder you are in", hint="change to another folder first")
    shutil.rmtree(folder)


def _kind(folder: Path) -> Literal["run", "comparison"] | None:
    if (folder / _DOCUMENTS["run"]).is_file():
        return "run"
    return "comparison" if (folder / _DOCUMENTS["comparison"]).is_file() else None


def _has_samples(folder: Path) -> bool:
    """Samples lie in a run's folder, or below `arms` in a comparison's, which bears a result's name."""
    if (folder / "samples.jsonl").is_file():
        return True
    return bool(_NAME.match(folder.resolve().name)) and next(folder.glob("arms/*/samples.jsonl"), None) is not None


def _cut_off(folder: Path) -> str:
    wanted = "run.json" if (folder / "samples.jsonl").is_file() else "compare.json"
    return f"samples but no {wanted}: it was cut off before the end"


def _about(result: Run | Comparison) -> str:
    if isinstance(result, Comparison):
        return f"{summary.headline(result)}: {', '.join(arm.label for arm in result.candidates)} against {result.baseline}"
    tpot = result.figures.get("tpot_s.p50")
    figure = f", TPOT {units.duration(tpot.value)}" if tpot and tpot.value is not None else ""
    return f"{result.name}: {result.arm.model} on {result.arm.engine}, {summary.workload(result.workload)}{figure}"
