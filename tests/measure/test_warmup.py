from __future__ import annotations

from scipy import stats as oracle

from infopt.measure.warmup import Warmup, warm_up


def play(values: list[float], **options: object) -> tuple[Warmup, int]:
    source = iter(values)
    done = warm_up(lambda: next(source), **options)  # type: ignore[arg-type]
    return done, len(values) - len(list(source))


def test_the_first_block_stops_at_the_first_five_without_trend() -> None:
    falling_then_flat = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 2.01, 1.99, 2.0, 2.01, 5.0]

    def has_trend(values: list[float]) -> bool:
        return float(oracle.linregress(range(5), values).pvalue) < 0.05

    first = next(n for n in range(5, 13) if not has_trend(falling_then_flat[n - 5 : n]))
    assert play(falling_then_flat, is_first_block=True, cap=20) == (Warmup(first, True), first)
    assert 8 < first < 13


def test_the_cap_is_reported() -> None:
    assert play([100.0 - i for i in range(30)], is_first_block=True, cap=12) == (Warmup(12, False), 12)


def test_later_blocks_run_a_fixed_few() -> None:
    assert play([3.0, 2.0, 1.0], is_first_block=False) == (Warmup(1, True), 1)
    assert play([3.0, 2.0, 1.0], is_first_block=False, later=3) == (Warmup(3, True), 3)
