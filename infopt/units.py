"""Units, and the only functions that turn a number into text for people.

Stored names carry their unit (`ttft_s`, `peak_bytes`, `energy_j`); nothing else in infopt formats a figure.
A missing value is `None` and is shown as `–`, never as 0.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from infopt.errors import InputError

Unit = Literal["s", "tok/s", "req/s", "bytes", "J", "J/tok", "W", "usd/Mtok", "share", "ratio", "nats", "tokens", "count"]

ABSENT = "–"
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?\s*$")
_SIZE_FACTOR = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_PERCENT = re.compile(r"^\s*([+-]?\d+(?:\.\d+)?)\s*%\s*$")


def parse_size(text: str | int) -> int:
    """Bytes from `4GiB`, `500 MB` or a plain number of bytes. Raises InputError."""
    match = _SIZE.match(str(text))
    if not match:
        raise InputError(f"not a size: {text!r}; allowed: a number with B, kB, MB, GB, KiB, MiB or GiB", hint="e.g. 4GiB")
    return int(float(match[1]) * _SIZE_FACTOR[match[2] or "B"])


def parse_share(value: str | float) -> float:
    """A share from `3%` (0.03) or a plain number (0.03). Raises InputError."""
    if isinstance(value, str):
        match = _PERCENT.match(value)
        if match:
            return float(match[1]) / 100
        try:
            value = float(value)
        except ValueError:
            raise InputError(f"not a share: {value!r}; allowed: a percentage or a number", hint="e.g. 3% or 0.03") from None
    return float(value)


def duration(seconds: float | None) -> str:
    """Seconds for people: `1.23 s`, `45.6 ms`, `789 us`, `2 min 05 s`."""
    if seconds is None or math.isnan(seconds):
        return ABSENT
    size = abs(seconds)
    if size >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if size >= 1 or size == 0:
        return f"{significant(seconds)} s"
    if size >= 1e-3:
        return f"{significant(seconds * 1e3)} ms"
    return f"{significant(seconds * 1e6)} us"


def size(count: float | None) -> str:
    """Bytes for people in decimal units: `98.4 MB`."""
    if count is None or math.isnan(count):
        return ABSENT
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            return f"{significant(count / factor)} {unit}"
    return f"{int(count)} B"


def percent(share: float | None, *, signed: bool = False) -> str:
    """A share for people: 0.034 → `3.4 %`."""
    if share is None or math.isnan(share):
        return ABSENT
    value = share * 100
    digits = 1 if abs(value) < 100 else 0
    return f"{value:+.{digits}f} %" if signed else f"{value:.{digits}f} %"


def points(share: float | None) -> str:
    """A difference of shares for people, in percentage points: -0.017 → `-1.7 pt`."""
    return ABSENT if share is None or math.isnan(share) else f"{share * 100:+.1f} pt"


def significant(value: float | None, digits: int = 3) -> str:
    """A plain number with `digits` significant digits and no exponent between 1e-4 and 1e6."""
    if value is None or math.isnan(value):
        return ABSENT
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude >= 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def figure(value: float | None, unit: Unit) -> str:
    """Any stored figure with its unit, ready for a table cell."""
    if value is None or math.isnan(value):
        return ABSENT
    if unit == "s":
        return duration(value)
    if unit == "bytes":
        return size(value)
    if unit == "share":
        return percent(value)
    if unit == "count":
        return f"{value:g}"
    if unit == "ratio":
        return f"{value:.3f}×"
    return f"{significant(value)} {unit}"
