"""One arm being measured: its worker, what it told, its samples as they came. Shared by `bench` and `compare`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from infopt import __version__, arms, checks, result
from infopt.arms import ArmSpec
from infopt.errors import InfoptError, InputError
from infopt.measure import cost, latency, roofline
from infopt.process import Event, WorkerProcess
from infopt.protocols import Machine, Progress, Shapes
from infopt.result import Block, Run, Sample, Value
from infopt.settings import WARMUP_FRESH, WARMUP_LATER, LoadOptions, Settings, WorkloadSpec, portable


class ArmRun:
    """Drives one arm's worker and keeps what comes back. `folder`: where samples are written as they come."""

    def __init__(
        self, spec: ArmSpec, options: LoadOptions, workload: WorkloadSpec, settings: Settings, folder: Path, progress: Progress
    ) -> None:
        self.spec, self.options, self.workload, self.settings = spec, options, workload, settings
        self.folder, self.progress = folder, progress
        self.facts: dict[str, Any] = {}
        self.samples: list[Sample] = []
        self.blocks: list[Block] = []
        self.figures: dict[str, Value] = {}
        self.limits: dict[str, Any] = {}
        self.quality: dict[str, Any] = {}
        self.noise: dict[str, float] = {}
        self.error: str | None = None
        self.remarks: list[str] = []
        self._worker: WorkerProcess | None = None
        self._stream: IO[str] | None = None
        self._is_warm = False
        self._block_start = 0

    @property
    def has_samples(self) -> bool:
        return (self.folder / "samples.jsonl").exists()

    @property
    def id(self) -> str:
        """The results folder's name; of an arm of a comparison, from there on."""
        return self.folder.name if self.folder.parent.name != "arms" else f"{self.folder.parents[1].name}/arms/{self.folder.name}"

    @property
    def label(self) -> str:
        return self.spec.label

    def open(self) -> None:
        """Starts a process and loads the arm. Raises InfoptError."""
        self._worker = WorkerProcess(self.label, self.options.threads, lambda line: self.progress(f"{self.label}: {line}"))
        self.progress(f"{self.label}: opening")
        self.facts = self._worker.call(
            "open",
            arm=self.spec.as_dict(),
            options=asdict(self.options),
            workload=asdict(self.workload),
            machine=self.facts.get("machine"),
        )
        self._is_warm = False

    def block(self, index: int, position: int, *, is_redone: bool = False) -> Block:
        """Measures block `index`; each sample is on disk as soon as it is known. A redone block replaces the first try."""
        assert self._worker is not None
        if is_redone:
            self._forget(index)
        self._block_start = self._file.tell()
        samples: list[Sample] = []

        def keep(event: Event) -> None:
            samples.append(Sample.model_validate(event["sample"]))
            self._file.write(samples[-1].model_dump_json() + "\n")
            self._file.flush()

        answer = self._worker.call(
            "block",
            keep,
            index=index,
            round=index,
            position=position,
            is_first=not self.blocks,
            warmup_cap=self.settings.warmup_cap,
            warmup_later=WARMUP_LATER if self._is_warm else WARMUP_FRESH,
        )
        self._is_warm = True
        block = Block.model_validate(answer)
        if is_redone:
            block = block.model_copy(update={"is_redone": True})
        self.samples += samples
        self.blocks.append(block)
        return block

    @property
    def _file(self) -> IO[str]:
        """`samples.jsonl`, made when the first block begins: an arm that is refused leaves no folder."""
        if self._stream is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stream = (self.folder / "samples.jsonl").open("w", encoding="utf-8")
        return self._stream

    def _forget(self, index: int) -> None:
        """Drops the last block, `index`, from memory and from the file."""
        self.samples = [sample for sample in self.samples if sample.block != index]
        self.blocks = [each for each in self.blocks if each.index != index]
        self._file.seek(self._block_start)
        self._file.truncate()

    def restart(self) -> None:
        """A fresh process for the next block."""
        self.close_worker()
        self.open()

    def finish(self, machine: dict[str, Any]) -> None:
        """Derives every figure. `machine`: the best peaks measured by any worker of this command."""
        assert self._worker is not None
        answer = self._worker.call("finish")
        self.figures = {key: Value.model_validate(each) for key, each in (self.facts["figures"] | answer["figures"]).items()}
        traffic = self.facts["traffic"]
        shapes, element = Shapes(**traffic["shapes"]), traffic["kv_element_bytes"]
        found, self.limits = roofline.shares_of_limit(
            self.samples,
            shapes,
            Machine(**machine),
            weights_bytes=traffic["weights_bytes"],
            kv_element_bytes=element,
            dtype=traffic["dtype"],
        )
        self.figures |= found | {"kv_bytes": roofline.kv_bytes(self.samples, shapes, element)}
        self.figures |= latency.summarise(self.samples, self.blocks, self.settings.objectives or None)
        rate = {key: self.figures[key].value for key in ("throughput_tok_per_s", "decode_tok_per_s.p50", "prefill_tok_per_s.p50")}
        self.figures |= cost.cost_values(
            self.settings.price_per_hour,
            self.settings.utilisation,
            throughput_tok_per_s=rate["throughput_tok_per_s"],
            decode_tok_per_s=rate["decode_tok_per_s.p50"],
            prefill_tok_per_s=rate["prefill_tok_per_s.p50"],
        )

    def take_quality(self, found: dict[str, Any]) -> None:
        """What `assess` found; a tier that failed is a remark."""
        self.figures |= {key: Value.model_validate(each) for key, each in found["figures"].items()}
        self.remarks += [f"{self.label}: {tier} was not judged: {why}" for tier, why in found["failed"].items()]
        self.remarks += [f"{self.label}: {leak}" for leak in found.get("leakage", ())]
        self.quality = {key: each for key, each in found.items() if key not in ("figures", "failed")}

    def close_worker(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def close(self) -> None:
        self.close_worker()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def kill(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        self.close()

    def record(self) -> result.Arm:
        named = "+".join(map(portable, self.spec.named.split("+")))
        recipe = self.spec.recipe.as_dict()
        recipe["calibration"]["text"] = portable(recipe["calibration"]["text"])
        return result.Arm(
            label=self.label,
            model=named,
            reference=self.facts.get("reference", named),
            reference_hash=self.facts.get("reference_hash", ""),
            recipe=recipe,
            engine=self.facts.get("engine", self.spec.recipe.engine.name),
            dtype=self.facts.get("dtype", ""),
            device=self.facts.get("device", ""),
            notes=tuple(self.facts.get("notes", ())),
        )

    def run(self, created_utc: str, reason: str | None = None) -> Run:
        """The arm's `run.json`. `reason`: why it is not complete."""
        return Run(
            id=self.id,
            name=self.label,
            created_utc=created_utc,
            is_complete=reason is None,
            incomplete_reason=reason,
            infopt_version=__version__,
            arm=self.record(),
            workload=self.facts.get("workload", {}),
            workload_hash=self.facts.get("workload_hash", ""),
            environment=self.facts.get("environment", {}),
            settings=self.settings.as_dict() | {"options": asdict(self.options)},
            figures=self.figures,
            blocks=tuple(self.blocks),
            limits=self.limits,
            quality=self.quality,
            noise=self.noise,
            warnings=self.warnings(),
        )

    def warnings(self) -> tuple[str, ...]:
        measured = [sample for sample in self.samples if not sample.warmup and not sample.error]
        capped = [flag for block in self.blocks for flag in block.flags if flag.startswith("warmup.cap")]
        errors = [sample.error for sample in self.samples if sample.error]
        found = checks.found(
            [
                checks.other_load(self.blocks),
                checks.warm_up(bool(capped), self.settings.warmup_cap),
                checks.undefined_tpot(sum(s.out_tokens <= 1 for s in measured), len(measured)),
            ]
        )
        lines = [*self.remarks, *(f"{self.label}: {check.message}; {check.next_step}" for check in found)]
        if errors:
            lines.append(f"{self.label}: {len(errors)} requests failed, the first with {errors[0]}")
        return tuple(lines)


@contextmanager
def ended(runs: Sequence[ArmRun]) -> Iterator[None]:
    """Ends the arms' workers with the block: politely, or at once when it failed or was interrupted."""
    try:
        yield
    except BaseException:
        for run in runs:
            run.kill()
        raise
    finally:
        for run in runs:
            run.close()


def prepare(specs: Sequence[ArmSpec], options: LoadOptions, worker: WorkerProcess) -> list[ArmSpec | InfoptError]:
    """Each arm with its weight steps applied, as an artifact in the cache; the error instead where that failed."""
    ready: list[ArmSpec | InfoptError] = []
    for spec in specs:
        try:
            folder = worker.call("prepare", arm=spec.as_dict(), options=asdict(options))["folder"]
        except InfoptError as error:
            ready.append(error)
            continue
        ready.append(spec if folder is None else replace(spec, model=folder, is_artifact=True, made_from=spec.model))
    return ready


def best_machine(runs: Sequence[ArmRun]) -> dict[str, Any]:
    """The highest peaks that any worker measured: a neighbour's load can only lower them."""
    found = [run.facts["machine"] for run in runs if run.facts]
    best: dict[str, Any] = dict(found[0])
    rates = [machine["read_bytes_per_s"] for machine in found if machine["read_bytes_per_s"]]
    best["read_bytes_per_s"] = max(rates, default=None)
    best["flops"] = {name: max(machine["flops"].get(name, 0.0) for machine in found) for name in best["flops"]}
    return best


def require_writable(results: Path) -> None:
    """Refuses a place for results that could not be written, before anything is measured. Raises InputError."""
    nearest = next(path for path in (results.absolute(), *results.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{results}: results cannot be written there", hint="--results FOLDER")


def now_utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_id(created_utc: str, name: str, content: Any) -> str:
    """`20260131T120000Z-int8-1a2b3c`, unique per content and second."""
    stamp = created_utc.replace("-", "").replace(":", "").removesuffix("+0000") + "Z"
    digest = hashlib.sha256(repr((created_utc, content, os.getpid(), time.monotonic_ns())).encode()).hexdigest()[:6]
    return f"{stamp}-{arms.file_name(name)}-{digest}"
