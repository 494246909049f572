"""`infopt compare`: every arm against the first. Live, the arms run interleaved; stored, two results are read.

Live: weight steps run once into the artifact cache; then rounds, each with one block of the baseline that all candidates
share, in alternating order (ABBA); then quality, against the first arm. Both modes end in `judging.judge`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from infopt import __version__, checks, leakage, result
from infopt.arm_run import ArmRun, best_machine, ended, now_utc, prepare, require_writable, run_id
from infopt.arms import ArmSpec, file_name, is_begun, way
from infopt.bench import check_quality, kept_on_interrupt, measure_quality, noise_floor, write_run
from infopt.comparison import ArmResult, Comparison
from infopt.errors import Exit, InfoptError, InputError, NotComparableError
from infopt.figures import find
from infopt.gates import Gate, parse_gates
from infopt.judgement import DEFAULT_ALPHA, Judgement, Verdict, exit_code, not_comparable, undecided
from infopt.judging import INFORMING, Evidence, judge
from infopt.measure import environment
from infopt.process import WorkerProcess
from infopt.protocols import Progress
from infopt.report import html, markdown
from infopt.result import Run
from infopt.settings import LoadOptions, Settings, WorkloadSpec
from infopt.stats import Look, looks

QUICK_PAIRS, GATE_PAIRS, GATE_CAP = 10, checks.GATE_PAIRS, 30
SELF_TEST = "A/A"
REDOS_PER_ARM = 2
"""Quick mode does not wait for a machine that is never idle: so many blocks an arm are measured again, on average."""
SAME_NATS = 1e-3
"""KLD up to which two ways of running a model count as one, when another's quality is known against either."""


@dataclass(frozen=True)
class Protocol:
    """How live arms are compared. `is_gate_mode`: a fresh process per block, every block beside other load redone once."""

    pairs: int = QUICK_PAIRS
    max_pairs: int | None = None
    is_gate_mode: bool = False
    self_test: bool = False
    gates: tuple[Gate, ...] | None = None
    """None: each arm's own, from its recipe."""
    is_strict: bool = False

    def looks(self) -> tuple[Look, ...]:
        return looks(DEFAULT_ALPHA, self.pairs, self.max_pairs or self.pairs)

    def gates_of(self, recipe_gates: tuple[Gate, ...]) -> tuple[Gate, ...]:
        return recipe_gates if self.gates is None else self.gates


def compare(
    specs: Sequence[ArmSpec],
    workload: WorkloadSpec,
    options: LoadOptions,
    settings: Settings,
    protocol: Protocol,
    *,
    results: Path,
    progress: Progress = lambda line: None,
) -> tuple[Comparison, Path]:
    """Runs the arms interleaved. Raises InputError for an arm that is refused; an arm that fails later keeps its error."""
    live = _Live(specs, workload, options, settings, protocol, results, progress)
    with kept_on_interrupt(live.write, live.all_runs):
        live.measure()
    return live.write(None), live.folder


