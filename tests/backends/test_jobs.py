"""A job out of process: what goes in, what comes back, and every way it can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infopt.backends import child, result, work
from infopt.backends.environments import Environment
from infopt.errors import InfoptError, InputError
from infopt.layers import packing
from infopt.layers.grid import Grid
from infopt.model import load, reference, save
from infopt.model.bundle import Bundle
from infopt.model.cache import cache_dir
from infopt.protocols import Context
from infopt.techniques.rtn import Rtn, RtnOptions

Worker = Callable[[str], Environment]
IDS = ((5, 6, 7), (8, 9, 10))


def run(environment: Environment, bundle: Bundle, lines: list[str] | None = None, device: str = "cpu") -> str:
    """What the worker wrote to out/said."""
    context = Context(seed=3, device=device, calibration_ids=IDS, progress=(lines if lines is not None else []).append)
    with work.done(environment, bundle, context, {"bits": 4}) as folder:
        return (folder / "said").read_text(encoding="utf-8")


def gone(process: int) -> bool:
    """Whether it has ended, waiting a little; one that nobody has waited for yet has ended too."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_hands_over_the_model_options_and_tokens(worker: Worker, tiny_bundle: Bundle) -> None:
    environment = worker(
        """
        job.out.mkdir()
        files = sorted(path.name for path in job.model.iterdir())
        (job.out / "said").write_text(repr([job.options, job.ids, job.device, job.seed, files]))
        """.replace("\n        ", "\n")
    )
    options, ids, device, seed, files = eval(run(environment, tiny_bundle, device="cpu"))
    assert options == {"bits": 4}
    assert ids == [[5, 6, 7], [8, 9, 10]]
    assert (device, seed) == ("cpu", 3)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert list((cache_dir() / "jobs").iterdir()) == [], "nothing is left behind"
    assert list((cache_dir() / "envs").glob("*.log")) == []


def test_progress_comes_in_lines_and_prints_of_libraries_do_not(worker: Worker, tiny_bundle: Bundle) -> None:
    environment = worker(
        "print('a library talks')\nos.system('echo so does its child')\njob.say('block 1\\nof 2')\njob.say_bars()\n"
        "import tqdm\nbar = tqdm.tqdm([1], desc='Calibrating')\nbar.set_description('Propagating')\n"
        "job.out.mkdir()\n(job.out / 'said').write_text('done')"
    )
    lines: list[str] = []
    assert run(environment, tiny_bundle, lines) == "done"
    assert lines == ["fake: saving the model for it", "fake: block 1 of 2", "fake: Calibrating", "fake: Propagating"]


def test_a_crash_is_one_line_with_its_last_words(worker: Worker, tiny_bundle: Bundle) -> None:
    environment = worker("print('first the reason')\nraise ValueError('group 48\\ndoes not divide')")
    with pytest.raises(InfoptError) as caught:
        run(environment, tiny_bundle)
    message = str(caught.value)
    assert message.startswith("fake ended with code 1: ")
    assert "ValueError: group 48" in message
    assert "Traceback" not in message
    assert "\n" not in message
    log = Path(str(caught.value.hint).removeprefix("all it said: "))
    assert "Traceback" in log.read_text(encoding="utf-8")
    assert list((cache_dir() / "jobs").iterdir()) == []


def test_a_worker_killed_for_memory_is_told(worker: Worker, tiny_bundle: Bundle) -> None:
    with pytest.raises(InfoptError, match=r"fake was killed \(out of memory\?\)"):
        run(worker("os.kill(os.getpid(), 9)"), tiny_bundle)


def test_a_worker_that_says_nothing_is_told(worker: Worker, tiny_bundle: Bundle) -> None:
    with pytest.raises(InfoptError, match="fake ended with code 7: it said nothing"):
        run(worker("os._exit(7)"), tiny_bundle)


