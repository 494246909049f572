from __future__ import annotations

import json
from pathlib import Path

import pytest

from infopt.errors import InputError
from infopt.measure.peaks import cached_machine, cpu_cache_bytes, measure_machine
from infopt.protocols import Machine

MACHINE = Machine("cpu", 2e10, {"float32": 1e11}, last_level_cache_bytes=1000, memory_bytes=5)


def test_peaks_of_this_cpu_are_positive() -> None:
    machine = measure_machine("cpu", ("float32",), budget_s=0.02)
    assert machine.read_bytes_per_s
    assert 1e8 < machine.read_bytes_per_s < 1e13
    assert 1e8 < machine.flops["float32"] < 1e15
    assert machine.memory_bytes


def test_a_device_that_cannot_be_synchronised_has_no_peaks() -> None:
    with pytest.raises(InputError, match="cannot be synchronised"):
        measure_machine("mps")


def test_peaks_are_measured_once_per_fingerprint(tmp_path: Path) -> None:
    path, runs = tmp_path / "new" / "peaks.json", []

    def measure() -> Machine:
        runs.append(1)
        return MACHINE

    assert [cached_machine(path, "one", measure) for _ in range(2)] == [MACHINE, MACHINE]
    assert len(runs) == 1
    cached_machine(path, "two", measure)
    assert len(runs) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"fingerprint": "one"}', '{"fingerprint": "one", "machine": {"x": 1}}']
)
def test_a_broken_cache_is_measured_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "peaks.json"
    path.write_text(content)
    assert cached_machine(path, "one", lambda: MACHINE) == MACHINE
    assert json.loads(path.read_text())["machine"]["read_bytes_per_s"] == 2e10


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    assert cpu_cache_bytes(tmp_path) is None
    for index, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert cpu_cache_bytes(tmp_path) == 32 * 2**20
