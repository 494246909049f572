"""Which unit got how many bits, and what rounding it alone costs: one SVG, no library."""

from __future__ import annotations

import math
from html import escape
from typing import Any

COLOURS = {2: "#b2182b", 3: "#ef8a62", 4: "#fddbc7", 5: "#d1e5f0", 6: "#67a9cf", 8: "#2166ac"}
CELL, LEFT, TOP = 22, 150, 40


def plot(found: dict[str, Any]) -> str:
    """The choice as an SVG: a row per kind of unit, a column per block; width as colour and number, KLD as a tooltip.

    `found`: what `description` gives. A unit's height in its cell is its KLD at the narrowest width, on a logarithmic scale.
    """
    units = found["units"]
    kinds = list(dict.fromkeys(", ".join(name.rpartition(".")[2] for name in unit["layers"]) for unit in units))
    widths = sorted({int(width) for unit in units for width in unit["bytes"]})
    worst = [max(unit["kld"][widths[0]], 1e-12) for unit in units]
    low, high = math.log(min(worst)), math.log(max(worst))
    columns = 1 + max(_block(unit) for unit in units)
    width, height = LEFT + CELL * columns + 10, TOP + 2 * CELL * len(kinds) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11" role="img">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="8" y="18" font-size="13">Bits per unit; predicted KLD {found["predicted_kld"]:.3g}, measured '
        f"{found['measured_kld']:.3g} nats</text>",
    ]
    for row, kind in enumerate(kinds):
        parts.append(f'<text x="8" y="{TOP + 2 * CELL * row + 27}">{escape(kind)}</text>')
    for unit, cost in zip(units, worst, strict=True):
        row = kinds.index(", ".join(name.rpartition(".")[2] for name in unit["layers"]))
        tall = 8 + (2 * CELL - 12) * ((math.log(cost) - low) / (high - low) if high > low else 1)
        x, bottom = LEFT + CELL * _block(unit), TOP + 2 * CELL * (row + 1)
        costs = ", ".join(f"{w} bits {unit['kld'][w]:.2g}" for w in widths)
        parts.append(
            f'<g><title>block {_block(unit)}: {escape(costs)}</title><rect x="{x}" y="{bottom - tall:.1f}" width="{CELL - 2}" '
            f'height="{tall:.1f}" fill="{COLOURS[unit["bits"]]}" stroke="#555" stroke-width="0.5"/>'
            f'<text x="{x + CELL / 2 - 1}" y="{bottom - 4}" text-anchor="middle">{unit["bits"]}</text></g>'
        )
    foot = TOP + 2 * CELL * len(kinds) + 18
    ends = f"KLD when that unit alone has {widths[0]} bits, {min(worst):.2g} to {max(worst):.2g} nats"
    parts.append(f'<text x="{LEFT}" y="{foot}">block 0 … {columns - 1}; height: {escape(ends)}, logarithmic</text></svg>')
    return "\n".join(parts) + "\n"


def _block(unit: dict[str, Any]) -> int:
    return next(int(part) for part in unit["layers"][0].split(".") if part.isdigit())
