"""Killed in the middle of a calibrated step, `optimize --resume` ends in the same bytes; steps of several are judged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_techniques import chosen, register

from infopt import forecast, optimize, units
from infopt.artifact import StepQuality
from infopt.errors import DiskFullError, InputError, LoadBackError
from infopt.model import atomic, tiny
from infopt.model.bundle import Bundle
from infopt.model.quiet import quiet
from infopt.needs import Needs
from infopt.protocols import Context
from infopt.settings import LoadOptions
from infopt.techniques.base import Technique

CPU = LoadOptions(device="cpu")
CALIBRATION = {"samples": 16, "tokens": 64}
RECIPE = "{version: 1, name: own, steps: [{gptq: {group_size: 32}}], calibration: {samples: 16, tokens: 64}}"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of 16 blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("deep") / "deep"
    with quiet():
        config = LlamaConfig(**{**tiny._SHARED, "num_hidden_layers": 16, "tie_word_embeddings": True, "dtype": "float32"})
        LlamaForCausalLM(config).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return folder


def command(model: Path, recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "infopt", "optimize", str(model), "-r", str(recipe), "-o", str(out), *more]


def wait_for(path: Path, child: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file():
        assert child.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_kill_9_in_block_12_then_resume_gives_the_identical_artifact(deep: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "own.yaml", tmp_path / "out"
    recipe.write_text(RECIPE, encoding="utf-8")
    subprocess.run(command(deep, recipe, tmp_path / "whole", "--quiet"), check=True, capture_output=True)

    child = subprocess.Popen(command(deep, recipe, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / ".out.unfinished" / "0-gptq" / "model.layers.11.safetensors", child)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not out.exists()

    again = subprocess.run(command(deep, recipe, out, "--resume", "--verbose"), check=True, capture_output=True, text=True)
    assert "going on after block" in again.stderr
    assert not (tmp_path / ".out.unfinished").exists()
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_ctrl_c_tells_how_to_go_on(deep: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "own.yaml", tmp_path / "out"
    recipe.write_text(RECIPE, encoding="utf-8")
    child = subprocess.Popen(command(deep, recipe, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / ".out.unfinished" / "0-gptq" / "model.layers.1.safetensors", child)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.splitlines()[-2:] == [
        "error: interrupted",
        f"hint: the same command with --resume goes on from where it was last kept ({kept(tmp_path)})",
    ]


def kept(folder: Path, name: str = "out") -> str:
    """What an interrupted run has left, as it says itself."""
    left = folder / f".{name}.unfinished"
    return f"{units.size(sum(path.stat().st_size for path in left.glob('*/*')))} in {left}"


def test_a_second_run_is_refused_while_the_first_is_at_it(tmp_path: Path) -> None:
    own = chosen({"rtn": {"group_size": 32}})
    refused = []

    def progress(line: str) -> None:
        if line.startswith("saving"):
            with pytest.raises(InputError, match=rf"out: process {os.getpid()} is writing it") as caught:
                optimize.optimize("tiny", own, tmp_path / "out", CPU)
            refused.append(caught.value)

    optimize.optimize("tiny", own, tmp_path / "out", CPU, progress)
    assert len(refused) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_that_its_holder_removed_in_between_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "process"

    def late(descriptor: int) -> bool:
        lock.unlink()
        return True

    monkeypatch.setattr(atomic, "flock", late)
    with pytest.raises(InputError, match="is writing it"), atomic.sole(lock, tmp_path / "out"):
        pass


def test_resume_is_refused_where_it_cannot_be_right(deep: Path, tmp_path: Path) -> None:
    own = chosen({"gptq": {"group_size": 32}}, calibration=CALIBRATION)
    with pytest.raises(InputError, match="no interrupted run to go on from"):
        optimize.optimize(str(deep), own, tmp_path / "out", CPU, resume=True)
    interrupt(deep, tmp_path / "out")
    other = chosen({"gptq": {"group_size": 32, "bits": 3}}, calibration=CALIBRATION)
    with pytest.raises(InputError, match="had another model, recipe, seed"):
        optimize.optimize(str(deep), other, tmp_path / "out", CPU, resume=True)
    optimize.optimize(str(deep), other, tmp_path / "out", CPU)  # starts over
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupt(model: Path, out: Path, error: type[BaseException] = KeyboardInterrupt, after: str = "block 3/") -> BaseException:
    def progress(line: str) -> None:
        if line.startswith(after):
            raise error("told")

    own = chosen({"gptq": {"group_size": 32}}, calibration=CALIBRATION)
    with pytest.raises(error) as caught:
        optimize.optimize(str(model), own, out, CPU, progress)
    return caught.value


def test_only_what_can_be_gone_on_from_is_left(deep: Path, tmp_path: Path) -> None:
    interrupt(deep, tmp_path / "none", after="block 1/")
    interrupt(deep, tmp_path / "wrong", error=LoadBackError)
    assert list(tmp_path.iterdir()) == []
    for error in (DiskFullError, InputError, torch.OutOfMemoryError):
        (note,) = interrupt(deep, tmp_path / error.__name__, error).__notes__
        assert note == f"the same command with --resume goes on from where it was last kept ({kept(tmp_path, error.__name__)})"
        assert (tmp_path / f".{error.__name__}.unfinished" / "0-gptq" / "model.layers.1.safetensors").is_file()


def test_the_forecast_counts_what_is_kept_to_go_on(deep: Path, tmp_path: Path) -> None:
    interrupt(deep, tmp_path / "out", after="block 16/")
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    own = chosen({"gptq": {"group_size": 32}}, calibration=CALIBRATION)
    found = forecast.forecast(str(deep), own, tmp_path / "other", CPU)
    assert kept <= found.disk_bytes - dict(found.steps)["gptq"].weights_bytes <= 1.5 * kept


class Halve(Technique):
    """Halves one layer: a change of known size."""

    needs = Needs()

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        bundle.model.get_submodule("model.layers.0.mlp.down_proj").weight.data.mul_(0.5)  # type: ignore[operator,union-attr]
        return bundle


def test_steps_of_several_are_judged_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(Halve, monkeypatch)
    document = optimize.optimize("tiny", chosen("halve", {"rtn": {"group_size": 32}}), tmp_path / "out", CPU)
    halve, rtn = document.steps
    assert isinstance(halve.quality, StepQuality)
    assert isinstance(rtn.quality, StepQuality)
    assert halve.quality.kld_mean > 0
    assert halve.quality.kld_low is not None
    assert halve.quality.kld_low < halve.quality.kld_mean < (halve.quality.kld_high or 0)
    assert rtn.quality.kld_mean != halve.quality.kld_mean
    assert halve.weights_bytes is not None
    assert rtn.weights_bytes is not None
    assert rtn.weights_bytes < halve.weights_bytes
    (alone,) = optimize.optimize("tiny", chosen("halve"), tmp_path / "alone", CPU).steps
    assert alone.quality is None
