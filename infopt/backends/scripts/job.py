"""What every worker script shares: its job, and the line to the process that waits for it. Standard library only.

A job is a folder: `model/` to start from, `job.json` with options and calibration token ids, `out/` for the result.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Job:
    """`options` are the technique's, `ids` the calibration windows; the result goes to the folder `out`."""

    model: Path
    out: Path
    options: dict[str, Any]
    ids: list[list[int]]
    device: str
    seed: int
    lines: TextIO

    @classmethod
    def open(cls) -> Job:
        """The job that this process was started for. Ends the process when the one that waits for it is gone."""
        # Libraries print to stdout; only `say` reaches the parent.
        lines = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        folder = Path(sys.argv[1])
        given = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        return cls(folder / "model", folder / "out", lines=lines, **given)

    def say(self, line: str) -> None:
        """One line of progress."""
        print(" ".join(line.split()), file=self.lines)

    def say_bars(self) -> None:
        """From now on tqdm's bars are not drawn: their titles are said."""
        import tqdm

        bar: Any = tqdm.std.tqdm
        make = bar.__init__

        def silent(own: Any, *arguments: Any, **named: Any) -> None:
            make(own, *arguments, **named | {"disable": True})
            if named.get("desc"):
                self.say(named["desc"])

        def title(own: Any, text: str | None = None, refresh: bool = True) -> None:
            self.say(text or "")

        bar.__init__, bar.set_description = silent, title


def _end_with_parent() -> None:
    """The parent holds the other end of stdin and never writes: it ends when the parent does, however that came about."""
    os.read(0, 1)
    os._exit(1)
