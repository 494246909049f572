"""Interval (forest) plots as inline SVG: per figure, one row per candidate, the threshold as a line.

Colours come from the page's CSS variables, so that the plot follows light and dark. Widths are in SVG user units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from infopt import figures
from infopt.comparison import Comparison
from infopt.judgement import Judgement
from infopt.report.tables import effect_text, word

_WIDTH, _LABEL, _RIGHT, _ROW, _TOP, _BOTTOM = 580, 172, 112, 34, 26, 30
_PLOT = _WIDTH - _LABEL - _RIGHT
_TICKS = 5


@dataclass(frozen=True)
class Bar:
    """One candidate: its judgement and the ratio of each pair of blocks, where blocks were stored."""

    label: str
    judged: Judgement
    dots: tuple[float, ...] = ()


def plots(comparison: Comparison) -> list[tuple[str, str]]:
    """(figure, svg) for every figure with an interval, gated figures first."""
    bars: dict[tuple[bool, str, str], list[Bar]] = {}
    for label, judgements in comparison.judgements.items():
        for each in judgements:
            if each.effect is not None and each.low is not None and each.high is not None:
                dots = _ratios(comparison, label, each.figure) if each.comparison == "ratio" else ()
                bars.setdefault((each.gate is None, each.figure, each.comparison), []).append(Bar(label, each, dots))
    ordered = sorted(bars.items(), key=lambda item: item[0][0])
    return [(figure, plot(figure, found)) for (_, figure, _), found in ordered]


def _ratios(comparison: Comparison, label: str, key: str) -> tuple[float, ...]:
    baseline = comparison.arm(comparison.baseline).blocks.get(key, ())
    candidate = comparison.arm(label).blocks.get(key, ())
    return tuple(c / b for b, c in zip(baseline, candidate, strict=False) if b and c)


def plot(figure: str, bars: Sequence[Bar]) -> str:
    """The plot of one figure; ratios stand on a logarithmic axis, everything else on a linear one."""
    first = bars[0].judged
    scale = _Scale.of(bars)
    height = _TOP + _ROW * len(bars) + _BOTTOM
    bottom = height - _BOTTOM
    parts = [
        f'<svg class="forest" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(figure)}: effect per arm">',
        *_limits(first, scale, bottom),
        *_axis(first, scale, bottom),
        *(line for index, bar in enumerate(bars) for line in _bar(bar, _TOP + _ROW * (index + 0.5), scale)),
        "</svg>",
    ]
    return "\n".join(parts)


@dataclass(frozen=True)
class _Scale:
    """Data to horizontal position."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def of(cls, bars: Sequence[Bar]) -> _Scale:
        is_log = bars[0].judged.comparison == "ratio"
        values = [value for bar in bars for value in (bar.judged.low, bar.judged.high, *bar.dots) if value is not None]
        values += [line for line in (_neutral(bars[0].judged), _threshold(bars[0].judged)) if line is not None]
        low, high = min(values), max(values)
        if is_log:
            low, high = math.log(low), math.log(high)
        margin = (high - low) * 0.06 or 0.05
        return cls(low - margin, high + margin, is_log)

    def x(self, value: float) -> float:
        place = math.log(value) if self.is_log else value
        return round(_LABEL + _PLOT * (place - self.low) / (self.high - self.low), 1)

    @property
    def ticks(self) -> list[float]:
        low, high = (math.exp(self.low), math.exp(self.high)) if self.is_log else (self.low, self.high)
        step = 10 ** math.floor(math.log10((high - low) / _TICKS))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= _TICKS)
        first = math.ceil(low / step)
        ticks = [round(step * i, 12) for i in range(first, math.floor(high / step) + 1)]
        kept: list[float] = []
        for tick in ticks:
            if not kept or self.x(tick) - self.x(kept[-1]) >= 56:
                kept.append(tick)
        return kept


def _neutral(judged: Judgement) -> float | None:
    return {"ratio": 1.0, "difference": 0.0}.get(judged.comparison)


def _threshold(judged: Judgement) -> float | None:
    """Where harm starts to be too much, on the axis of the effect."""
    if judged.tau is None or judged.comparison == "value":
        return judged.tau
    is_lower_better = figures.find(judged.figure)[0].better == "lower"
    if judged.comparison == "difference":
        return judged.tau if is_lower_better else -judged.tau
    return 1 + judged.tau if is_lower_better else 1 - judged.tau


def _limits(judged: Judgement, scale: _Scale, bottom: float) -> list[str]:
    parts = []
    threshold = _threshold(judged)
    if threshold is not None:
        x = scale.x(threshold)
        is_right_bad = figures.find(judged.figure)[0].better == "lower"
        left, width = (x, _LABEL + _PLOT - x) if is_right_bad else (_LABEL, x - _LABEL)
        if judged.gate is not None:
            parts.append(f'<rect class="harm" x="{left}" y="{_TOP}" width="{width:.1f}" height="{bottom - _TOP}"/>')
        parts.append(f'<line class="threshold" x1="{x}" x2="{x}" y1="{_TOP - 4}" y2="{bottom}"/>')
        anchor = "end" if x > _LABEL + _PLOT / 2 else "start"
        text = judged.gate or f"default threshold {effect_text(judged, threshold)}"
        parts.append(f'<text class="threshold-label" x="{x}" y="{_TOP - 10}" text-anchor="{anchor}">{escape(text)}</text>')
    neutral = _neutral(judged)
    if neutral is not None:
        x = scale.x(neutral)
        parts.append(f'<line class="neutral" x1="{x}" x2="{x}" y1="{_TOP}" y2="{bottom}"/>')
    return parts


def _axis(judged: Judgement, scale: _Scale, bottom: float) -> list[str]:
    parts = [f'<line class="axis" x1="{_LABEL}" x2="{_LABEL + _PLOT}" y1="{bottom}" y2="{bottom}"/>']
    for tick in scale.ticks:
        x = scale.x(tick)
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        text = f"{tick:g}×" if judged.comparison == "ratio" else effect_text(judged, tick)
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>')
    return parts


def _bar(bar: Bar, y: float, scale: _Scale) -> list[str]:
    judged = bar.judged
    if judged.effect is None or judged.low is None or judged.high is None:
        return []
    tone = tone_of(judged)
    low, high, middle = scale.x(judged.low), scale.x(judged.high), scale.x(judged.effect)
    title = f"{bar.label}: {effect_text(judged, judged.effect)}, {word(judged.verdict, judged.gate is not None)}"
    label = bar.label if len(bar.label) <= 24 else f"{bar.label[:23]}…"
    dots = [f'<circle class="dot" cx="{scale.x(dot)}" cy="{y - 8:.1f}" r="2"/>' for dot in bar.dots]
    return [
        f'<g class="{tone}"><title>{escape(title)}</title>',
        f'<text class="label" x="0" y="{y + 4:.1f}">{escape(label)}</text>',
        *dots,
        f'<line class="interval" x1="{low}" x2="{high}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<circle class="estimate" cx="{middle}" cy="{y:.1f}" r="4.5"/>',
        f'<text class="value" x="{_WIDTH - _RIGHT + 16}" y="{y + 4:.1f}">{escape(effect_text(judged, judged.effect))}</text>',
        "</g>",
    ]


def tone_of(judged: Judgement) -> str:
    """CSS class: a verdict's name in lower case, or `informs` without a gate."""
    return "informs" if judged.gate is None or judged.verdict is None else judged.verdict.value.lower()
