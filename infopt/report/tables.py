"""What every rendering shows of a comparison, as text cells: one row per arm, one row per judgement.

A renderer decides where columns go and what a verdict looks like; which figures are shown, in which unit and order, is
decided here alone. Absent is `–`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from infopt import units
from infopt.comparison import ArmResult, Comparison
from infopt.figures import FIGURES, STATISTICS
from infopt.judgement import DEFAULT_ALPHA, Judgement, Verdict
from infopt.result import Value
from infopt.units import ABSENT, Unit

Group = Literal["speed", "memory", "quality", "verdict"]

_UNIT = re.compile(r"^([-+]?[\d.]+(?:e[-+]?\d+)?)(.*)$")
#: From worst to best; a cell that stands for several gates shows the worst.
SEVERITY = (Verdict.NOT_COMPARABLE, Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS, Verdict.IMPROVED)
#: An ungated judgement decides nothing, so it does not borrow the words of a gate.
INFORMING = {
    Verdict.FAIL: "worse",
    Verdict.PASS: "no worse",
    Verdict.IMPROVED: "better",
    Verdict.INCONCLUSIVE: "undecided",
    Verdict.NOT_COMPARABLE: "not comparable",
}


@dataclass(frozen=True)
class Column:
    """One column of the arms' table; `cells` and `verdicts` hold one entry per arm. `key`: the figure shown."""

    title: str
    key: str
    group: Group
    cells: tuple[str, ...]
    verdicts: tuple[Verdict | None, ...] = ()


@dataclass(frozen=True)
class Row:
    """One judgement as text. `verdict` is None when there was nothing to decide; `word` is what to print for it."""

    figure: str
    baseline: str
    candidate: str
    effect: str
    interval: str
    threshold: str
    verdict: Verdict | None
    word: str
    mde: str
    note: str | None
    is_gated: bool


def worst(verdicts: Iterable[Verdict | None]) -> Verdict | None:
    """The worst verdict, or None when there is none."""
    reached = [verdict for verdict in verdicts if verdict is not None]
    return min(reached, key=SEVERITY.index) if reached else None


def quantity(value: float | None, unit: str) -> str:
    """A stored figure with its unit."""
    return units.figure(value, cast(Unit, unit))


def by_figure(found: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """The figures with the statistics of one figure side by side, otherwise in their own order."""
    names = list(dict.fromkeys(map(_name, found)))
    return sorted(found.items(), key=lambda item: names.index(_name(item[0])))


def _name(key: str) -> str:
    name, _, statistic = key.rpartition(".")
    return name if statistic in STATISTICS and key not in FIGURES else key


def figure_text(key: str, value: Value | None) -> str:
    """A figure of an arm; a difference of shares is in points."""
    if value is None:
        return ABSENT
    return units.points(value.value) if key.endswith(".delta") else quantity(value.value, value.unit)


def range_text(key: str, value: Value) -> str:
    """The interval of a figure of an arm."""
    if value.low is None or value.high is None:
        return ABSENT
    low, high = (figure_text(key, value.model_copy(update={"value": bound})) for bound in (value.low, value.high))
    return between(low, high)


def word(verdict: Verdict | None, is_gated: bool = True) -> str:
    """A verdict for people."""
    if verdict is None:
        return ABSENT
    return verdict.value.replace("_", " ") if is_gated else INFORMING[verdict]


# --- One row per arm -------------------------------------------------------------------------------------------------


def arm_columns(comparison: Comparison) -> tuple[Column, ...]:
    """The columns beside the arm's label. A figure that no arm has is left out."""
    arms = comparison.arms
    columns = [
        _plain(arms, "tok/s", "speed", ("decode_tok_per_s.p50", "throughput_tok_per_s")),
        _plain(arms, "TTFT (ms)", "speed", ("ttft_s.p50",)),
        _plain(arms, "TPOT (ms)", "speed", ("tpot_s.p50",)),
        _plain(arms, "of limit (MBU)", "speed", ("mbu",)),
        _plain(arms, "to make", "speed", ("optimize_s",)),
        _plain(arms, "weights", "memory", ("weights_bytes",)),
        _peak(arms),
        _plain(arms, "KLD (nats)", "quality", ("kld.mean",)),
        _with_spread(arms, "ppl ratio ±", "ppl_ratio"),
        _plain(arms, "same top-1", "quality", ("top1_agreement",)),
        _multiple_choice(arms),
        _with_spread(arms, "retention ±", "mc.retention"),
    ]
    shown = tuple(column for column in columns if any(cell != ABSENT for cell in column.cells))
    return shown + tuple(_gate(comparison, key) for key in gated_figures(comparison))


def gated_figures(comparison: Comparison) -> tuple[str, ...]:
    """Every figure that has a gate in some arm, in the order in which they first appear."""
    keys = (each.figure for judgements in comparison.judgements.values() for each in judgements if each.gate is not None)
    return tuple(dict.fromkeys(keys))


def number(arm: ArmResult, key: str) -> float | None:
    value = arm.figures.get(key)
    return None if value is None else value.value


def _first_present(arms: Sequence[ArmResult], keys: Sequence[str]) -> str:
    return next((key for key in keys if any(number(arm, key) is not None for arm in arms)), keys[0])


def _plain(arms: Sequence[ArmResult], title: str, group: Group, keys: Sequence[str]) -> Column:
    key = _first_present(arms, keys)
    return Column(title, key, group, tuple(_cell(arm.figures.get(key), title) for arm in arms))


def _cell(value: Value | None, title: str) -> str:
    """A number whose unit the title may already name."""
    if value is None or value.value is None:
        return ABSENT
    if "(ms)" in title:
        return units.significant(value.value * 1e3)
    if value.unit in ("tok/s", "nats"):
        return units.significant(value.value)
    return quantity(value.value, value.unit)


def _peak(arms: Sequence[ArmResult]) -> Column:
    key = _first_present(arms, ("device_peak_bytes", "torch_peak_bytes", "host_rss_peak_bytes"))
    return _plain(arms, "peak memory (host)" if key.startswith("host") else "peak memory (device)", "memory", (key,))


def _with_spread(arms: Sequence[ArmResult], title: str, key: str) -> Column:
    return Column(title, key, "quality", tuple(spread(arm.figures.get(key)) for arm in arms))


def spread(value: Value | None) -> str:
    """A ratio with the larger half of its interval: `1.006 ±0.002`."""
    if value is None or value.value is None:
        return ABSENT
    if value.low is None or value.high is None:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} ±{max(value.high - value.value, value.value - value.low):.3f}"