class _Live:
    def __init__(
        self,
        specs: Sequence[ArmSpec],
        workload: WorkloadSpec,
        options: LoadOptions,
        settings: Settings,
        protocol: Protocol,
        results: Path,
        progress: Progress,
    ) -> None:
        if len(specs) < 2 and not protocol.self_test:
            raise InputError("one arm is nothing to compare", hint="infopt compare demo demo:int8")
        if protocol.max_pairs is not None and protocol.max_pairs < protocol.pairs:
            raise InputError(f"{protocol.max_pairs} pairs at most, but {protocol.pairs} to begin with", hint="raise --max-pairs")
        require_writable(results)
        leakage.require_unseen(specs, settings.quality, options.allow_leakage)
        self.specs, self.workload, self.options, self.settings = list(specs), workload, options, settings
        self.protocol, self.progress = protocol, progress
        self.created = now_utc()
        name = "compare-" + "-".join(file_name(spec.label) for spec in specs[:4])
        self.folder = results / run_id(self.created, name[:60], [spec.as_dict() for spec in specs])
        self.runs: list[ArmRun] = []
        self.twin: ArmRun | None = None
        self.order: list[ArmRun] = []
        """The baseline, then the others in an order that the seed decides."""
        self.look = protocol.looks()[0]
        self.redos_left = REDOS_PER_ARM * len(specs)

    def measure(self) -> None:
        with WorkerProcess("preparing", self.options.threads, self.progress) as lab:
            self._prepare(lab)
            self._time()
            alive = [run for run in self.runs if run.error is None]
            if self.settings.quality is not None and len(alive) > 1:
                measure_quality(alive[0].spec, alive[1:], self.options, self.settings, lab)

    def _prepare(self, lab: WorkerProcess) -> None:
        """Every arm's artifact; what could not be judged is refused now."""
        ready = prepare(self.specs, self.options, lab)
        for spec, made in zip(self.specs, ready, strict=True):
            run = self._run(made if isinstance(made, ArmSpec) else spec)
            self.runs.append(run)
            if isinstance(made, InfoptError):
                self._fail(run, made)
        alive = [run.spec for run in self.runs if run.error is None]
        if self.settings.quality is not None and len(alive) > 1:
            check_quality(alive[0], alive[1:], self.options, self.settings, lab)
        if self.protocol.self_test:
            base = self.runs[0].spec
            self.twin = self._run(replace(base, label=f"{base.label} ({SELF_TEST})"))
        baseline, *others = self._alive()
        random.Random(self.options.seed).shuffle(others)
        self.order = [baseline, *others]

    def _run(self, spec: ArmSpec) -> ArmRun:
        folder = self.folder / "arms" / file_name(spec.label)
        return ArmRun(spec, self.options, self.workload, self.settings, folder, self.progress)

    def _fail(self, run: ArmRun, error: InfoptError) -> None:
        """The baseline's errors and refusals end the comparison; another arm's are its result."""
        if run is self.runs[0] or isinstance(error, InputError):
            raise error
        run.error = str(error)
        run.kill()

    def _alive(self) -> list[ArmRun]:
        return [run for run in self.all_runs() if run.error is None]

    def all_runs(self) -> list[ArmRun]:
        return [*self.runs, *([self.twin] if self.twin else [])]

    def _time(self) -> None:
        with ended(self.all_runs()):
            for run in self._alive():  # one by one, so that no start-up is timed as another's loading
                self._guard(run, run.open)
            done = 0
            for look in self.protocol.looks():
                for index in range(done, look.pairs):
                    self._round(index)
                done, self.look = look.pairs, look
                if not self._is_open_question():
                    break
            machine = best_machine(self._alive())
            for run in self._alive():
                self._guard(run, lambda run=run: run.finish(machine))
        if self.twin is not None:
            self.runs[0].noise = noise_floor(self.runs[0], self.twin)

    def _round(self, index: int) -> None:
        """One block of every arm; odd rounds run backwards, so that drift cancels."""
        baseline, *others = (run for run in self.order if run.error is None)
        order = [baseline, *others] if index % 2 == 0 else [*reversed(others), baseline]
        for position, run in enumerate(order):
            self.progress(f"round {index + 1}: {run.label}")
            self._guard(run, lambda run=run, position=position: self._block(run, index, position))

    def _block(self, run: ArmRun, index: int, position: int) -> None:
        if self.protocol.is_gate_mode and index:
            run.restart()
        block = run.block(index, position)
        if self.redos_left and any(flag.startswith(("contended", "throttled")) for flag in block.flags):
            self.redos_left -= not self.protocol.is_gate_mode
            run.block(index, position, is_redone=True)

    def _guard(self, run: ArmRun, work: Any) -> None:
        try:
            work()
        except InfoptError as error:
            self._fail(run, error)

    def _is_open_question(self) -> bool:
        """Whether more pairs could settle a gate."""
        for run in [run for run in self.runs[1:] if run.error is None]:
            gates = self.protocol.gates_of(run.spec.recipe.gates)
            timed = [gate for gate in gates if find(gate.figure)[0].kind != "quality"]
            evidence, pending = (self._evidence(self.runs[0]), self._evidence(run)), len(gates) - len(timed)
            found = judge(*evidence, timed, alpha=self.look.alpha, informing=(), pending=pending)
            if any(each.verdict is Verdict.INCONCLUSIVE and each.p is not None for each in found):
                return True
        return False

    def _evidence(self, run: ArmRun) -> Evidence:
        return Evidence(run.samples, run.blocks, run.figures, run.quality, self.settings.objectives)

    def _judgements(self, run: ArmRun) -> tuple[Judgement, ...]:
        gates = self.protocol.gates_of(run.spec.recipe.gates)
        if run.error is not None:
            return tuple(undecided(gate.figure, gate, run.error) for gate in gates)
        return judge(self._evidence(self.runs[0]), self._evidence(run), gates, alpha=self.look.alpha)

    def write(self, reason: str | None) -> Comparison:
        """Everything known now: one folder per arm, `compare.json`, reports. `reason`: why it is incomplete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for run in self.all_runs():
            if run.facts:
                write_run(run, self.created, reason or run.error)
        judgements: dict[str, tuple[Judgement, ...]] = {}
        self_test: tuple[Judgement, ...] = ()
        if reason is None:
            judgements = {run.label: self._judgements(run) for run in self.runs[1:]}
            if self.twin is not None:
                times = tuple(key for key in INFORMING if find(key)[0].kind == "time")
                base, twin = self._evidence(self.runs[0]), self._evidence(self.twin)
                self_test = judge(base, twin, (), alpha=self.look.alpha, informing=times)
        facts = self.runs[0].facts if self.runs else {}
        document = Comparison(
            id=self.folder.name,
            created_utc=self.created,
            is_complete=reason is None,
            incomplete_reason=reason,
            mode="live",
            infopt_version=__version__,
            environment=facts.get("environment", {}),
            workload=facts.get("workload", {"name": self.workload.name}),
            settings=self.settings.as_dict() | {"options": asdict(self.options), "gate_mode": self.protocol.is_gate_mode},
            baseline=self.specs[0].label,
            arms=tuple(_arm_result(run) for run in self.runs),
            judgements=judgements,
            self_test=self_test,
            warnings=self._warnings(judgements),
            pairs=len(self.runs[0].blocks) if self.runs else 0,
            exit_code=self._exit_code(judgements, reason),
        )
        write_comparison(document, self.folder)
        return document

    def _exit_code(self, judgements: dict[str, tuple[Judgement, ...]], reason: str | None) -> int:
        if reason is not None or any(run.error for run in self.runs):
            return int(Exit.FAILED)
        return int(exit_code([each for found in judgements.values() for each in found], self.protocol.is_strict))

    def _warnings(self, judgements: dict[str, tuple[Judgement, ...]]) -> tuple[str, ...]:
        lines = [line for run in self.runs for line in run.warnings()]
        is_gated = any(each.gate and each.p is not None for found in judgements.values() for each in found)
        few = checks.few_pairs(len(self.runs[0].blocks), self.look.alpha, is_gated) if self.runs else None
        return tuple(lines + ([f"{few.message}; {few.next_step}"] if few else []))


def _arm_result(run: ArmRun) -> ArmResult:
    evidence = Evidence(run.samples, run.blocks, run.figures)
    indices = evidence.indices()
    keys = [key for key in INFORMING if find(key)[1] is not None] if indices else []
    return ArmResult(
        label=run.label,
        arm=run.record(),
        figures=run.figures,
        quality=run.quality,
        limits=run.limits,
        blocks={key: tuple(evidence.series(key, indices)) for key in keys},
        error=run.error,
    )


# --- Stored runs -----------------------------------------------------------------------------------------------------


def compare_stored(
    folders: Sequence[Path], *, gates: tuple[Gate, ...] | None, is_strict: bool, across_versions: bool = False
) -> Comparison:
    """Two or more results, against the first. Raises NotComparableError when the baseline is missing."""
    if len(folders) < 2:
        raise InputError(f"{folders[0]}: one result is nothing to compare", hint="infopt results show shows it")
    if not is_begun(folders[0]):
        raise NotComparableError(f"{folders[0]}: no baseline result there", hint="infopt bench … --self-test makes one")
    runs = [_complete(folder) for folder in folders]
    evidence = [_stored_evidence(run, folder) for run, folder in zip(runs, folders, strict=True)]
    judgements: dict[str, tuple[Judgement, ...]] = {}
    labels = _distinct([run.arm.label for run in runs])
    for label, run, own in zip(labels[1:], runs[1:], evidence[1:], strict=True):
        chosen = parse_gates(run.arm.recipe.get("gates"), "gates") if gates is None else gates
        reason = mismatch(runs[0], run, across_versions)
        if reason:
            judgements[label] = tuple(not_comparable(g.figure, g, reason) for g in chosen) or (
                not_comparable("tpot_s.p50", None, reason),
            )
            continue
        judgements[label] = judge(
            evidence[0], own, chosen, is_live=False, noise=runs[0].noise, no_quality=quality_mismatch(runs[0], run)
        )
    created = now_utc()
    return Comparison(
        id=run_id(created, "stored", labels),
        created_utc=created,
        is_complete=True,
        mode="stored",
        infopt_version=__version__,
        environment=runs[0].environment,
        workload=runs[0].workload,
        settings=runs[0].settings,
        baseline=labels[0],
        arms=tuple(
            ArmResult(label=label, arm=run.arm, figures=run.figures, quality=run.quality, limits=run.limits)
            for label, run in zip(labels, runs, strict=True)
        ),
        judgements=judgements,
        warnings=tuple(line for run in runs for line in run.warnings),
        pairs=min(len(run.blocks) for run in runs),
        exit_code=int(exit_code([each for found in judgements.values() for each in found], is_strict)),
    )


def mismatch(baseline: Run, candidate: Run, across_versions: bool) -> str | None:
    """Why two stored runs cannot be compared, or None. What a recipe changes is the thing under test and never counts."""
    fields = [*environment.MATCHED, *(() if across_versions else environment.VERSIONS)]
    found = environment.differences(baseline.environment, candidate.environment, fields)
    if baseline.workload_hash != candidate.workload_hash:
        found.append(f"workload: {baseline.workload.get('name')} against {candidate.workload.get('name')}, or other prompts")
    seeds = [run.settings.get("options", {}).get("seed", 0) for run in (baseline, candidate)]
    objectives = [run.settings.get("objectives") or {} for run in (baseline, candidate)]
    found += [f"{name}: {a} against {b}" for name, (a, b) in (("seed", seeds), ("objectives", objectives)) if a != b]
    both = baseline.figures.keys() & candidate.figures.keys()
    ids = {(baseline.figures[key].id, candidate.figures[key].id) for key in both}
    found += [f"definition: {before} against {after}" for before, after in sorted(ids) if before != after]
    return "; ".join(found) or None


def quality_mismatch(baseline: Run, candidate: Run) -> str | None:
    """Why the candidate's quality says nothing about this baseline, or None. A run's quality is measured against a
    reference of its own: the baseline must be that very model, run the same way, and what both read must be the same."""
    known = candidate.quality
    if not known.get("reference_hash"):
        return "this run does not tell which model its quality was measured against"
    if known["reference_hash"] != baseline.arm.reference_hash:
        return f"its quality was measured against {known['reference']}, which is not the baseline; compare live"
    if known["reference_way"] != way(baseline.arm.recipe) and not _is_as_good(baseline, known):
        return "its quality was measured against the baseline's model run in another way; compare live"
    for tier, name in (("fidelity", "text"), ("behaviour", "prompts"), ("tasks", "items")):
        before, after = (run.quality.get(tier, {}).get(f"{name}_hash") for run in (baseline, candidate))
        if before is not None and after is not None and before != after:
            return f"the {name} of the two runs' quality differ"
    return None


def _is_as_good(run: Run, reference: dict[str, Any]) -> bool:
    """Whether a run was itself held against that reference, in the same way, and found to say the same."""
    known, distance = run.quality, run.figures.get("kld.mean")
    same = all(known.get(key) == reference[key] for key in ("reference_hash", "reference_way"))
    return same and distance is not None and distance.value is not None and distance.value <= SAME_NATS


def _complete(folder: Path) -> Run:
    if (folder / "compare.json").is_file():
        raise InputError(f"{folder}: a comparison, not a run", hint=f"give its arms: {folder / 'arms'}/NAME")
    run = result.read_run(folder)
    if not run.is_complete:
        raise InputError(f"{folder}: this run is not complete ({run.incomplete_reason})", hint="run the bench again")
    return run


def _stored_evidence(run: Run, folder: Path) -> Evidence:
    samples = list(result.read_samples(folder))
    return Evidence(samples, run.blocks, run.figures, run.quality, run.settings.get("objectives") or {})


def _distinct(labels: Sequence[str]) -> list[str]:
    return [label if labels.index(label) == i else f"{label} ({i + 1})" for i, label in enumerate(labels)]


def write_comparison(document: Comparison, folder: Path) -> None:
    """`compare.json` and what derives from it."""
    result.write_atomic(folder / "compare.json", result.dump(document))
    result.write_atomic(folder / "report.md", markdown.comparison_report(document))
    result.write_atomic(folder / "report.html", html.comparison_html(document))
