from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import pytest
import torch

from infopt.errors import InputError
from infopt.measure.clock import WallClock
from infopt.measure.memory import MemoryWatch, host_peak_bytes, reset_host_peak


@pytest.mark.parametrize("device", ["mps", "xpu:0", "meta"])
def test_a_device_that_cannot_be_synchronised_is_refused_by_name(device: str) -> None:
    with pytest.raises(InputError, match=f"'{device}'.*known: cpu, cuda"):
        WallClock(device)


def test_the_clock_never_goes_back() -> None:
    clock = WallClock("cpu")
    clock.synchronise()
    times = [clock.now() for _ in range(100)]
    assert times == sorted(times)
    before = clock.now()
    clock.sleep(-1.0)
    clock.sleep(0.01)
    assert clock.now() - before >= 0.01


def test_the_host_peak_is_no_less_than_what_is_held() -> None:
    block = torch.ones(64 * 2**20 // 4)
    held = psutil.Process().memory_info().rss
    peak = host_peak_bytes()
    del block
    assert held > 64 * 2**20
    assert peak
    assert peak >= 0.98 * held


def test_the_peak_can_be_forgotten_where_the_kernel_allows(tmp_path: Path) -> None:
    assert not reset_host_peak(tmp_path / "missing")
    if not reset_host_peak():
        pytest.skip("this kernel does not let a process reset its peak")
    size = 64 * 2**20
    grown = mmap.mmap(-1, size)  # pages of its own: an allocator may serve a tensor from what it already holds
    grown.write(b"1" * size)
    high = host_peak_bytes()
    grown.close()
    reset_host_peak()
    low = host_peak_bytes()
    assert high
    assert low
    assert high - low >= 0.5 * size


def test_without_the_kernels_figure_the_process_maximum_stands_in(tmp_path: Path) -> None:
    assert (host_peak_bytes(tmp_path) or 0) > 2**20


class FakeGpu:
    def __init__(self, *used: int | None) -> None:
        self.used = list(used)

    def used_bytes(self) -> int | None:
        return self.used.pop(0) if len(self.used) > 1 else self.used[0]


def test_the_device_peak_leaves_out_what_was_used_before() -> None:
    watch = MemoryWatch("cpu", FakeGpu(100, 400, 900, 300))  # type: ignore[arg-type]
    for _ in range(3):
        watch.sample()
    found = watch.values()
    assert found["device_peak_bytes"].value == 800
    assert found["host_rss_peak_bytes"].value
    assert found["torch_peak_bytes"].value is None
    assert found["torch_peak_bytes"].reason == "torch keeps no peak for the CPU"


def test_what_the_driver_does_not_tell_is_null_with_a_reason() -> None:
    assert MemoryWatch("cpu", None, "device cpu is no NVIDIA GPU").values()["device_peak_bytes"].reason == (
        "device cpu is no NVIDIA GPU"
    )
    assert MemoryWatch("cpu", FakeGpu(None)).values()["device_peak_bytes"].value is None  # type: ignore[arg-type]