def _multiple_choice(arms: Sequence[ArmResult]) -> Column:
    cells = []
    for arm in arms:
        flips = number(arm, "mc.flips_share")
        cell = units.points(number(arm, "mc.delta"))
        cells.append(f"{cell} ({units.percent(flips)})" if flips is not None and cell != ABSENT else cell)
    return Column("choice Δ (flips)", "mc.delta", "quality", tuple(cells))


def _gate(comparison: Comparison, key: str) -> Column:
    verdicts: list[Verdict | None] = []
    cells: list[str] = []
    for arm in comparison.arms:
        judged = [each for each in comparison.judgements.get(arm.label, ()) if each.figure == key and each.gate is not None]
        verdict = None if arm.error else worst(each.verdict for each in judged)
        verdicts.append(verdict)
        cells.append("ERROR" if arm.error else "baseline" if arm.label == comparison.baseline else word(verdict))
    return Column(key, key, "verdict", tuple(cells), tuple(verdicts))


# --- One row per judgement -------------------------------------------------------------------------------------------


def verdict_rows(judgements: Iterable[Judgement]) -> tuple[Row, ...]:
    """Gated judgements first, each group in its own order."""
    return tuple(_row(each) for each in sorted(judgements, key=lambda each: each.gate is None))


def _row(judged: Judgement) -> Row:
    is_gated = judged.gate is not None
    return Row(
        figure=judged.figure,
        baseline=quantity(judged.baseline, judged.unit),
        candidate=quantity(judged.candidate, judged.unit),
        effect=effect_text(judged, judged.effect),
        interval=interval_text(judged),
        threshold=_threshold(judged),
        verdict=judged.verdict,
        word=word(judged.verdict, is_gated),
        mde=_mde(judged),
        note=judged.note,
        is_gated=is_gated,
    )


def effect_text(judged: Judgement, value: float | None) -> str:
    """An effect or bound in the terms of the judgement: `0.912×`, `-1.7 pt`, `0.0123 nats`."""
    if value is None:
        return ABSENT
    if judged.comparison == "ratio":
        return units.figure(value, "ratio")
    if judged.comparison == "difference" and judged.unit == "share":
        return units.points(value)
    return quantity(value, judged.unit)


def interval_text(judged: Judgement) -> str:
    """`0.901 to 0.924×`, with its level where that is not 95 %."""
    if judged.low is None or judged.high is None:
        return ABSENT
    text = between(effect_text(judged, judged.low), effect_text(judged, judged.high))
    is_usual = judged.alpha is None or abs(judged.alpha - DEFAULT_ALPHA) < 1e-9
    return text if is_usual else f"{text} at {level(judged.alpha)}"


def between(low: str, high: str) -> str:
    """Two formatted bounds, their unit once when they share it."""
    bare, unit = _UNIT.match(low), _UNIT.match(high)
    shares = bare is not None and unit is not None and bare[2] == unit[2]
    return f"{bare[1] if bare and shares else low} to {high}"


def level(alpha: float | None) -> str:
    """The confidence of an interval: 0.0125 → `98.75 %`."""
    return ABSENT if alpha is None else f"{(1 - alpha) * 100:.4g} %"


def _threshold(judged: Judgement) -> str:
    if judged.gate is not None:
        return judged.gate
    if judged.tau is None:
        return ABSENT
    tau = f"{judged.tau * 100:.1f} pt" if judged.comparison == "difference" else units.percent(judged.tau)
    return f"{tau} (default)" if judged.comparison != "value" else ABSENT


def _mde(judged: Judgement) -> str:
    if judged.mde is None:
        return ABSENT
    return f"{judged.mde * 100:.1f} pt" if judged.comparison == "difference" else units.percent(judged.mde)
