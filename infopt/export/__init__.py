"""`infopt export`: models in the formats of other engines, loaded back in a reader of theirs before they are published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from infopt.errors import InputError, unknown
from infopt.protocols import Progress
from infopt.settings import LoadOptions

if TYPE_CHECKING:
    from infopt.export.record import Export

FORMATS = {"gguf": "q8_0", "onnx": "int4"}
"""Format → the type that is meant when none is asked for."""


def export(
    model: str,
    to: str,
    kind: str | None,
    out: Path | None,
    options: LoadOptions,
    progress: Progress = lambda line: None,
) -> Export:
    """Writes `model` to `out` (default: named after model and type, here) in format `to` and storage type `kind`.

    Raises InputError for an unknown format or type, a target that exists, or a model the format has no place for;
    LoadBackError when the export does not read back as what was written; DiskFullError.
    """
    if to not in FORMATS:
        raise InputError(unknown("format", to, FORMATS), hint="infopt export --help")
    from infopt import host
    from infopt.arms import file_name

    kind = (kind or FORMATS[to]).lower()
    host.set_threads(options.threads)
    if to == "gguf":
        from infopt.export import to_gguf

        return to_gguf.export(model, out or Path(f"{file_name(model)}-{kind}.gguf"), kind, options, progress)
    from infopt.export import to_onnx

    return to_onnx.export(model, out or Path(f"{file_name(model)}-onnx-{kind}"), kind, options, progress)
