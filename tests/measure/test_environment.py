from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from infopt.measure.environment import (
    MATCHED,
    VERSIONS,
    cpu_model,
    cuda_version,
    differences,
    fingerprint,
    gather,
    library,
)


class FakeGpu:
    def name(self) -> str:
        return "NVIDIA H200"

    def driver(self) -> str:
        return "580.65"

    def power_cap_w(self) -> float:
        return 700.0


def test_versions_are_read_without_importing_torch() -> None:
    code = (
        "import sys; from infopt.measure.environment import gather; e = gather('cpu', 2); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(e['torch'], e['transformers'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert printed == [metadata.version("torch"), metadata.version("transformers")]


def test_a_cpu_run_knows_its_cpu_and_no_gpu() -> None:
    found = gather("cpu", 3, FakeGpu())  # type: ignore[arg-type]
    assert found["device"] == "cpu"
    assert found["threads"] == 3
    assert (found["driver"], found["cuda"], found["power_cap_w"]) == (None, None, None)
    assert found["cpu"]
    assert found["memory_bytes"] > 2**28
    assert found["fingerprint"] == fingerprint(found)


def test_a_gpu_run_names_the_gpu() -> None:
    found = gather("cuda:0", 3, FakeGpu())  # type: ignore[arg-type]
    assert (found["device"], found["driver"], found["power_cap_w"]) == ("NVIDIA H200", "580.65", 700.0)
    assert found["cuda"] == cuda_version()


def test_only_the_matched_fields_decide() -> None:
    here = gather("cpu", 2)
    assert differences(here, here) == []
    for field in MATCHED:
        there = here | {field: "other"}
        assert differences(here, there) == [f"{field}: {here[field]!r} against 'other'"]
        assert fingerprint(there) != fingerprint(here)
    for field in ("os", "python", "torch", "libraries", "memory_bytes"):
        there = here | {field: "other"}
        assert differences(here, there) == []
        assert fingerprint(there) == fingerprint(here)


def test_other_versions_are_named_apart() -> None:
    here = gather("cpu", 2)
    assert differences(here, here, VERSIONS) == []
    assert differences(here, here | {"torch": "1.0"}, VERSIONS) == [f"torch: {here['torch']!r} against '1.0'"]


def test_what_is_not_installed_is_none() -> None:
    assert library("no-such-distribution-exists") is None


def test_cpu_model_is_the_kernels_name_for_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n\nprocessor\t: 1\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert cpu_model(tmp_path / "missing")
