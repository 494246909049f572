"""Curves over a count or over time: one SVG, no library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#762a83", "#8c510a")
WIDTH, HEIGHT, LEFT, TOP, FOOT = 640, 360, 70, 40, 50
TICKS = 5


@dataclass(frozen=True)
class Curve:
    """`points`: (x, y); `labels`: a word at each point, or none."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()


def plot(title: str, curves: Sequence[Curve], across: str) -> str:
    """All curves in one frame from y = 0, with their names; `across` is what x counts."""
    points = [point for curve in curves for point in curve.points]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    most = max((y for _, y in points), default=0.0) or 1.0
    wide, tall = WIDTH - LEFT - 20, HEIGHT - TOP - FOOT

    def at(x: float, y: float) -> tuple[float, float]:
        share = (x - low) / (high - low) if high > low else 0.5
        return LEFT + wide * share, TOP + tall * (1 - y / most)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11" role="img">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="8" y="18" font-size="13">{escape(title)}</text>',
    ]
    for tick in range(TICKS + 1):
        _, y = at(low, most * tick / TICKS)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + wide}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{most * tick / TICKS:.3g}</text>')
    for edge in dict.fromkeys((low, high)):
        x, _ = at(edge, 0)
        parts.append(f'<text x="{x:.1f}" y="{TOP + tall + 16}" text-anchor="middle">{edge:g}</text>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{TOP + tall + 34}" text-anchor="middle">{escape(across)}</text>')
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        placed = [at(*point) for point in curve.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(placed) <= 40:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in placed]
        for (x, y), label in zip(placed, curve.labels, strict=False):
            parts.append(f'<text x="{x:.1f}" y="{y - 6:.1f}" text-anchor="middle" fill="#555">{escape(label)}</text>')
        parts.append(f'<text x="{LEFT + 8}" y="{TOP + 14 + 14 * number}" fill="{colour}">{escape(curve.name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