def test_an_interrupt_ends_the_whole_group(worker: Worker, tiny_bundle: Bundle) -> None:
    environment = worker(
        "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "job.say(f'{os.getpid()} {child.pid}')\ntime.sleep(60)"
    )
    seen: list[int] = []

    def interrupt(line: str) -> None:
        if line.removeprefix("fake: ").split()[0].isdigit():
            seen.extend(int(part) for part in line.split()[1:])
            raise KeyboardInterrupt

    context = Context(progress=interrupt)
    with pytest.raises(KeyboardInterrupt), work.done(environment, tiny_bundle, context, {}):
        pass
    assert len(seen) == 2
    assert all(gone(process) for process in seen)
    assert list((cache_dir() / "jobs").iterdir()) == []


def test_a_worker_that_ignores_the_polite_signal_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_GRACE_S", 0.3)
    ignore = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    code = f"{ignore}; print(os.getpid(), flush=True); time.sleep(60)"
    seen: list[int] = []

    def stop(line: str) -> None:
        seen.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.stream([sys.executable, "-c", code], stop, tmp_path / "log", child.plain_environment())
    assert gone(seen[0])


def test_a_worker_does_not_outlive_a_killed_parent(worker: Worker, tmp_path: Path) -> None:
    """kill -9 leaves nobody to clean up: the worker sees its stdin close."""
    worker("job.say(str(os.getpid()))\ntime.sleep(60)")
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"options": {}, "ids": [], "device": "cpu", "seed": 0}), encoding="utf-8")
    parent = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from infopt.backends import child
        command = [sys.executable, {str(work.SCRIPTS / "fake_worker.py")!r}, {str(folder)!r}]
        child.stream(command, lambda line: print(line, flush=True), Path({str(tmp_path / "log")!r}), child.plain_environment())
    """)
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    inner = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert gone(inner)


@pytest.mark.parametrize(("device", "before", "after"), [
    ("cpu", "0,1", ""), ("cuda", "2,3", "2,3"), ("cuda:1", None, "1"), ("cuda:1", "2,3", "3"),
])  # fmt: skip
def test_the_worker_sees_the_device_that_was_asked_for(
    device: str, before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = work._environment(device)
    assert found["CUDA_VISIBLE_DEVICES"] == after
    assert found["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    assert "PYTHONPATH" not in found


def test_what_a_killed_job_left_is_swept_by_the_next(worker: Worker, tiny_bundle: Bundle) -> None:
    stale = cache_dir() / "jobs" / ".fake.999999999.tmp"
    alive = cache_dir() / "jobs" / f".other.{os.getpid()}.tmp"
    for folder in (stale, alive):
        folder.mkdir(parents=True)
    run(worker("job.out.mkdir()\n(job.out / 'said').write_text('x')"), tiny_bundle)
    assert not stale.exists()
    assert alive.exists()


def test_calibration_is_asked_for() -> None:
    with pytest.raises(InputError, match="a calibrated step needs text"):
        work.require_calibration(Context())


@pytest.mark.parametrize(
    "grid",
    [Grid(4, 32), Grid(8, None), Grid(8, None, activations="token"), Grid(8, kind="fp8", activations="token")],
    ids=lambda grid: f"{grid.kind}{grid.bits}-{grid.activations}",
)
def test_a_written_folder_is_adopted_as_it_is(grid: Grid, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Whatever wrote compressed-tensors: the tensors are stored again bit for bit, and the logits are the file's."""
    from infopt.layers import rounding

    ids = torch.arange(20)[None]
    made = rounding.round_layers(tiny_bundle, ["lm_head", "q_proj"], grid, "rtn", lambda line: None)
    save.save(made, tmp_path / "theirs")
    adopted = result.adopt(tmp_path / "theirs", load.load(reference.parse("tiny")))
    assert adopted.packed.keys() == made.packed.keys()
    assert adopted.save_config == made.save_config
    for name, tensors in made.packed.items():
        assert all(torch.equal(tensor, adopted.packed[name][part]) for part, tensor in tensors.items())
    with torch.inference_mode():
        torch.testing.assert_close(adopted.model(input_ids=ids).logits, made.model(input_ids=ids).logits, rtol=0, atol=1e-5)
    save.save(adopted, tmp_path / "ours")
    first, second = (tmp_path / name / "model.safetensors" for name in ("theirs", "ours"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(InputError, match="quantized already"):
        packing.linears(adopted, ())
    with pytest.raises(InputError, match="quantized already"):
        Rtn(RtnOptions()).apply(adopted, Context())
