"""Plain text for calibration and perplexity: two bundled, disjoint parts of the Jargon File, or the user's own file.

A text becomes windows of equal length, each judged on its own, so figures do not depend on how many are taken at once.
Calibration and evaluation text must not share passages, see `infopt.data.overlap`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from infopt.data.jsonl import read_file
from infopt.errors import InputError

BUNDLED = Path(__file__).parent / "bundled"

Part = Literal["calibration", "evaluation"]


def text_path(text: str, part: Part) -> Path:
    """Where a recipe's `text:` lies: `bundled` is this package's text for that part, all else the path of a file."""
    return BUNDLED / f"{part}.txt" if text == "bundled" else Path(text)


def read_text(text: str, part: Part) -> str:
    """The text itself. Raises InputError when the file is missing, not UTF-8, or blank."""
    return read_file(text_path(text, part), "give plain text in UTF-8, or `bundled`")


def content_hash(content: str | bytes) -> str:
    """sha256, in hex, of the content (text as UTF-8)."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def windows(ids: Sequence[int], length: int, limit: int | None = None, seed: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Cuts token ids into consecutive windows of `length` tokens, `limit` of them at most; a shorter rest is dropped.

    The first ones, or with a `seed` a random choice of them in the order of the text. Raises InputError when the text
    does not fill one window.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise InputError(f"windows of {length} tokens, at most {limit}: a window needs 2 tokens, and one window is the least")
    count = len(ids) // length
    if count == 0:
        raise InputError(
            f"the text has {len(ids)} tokens; one window needs {length}", hint="give a longer text or shorter windows"
        )
    wanted = count if limit is None else min(limit, count)
    chosen = range(wanted) if seed is None else sorted(random.Random(seed).sample(range(count), wanted))
    return tuple(tuple(ids[i * length : (i + 1) * length]) for i in chosen)
