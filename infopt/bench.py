"""`infopt bench`: one arm, measured; `results/<utc>-<name>-<hash>/` is what is left.

Its weight steps run once, into the artifact cache; blocks run in a fresh process; quality is judged against the model
that the arm started from. `self_test` runs a second process of the same arm between the blocks: the noise floor that a
stored comparison needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from infopt import artifact, leakage, recipe, result, stats, techniques
from infopt.arm_run import ArmRun, best_machine, ended, now_utc, prepare, require_writable, run_id
from infopt.arms import ArmSpec
from infopt.errors import InfoptError, InputError, Terminated
from infopt.judging import PER_BLOCK, Evidence
from infopt.process import WorkerProcess
from infopt.protocols import Progress
from infopt.report import markdown
from infopt.result import Run
from infopt.settings import LoadOptions, Settings, WorkloadSpec


def bench(
    spec: ArmSpec,
    workload: WorkloadSpec,
    options: LoadOptions,
    settings: Settings,
    *,
    blocks: int,
    results: Path,
    self_test: bool = False,
    progress: Progress = lambda line: None,
) -> tuple[Run, Path]:
    """The run and its folder. Raises InfoptError; what was measured until then stays, marked incomplete."""
    require_writable(results)
    leakage.require_unseen([spec], settings.quality, options.allow_leakage)
    created = now_utc()
    folder = results / run_id(created, spec.label, (spec.as_dict(), asdict(workload)))
    with WorkerProcess("preparing", options.threads, progress) as lab:
        (ready,) = prepare([spec], options, lab)
        if isinstance(ready, InfoptError):
            raise ready
        own = ArmRun(ready, options, workload, settings, folder, progress)
        twin = ArmRun(replace(ready, label=f"{spec.label} (A/A)"), options, workload, settings, folder / "self-test", progress)
        runs = [own, twin] if self_test else [own]
        with kept_on_interrupt(lambda reason: write_run(own, created, reason), lambda: runs):
            judge = None if settings.quality is None else _judge(spec, own, options, settings, lab)
            with ended(runs):
                for run in runs:
                    run.open()
                for index in range(blocks):
                    order = runs if index % 2 == 0 else runs[::-1]
                    for position, run in enumerate(order):
                        progress(f"{run.label}: block {index + 1} of {blocks}")
                        run.block(index, position)
                machine = best_machine(runs)
                for run in runs:
                    run.finish(machine)
            if self_test:
                own.noise = noise_floor(own, twin)
            if judge is not None:
                measure_quality(judge.reference, [own], judge.options, settings, lab)
            run_record = write_run(own, created, None)
    return run_record, folder


@dataclass(frozen=True)
class _Judge:
    """The model that quality is judged against, and how it is opened."""

    reference: ArmSpec
    options: LoadOptions


def _judge(spec: ArmSpec, own: ArmRun, options: LoadOptions, settings: Settings, lab: WorkerProcess) -> _Judge | None:
    """The model that the arm started from. An artifact outlives its reference: without it, or with another model in its
    place, the rest of the run still stands, and says why quality does not. Raises InputError for what does not fit."""
    reference = reference_of(spec, own.spec)
    if is_reference(own.spec, reference):
        return None
    if spec.is_artifact:
        saved = artifact.read_artifact(Path(own.spec.model))
        options = replace(options, revision=saved.revision)
        try:
            found = lab.call("fingerprint", model=reference.model, options=asdict(options))
        except InfoptError as error:
            own.remarks.append(f"{own.label}: quality was not judged, the reference cannot be opened ({error})")
            return None
        if found != saved.reference_hash:
            own.remarks.append(
                f"{own.label}: quality was not judged: {reference.model} is not the model this was made from any more"
            )
            return None
    check_quality(reference, [own.spec], options, settings, lab)
    return _Judge(reference, options)


def reference_of(spec: ArmSpec, ready: ArmSpec) -> ArmSpec:
    """The model that an arm's quality is judged against: itself untouched, or what its artifact was made from."""
    source = artifact.read_artifact(Path(ready.model)).reference if spec.is_artifact else spec.model
    return ArmSpec("reference", source, recipe.load("baseline", techniques.find))


def is_reference(arm: ArmSpec, reference: ArmSpec) -> bool:
    """Same weights, run the same way: nothing to judge."""
    ways = [replace(each.recipe, name="", about="", source="", gates=()) for each in (arm, reference)]
    return arm.model == reference.model and ways[0] == ways[1]


def check_quality(
    reference: ArmSpec, candidates: Sequence[ArmSpec], options: LoadOptions, settings: Settings, lab: WorkerProcess
) -> None:
    """Refuses, before anything is timed, quality inputs that do not fit the models. Raises InputError."""
    lab.call("check_quality", **_quality_arguments(reference, candidates, options, settings))


def measure_quality(
    reference: ArmSpec, runs: Sequence[ArmRun], options: LoadOptions, settings: Settings, lab: WorkerProcess
) -> None:
    """All tiers for every run, against one reference that stays open."""
    by_label = {run.label: run for run in runs}
    lab.call(
        "assess",
        lambda event: by_label[event["label"]].take_quality(event["quality"]),
        **_quality_arguments(reference, [run.spec for run in runs], options, settings),
    )


def _quality_arguments(
    reference: ArmSpec, candidates: Sequence[ArmSpec], options: LoadOptions, settings: Settings
) -> dict[str, Any]:
    assert settings.quality is not None
    return {
        "reference": reference.as_dict(),
        "candidates": [spec.as_dict() for spec in candidates],
        "options": asdict(options),
        "settings": asdict(settings.quality),
    }


def check_workloads(spec: ArmSpec, workloads: Sequence[WorkloadSpec], options: LoadOptions, progress: Progress) -> None:
    """Refuses the shapes of a sweep that do not fit the model before the first is measured. Raises InputError."""
    with WorkerProcess("checking", options.threads, progress) as lab:
        lab.call("check", arm=spec.as_dict(), options=asdict(options), workloads=[asdict(each) for each in workloads])


def noise_floor(first: ArmRun, second: ArmRun) -> dict[str, float]:
    """A/A: the standard deviation of the paired log-ratios of an arm against itself, of every figure that blocks have."""
    one, two = (Evidence(run.samples, run.blocks, run.figures, objectives=run.settings.objectives) for run in (first, second))
    indices = one.indices()
    found = {}
    for key in PER_BLOCK:
        pairs = [(a, b) for a, b in zip(one.series(key, indices), two.series(key, indices), strict=True) if a and b]
        deviation = stats.log_ratio_sd([a for a, _ in pairs], [b for _, b in pairs]) if len(pairs) > 1 else None
        if deviation is not None:
            found[key] = deviation
    return found


def write_run(run: ArmRun, created: str, reason: str | None) -> Run:
    """`run.json` and `report.md` of one arm."""
    record = run.run(created, reason)
    run.folder.mkdir(parents=True, exist_ok=True)
    result.write_atomic(run.folder / "run.json", result.dump(record))
    result.write_atomic(run.folder / "report.md", markdown.run_report(record))
    return record


@contextmanager
def kept_on_interrupt(write: Callable[[str], object], runs: Callable[[], Sequence[ArmRun]]) -> Iterator[None]:
    """Whatever ends the block early, `write(reason)` keeps what was measured so far. A refusal before the first sample
    leaves nothing."""
    try:
        yield
    except KeyboardInterrupt as error:
        write("terminated" if isinstance(error, Terminated) else "interrupted")
        raise
    except Exception as error:
        if not isinstance(error, InputError) or any(run.has_samples for run in runs()):
            write(str(error).split("\n")[0] or type(error).__name__)
        raise
