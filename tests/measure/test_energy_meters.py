from __future__ import annotations

from pathlib import Path

import pytest
from fakes import FakeClock

from infopt.measure.energy import (
    Counter,
    CounterMeter,
    NoEnergy,
    PolledMeter,
    idle_power_w,
    open_meter,
    rapl_counters,
)
from infopt.measure.nvml import Gpu, open_gpu


@pytest.fixture(autouse=True)
def _no_real_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU, torch would be asked which of NVML's devices is meant."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


class FakeNvml:
    """The calls of pynvml that infopt makes; what is None is not supported by this device."""

    class NVMLError(Exception):
        pass

    def __init__(self, clock: FakeClock, *, millijoules_per_s: float | None = None, milliwatts: float | None = None) -> None:
        self.clock, self.millijoules_per_s, self.milliwatts = clock, millijoules_per_s, milliwatts
        self.reasons = 0

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        if index > 1:
            raise self.NVMLError("Invalid Argument")
        return f"gpu{index}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> float:  # noqa: N802
        if self.millijoules_per_s is None:
            raise self.NVMLError("Not Supported")
        return self.clock.now() * self.millijoules_per_s

    def nvmlDeviceGetPowerUsage(self, handle: str) -> float:  # noqa: N802
        if self.milliwatts is None:
            raise self.NVMLError("Not Supported")
        return self.milliwatts

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:  # noqa: N802
        return self.reasons


def gpu(nvml: FakeNvml) -> Gpu:
    found, reason = open_gpu("cuda:1", nvml)
    assert found, reason
    return found


def test_the_counter_is_preferred_and_read_at_both_ends() -> None:
    clock = FakeClock()
    meter = open_meter("cuda:1", clock.now, gpu(FakeNvml(clock, millijoules_per_s=300_000, milliwatts=1.0)))
    meter.begin()
    clock.sleep(6.0)
    energy = meter.end()
    assert energy.joules == pytest.approx(1800.0)
    assert energy.seconds == pytest.approx(6.0)
    assert energy.flags == ("energy.method: NVML energy counter, GPU board",)


def test_a_short_window_is_labelled() -> None:
    clock = FakeClock()
    meter = CounterMeter([Counter(clock.now)], "counter", clock.now)
    meter.begin()
    clock.sleep(2.0)
    assert meter.end().flags == ("energy.method: counter", "energy.short_window: 2.0 s, 5 s wanted")


def test_polled_power_is_the_labelled_fallback() -> None:
    clock = FakeClock()
    meter = open_meter("cuda:1", clock.now, gpu(FakeNvml(clock, milliwatts=250_000)))
    assert isinstance(meter, PolledMeter)
    meter.begin()
    clock.sleep(8.0)
    energy = meter.end()
    assert energy.joules == pytest.approx(250.0 * 8.0)
    assert "polled" in energy.flags[0]


def test_polled_power_is_integrated_by_trapezoids() -> None:
    clock = FakeClock()
    watts = iter([0.0, 100.0, 300.0])
    meter = PolledMeter(lambda: next(watts), "polled", clock.now, period_s=None)
    meter.begin()
    clock.sleep(2.0)
    meter.poll()
    clock.sleep(4.0)
    assert meter.end().joules == pytest.approx(2.0 * 50 + 4.0 * 200)


def test_a_lost_poll_makes_the_window_null() -> None:
    clock = FakeClock()
    watts: list[float | None] = [10.0, None]
    meter = PolledMeter(lambda: watts.pop(0), "polled", clock.now, period_s=None)
    meter.begin()
    clock.sleep(1.0)
    assert meter.end().joules is None


def test_the_polling_thread_ends_with_the_window() -> None:
    clock = FakeClock()
    meter = PolledMeter(lambda: 1.0, "polled", clock.now, period_s=1e-4)
    for _ in range(2):
        meter.begin()
        thread = meter._thread
        assert thread
        assert thread.is_alive()
        meter.end()
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("readings", "wrap", "joules", "reason"),
    [
        ((10.0, 35.0), None, 25.0, None),
        ((90.0, 5.0), 100.0, 15.0, None),
        ((90.0, 5.0), None, None, "went back"),
        ((90.0, 90.0), None, None, "did not tick"),
        ((None, 5.0), None, None, "could not be read"),
    ],
)
def test_what_a_counter_may_do(
    readings: tuple[float | None, float], wrap: float | None, joules: float | None, reason: str | None
) -> None:
    clock, values = FakeClock(), iter(readings)
    meter = CounterMeter([Counter(lambda: next(values), wrap)], "counter", clock.now)
    meter.begin()
    clock.sleep(6.0)
    energy = meter.end()
    assert energy.joules == joules
    if reason:
        assert reason in (energy.reason or "")
        assert energy.flags == (f"energy.missing: {energy.reason}",)


def test_rapl_sums_packages_and_leaves_their_parts_out(tmp_path: Path) -> None:
    for zone, microjoules in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 5_000_000), ("intel-rapl:0:0", 99_000_000)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{microjoules}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("10000000\n")
    clock = FakeClock()
    meter = open_meter("cpu", clock.now, powercap=tmp_path)
    meter.begin()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("4500000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000")
    clock.sleep(6.0)
    energy = meter.end()
    assert energy.joules == pytest.approx(1.5 + 6.0)
    assert energy.method == "RAPL, CPU packages"
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert rapl_counters(tmp_path) == []


def test_without_any_meter_there_is_a_reason(tmp_path: Path) -> None:
    clock = FakeClock()
    cpu = open_meter("cpu", clock.now, powercap=tmp_path)
    assert isinstance(cpu, NoEnergy)
    cpu.begin()
    assert cpu.end().joules is None
    assert "no readable RAPL counter" in (cpu.end().reason or "")
    silent = open_meter("cuda", clock.now, gpu(FakeNvml(clock)))
    assert "neither energy nor power" in (silent.end().reason or "")
    assert open_meter("cuda", clock.now, None, "no driver").end().reason == "no driver"


def test_idle_power_is_joules_over_the_idle_time() -> None:
    clock = FakeClock()
    meter = CounterMeter([Counter(lambda: 40.0 * clock.now())], "counter", clock.now)
    assert idle_power_w(meter, clock, 5.0) == pytest.approx(40.0)
    assert clock.now() == 105.0
    assert idle_power_w(NoEnergy("none"), clock, 5.0) is None


def test_a_gpu_that_is_not_there_is_none_with_a_reason() -> None:
    nvml = FakeNvml(FakeClock())
    assert open_gpu("cpu", nvml) == (None, "device cpu is no NVIDIA GPU")
    assert open_gpu("cuda:7", nvml) == (None, "NVML: Invalid Argument")


def test_throttle_reasons_are_named_and_idling_is_none() -> None:
    nvml = FakeNvml(FakeClock())
    nvml.reasons = 0x01 | 0x04 | 0x40
    assert gpu(nvml).throttles() == ("software power cap", "hardware thermal slowdown")


def test_visible_devices_are_renumbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    found, _ = open_gpu("cuda:0", FakeNvml(FakeClock()))
    assert found
    assert found._handle == "gpu1"
