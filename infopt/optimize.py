"""`infopt optimize`: predict, plan, load, apply, save, load back and check, publish.

The folder appears under its name only when everything in it was checked, so a folder that exists is complete.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from infopt import __version__, artifact, host, leakage, pipeline, units
from infopt.arms import ArmSpec, file_name
from infopt.artifact import Artifact, LoadBack
from infopt.data import texts
from infopt.errors import DivergedError, InfoptError, InputError, LoadBackError
from infopt.model import atomic, cache, checkpoint, compressed, load, reference, save, shapes
from infopt.model.quiet import quiet
from infopt.protocols import Context, Progress
from infopt.recipe import Recipe
from infopt.result import dump
from infopt.sections import EngineSection
from infopt.settings import LoadOptions
from infopt.step_log import StepLog
from infopt.techniques.base import Technique

if TYPE_CHECKING:
    import torch

    from infopt.model.bundle import Bundle
    from infopt.model.reference import ModelReference


def optimize(
    model: str,
    chosen: Recipe,
    out: Path,
    options: LoadOptions,
    progress: Progress = lambda line: None,
    *,
    resume: bool | None = False,
    beside: Path | None = None,
) -> Artifact:
    """Writes the artifact of `model` under `chosen` to `out`.

    `resume`: go on where an interrupted run of the same recipe, with the same `out`, has stopped (None: if there is one).
    What such a run leaves lies beside `beside`, which is `out` unless given. Raises InputError when
    `out` exists, the model is an artifact already or there is nothing to go on from, LoadBackError when the saved weights
    do not reload as what was made, DiskFullError when there is no room.
    """
    artifact.require_reference(model)
    save.require_free_target(out)
    ref = pipeline.resolve(model, options)
    leaks = leakage.of_recipe(chosen, options.allow_leakage)
    device = host.device_name(options.device)
    host.set_threads(options.threads)
    log = StepLog(chosen, device, len(chosen.steps) > 1, progress)
    with unfinished(beside or out, build_key(ref, chosen, options), resume) as kept:
        bundle, found, source = pipeline.build(
            ref, chosen, device, options=options, progress=progress, observer=log, unfinished=kept
        )
        # A folder of unchanged weights would pass for a quantized one.
        is_idle = any(each.packs for each in found) and not bundle.packed and getattr(bundle.model, "hf_quantizer", None) is None
        with atomic.new_folder(out) as staging:
            made = _Build(ref, chosen, pipeline.home(chosen, found, device), options, bundle, found, staging, progress)
            del bundle  # `made` lets go of it before it loads the saved one
            checks = made.save_and_check(log)
            document = Artifact(
                created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
                infopt_version=__version__,
                reference=model,
                reference_description=made.description,
                reference_hash=reference.fingerprint(ref),
                revision=options.revision,
                recipe=chosen.as_dict(),
                steps=log.records(pipeline.first_at_load(chosen, found)),
                load_back=tuple(checks),
                calibration_hash=source.hash if source else None,
                leaks=leaks,
                notes=("no layer was quantized: the recipe's ignore leaves none",) if is_idle else (),
                seed=options.seed,
                versions=host.versions(found),
                bytes_before=shapes.stored_bytes(ref),
                bytes_after=shapes.stored_bytes(staging),
                content_hash=made.content_hash,
            )
            leakage.write(chosen, source, staging)
            (staging / artifact.FILE).write_text(dump(document), encoding="utf-8")
            (staging / "README.md").write_text(model_card(document, staging), encoding="utf-8")
    return document


@contextmanager
def unfinished(out: Path, key: str, resume: bool | None) -> Iterator[Path]:
    """A folder beside `out` where steps keep their finished parts; gone when the block ends well, or nothing was finished.

    Gone, too, when what was finished does not load back.

    Raises InputError for `resume` where there is nothing to go on from, or it was made by another recipe, and where another
    process is at it.
    """
    folder = out.with_name(f".{out.name}.unfinished")
    stamp = folder / "key"
    if resume is None:
        resume = stamp.is_file() and stamp.read_text(encoding="utf-8") == key
    if resume and not stamp.is_file():
        raise InputError(f"{out}: no interrupted run to go on from", hint="leave out --resume")
    if resume and stamp.read_text(encoding="utf-8") != key:
        raise InputError(
            f"{out}: the interrupted run had another model, recipe, seed, calibration text or library version",
            hint="leave out --resume to start over, or choose another --out",
        )
    with atomic.writing(out):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic.sole(folder / "process", out):
        for part in folder.glob("*/") if not resume else ():
            shutil.rmtree(part, ignore_errors=True)
        with atomic.writing(out):
            stamp.write_text(key, encoding="utf-8")
        try:
            yield folder
        except BaseException as error:
            if any(folder.glob("*/*")) and not isinstance(error, LoadBackError):
                size = units.size(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
                if not isinstance(error, DivergedError):  # it would come to the same end
                    error.add_note(f"the same command with --resume goes on from where it was last kept ({size} in {folder})")
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def build_key(ref: ModelReference, chosen: Recipe, options: LoadOptions) -> str:
    """What an artifact's weights follow from: reference, resolved steps, dtype, seed, calibration text, library versions."""
    found = pipeline.build_techniques(chosen, shapes.shapes(ref), options.device)
    source = pipeline.calibration_source(chosen)
    section = chosen.calibration.model_dump() if any(technique.needs.calibration for technique in found) else {}
    calibration = {**section, "hash": source.hash} if source else None
    key = {
        "reference": reference.fingerprint(ref),
        "steps": [step.as_dict() for step in chosen.steps],
        "dtype": chosen.engine.dtype,
        "seed": options.seed,
        "calibration": calibration,
        "versions": host.versions(found),
    }
    others = [reference.fingerprint(pipeline.resolve(name, options)) for each in found for name in each.models]
    if others:
        key["models"] = others
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def ensure(spec: ArmSpec, options: LoadOptions, progress: Progress = lambda line: None) -> Path | None:
    """The cached artifact of an arm, made now if need be; the arm itself where it is one; None where its weights stay.

    Found again by its `build_key`.
    """
    if spec.is_artifact:
        return Path(spec.model)
    if not pipeline.changes_weights(spec.recipe):
        return None
    digest = build_key(pipeline.resolve(spec.model, options), spec.recipe, options)
    folder = cache.cache_dir() / "artifacts" / f"{file_name(spec.recipe.name)}-{digest}"
    # The arm brings its own run-time half and gates: arms that differ only there share one artifact.
    stored = Recipe(
        name=spec.recipe.name,
        steps=spec.recipe.steps,
        engine=EngineSection(dtype=spec.recipe.engine.dtype),
        calibration=spec.recipe.calibration,
    )

    def build(target: Path) -> None:
        # What such an artifact is judged on, its command knows, and refuses what it has seen.
        optimize(spec.model, stored, target, replace(options, allow_leakage=True), progress, resume=None, beside=folder)

    return cache.build_once(folder, build, is_whole=_is_whole)


def _is_whole(folder: Path) -> bool:
    """Whether an artifact holds what was saved: nobody edited it, no disk lost a part."""
    try:
        return artifact.read_artifact(folder).content_hash in (None, reference.content_hash(folder))
    except (InputError, OSError):
        return False


@dataclass
class _Build:
    """The saved half of `optimize`: everything between the model in memory and the published folder."""

    ref: ModelReference
    recipe: Recipe
    device: str
    options: LoadOptions
    bundle: Bundle | None
    techniques: list[Technique]
    staging: Path
    progress: Progress
    content_hash: str | None = None
    description: str = ""

    def save_and_check(self, log: StepLog) -> list[LoadBack]:
        """Saves, then opens the folder the way its users will."""
        assert self.bundle is not None
        first = pipeline.first_at_load(self.recipe, self.techniques)
        tolerance = max((t.reload_tolerance for t in self.techniques), default=0.0)
        self.description = self.bundle.description
        self.progress("saving")
        self.content_hash = save.save(self.bundle, self.staging, {"recipe.yaml": self.recipe.as_yaml()}).content_hash
        # Only now: some libraries repack their weights for this machine when they first run.
        ids = probe_ids(self.bundle)
        stored = probe(self.bundle, ids)
        if not bool(stored.isfinite().all()):
            raise InfoptError("the model that was made gives logits that are not finite", hint="engine: {dtype: bfloat16}")
        if 0 < first == len(self.techniques):
            log.judge(first - 1, self.bundle)
        at_load = None
        if first < len(self.techniques):
            context = Context(seed=self.options.seed, device=self.device, progress=self.progress)
            for index in range(first, len(self.techniques)):
                self.progress(f"applying {self.recipe.steps[index].name}")
                with log.step(index):
                    self.bundle = self.techniques[index].apply(self.bundle, context)
                log.judge(index, self.bundle)
            at_load = probe(self.bundle, ids)
        dtype = str(self.bundle.model.dtype).removeprefix("torch.")
        self.bundle = None
        gc.collect()
        self.progress("loading back")
        checks = [self._check_plain(stored, ids, tolerance, dtype)]
        saved = pipeline.in_stock(pipeline.as_stored(self.recipe))
        is_reopened = any(type(t).reopen is not Technique.reopen for t in self.techniques)
        if at_load is not None or is_reopened or checks[0].refusal:
            at_load_steps = range(first, len(self.techniques))
            again = pipeline.finish(self.staging, saved, at_load_steps, self.device, self.options, self.progress)
            # infopt opens it in the layers it was made in, so no format's tolerance applies.
            checks.append(compare_probe(stored if at_load is None else at_load, probe(again, ids), 0.0, f"infopt {__version__}"))
        return checks

    def _check_plain(self, stored: torch.Tensor, ids: torch.Tensor, tolerance: float, dtype: str) -> LoadBack:
        """By plain transformers. That it refuses, where the installed libraries are known not to read the format, is recorded."""
        saved = pipeline.as_stored(self.recipe)
        plan = pipeline.load_plan(saved, self.device, trust_remote_code=self.options.trust_remote_code)
        reader = f"plain transformers {host.versions()['transformers']}"
        from infopt.layers.kv_ranges import leave_cache_alone

        gap = compressed.gap(checkpoint.read_config(self.staging).get("quantization_config"), dtype)
        try:
            plain = load.load(pipeline.resolve(str(self.staging), self.options), replace(plan, is_plain=True), self.progress)
            found, rounded = probe(plain, ids), None
            if leave_cache_alone(plain.model):
                found, rounded = probe(plain, ids), found
        except (InputError, RuntimeError):
            if gap is None:
                raise
            return LoadBack(
                reader=reader, refusal=gap, tokens=ids.numel(), max_abs_logit_difference=None, tolerance=0.0, top1_agreement=None
            )
        checked = compare_probe(stored, found, tolerance, reader)
        if rounded is not None:
            checked = checked.model_copy(update={"rounded_cache_logit_difference": float((stored - rounded).abs().max())})
        return checked


def probe_ids(bundle: Bundle, tokens: int = pipeline.PROBE_TOKENS) -> torch.Tensor:
    """[1, tokens] of the first of the bundled evaluation text."""
    import torch

    ids = bundle.tokenizer(texts.read_text("bundled", "evaluation")[:4000], verbose=False)["input_ids"][:tokens]
    return torch.tensor([ids])


def probe(bundle: Bundle, ids: torch.Tensor) -> torch.Tensor:
    """Logits on the probe, [tokens, vocabulary], float32 on the host."""
    import torch

    with torch.inference_mode(), quiet():
        logits: torch.Tensor = bundle.model(input_ids=ids.to(bundle.device), use_cache=False).logits[0]
    return logits.float().cpu()


def compare_probe(made: torch.Tensor, reloaded: torch.Tensor, tolerance: float, by: str) -> LoadBack:
    """Raises LoadBackError when the reloaded logits differ by more than the steps' declared tolerance, or are not finite."""
    import torch

    tolerance = max(tolerance, ROUNDING)
    difference = float((made - reloaded).abs().max())
    if not bool(torch.isfinite(reloaded).all()) or not difference <= tolerance:
        raise LoadBackError(
            f"the saved model, loaded by {by}, gives logits up to {units.significant(difference)} away from the model that "
            f"was made (allowed: {units.significant(tolerance)}); nothing was written",
            hint="this is a defect of the format or its loader on this machine: infopt doctor, and report it",
        )
    same = float((made.argmax(-1) == reloaded.argmax(-1)).float().mean())
    return LoadBack(
        reader=by, tokens=made.shape[0], max_abs_logit_difference=difference, tolerance=tolerance, top1_agreement=same
    )


#: Where a tensor lies in memory alone moves float32 logits by about 1e-6: its alignment picks the kernel.
ROUNDING = 1e-4


def model_card(document: Artifact, folder: Path) -> str:
    """README.md of an artifact: what it is, how it was made, how far its reload was checked, and what steps wrote of their work
    into `folder`: texts as they are, plots."""
    steps = ", ".join(step.name for step in document.steps) or "dtype only"
    at_load = [step.name for step in document.steps if step.is_at_load]
    lines = [
        "---", "library_name: transformers", "tags: [infopt]", "---", "",
        f"# {document.reference_description}, optimized by `{document.recipe['name']}`", "",
        f"{document.recipe['about']}", "",
        f"- reference: `{document.reference}` (sha256 `{document.reference_hash[:16]}`)",
        f"- steps: {steps}",
        f"- stored weights: {units.size(document.bytes_before)} → {units.size(document.bytes_after)}",
        f"- made by infopt {document.infopt_version} on {document.created_utc}, seed {document.seed}",
    ]  # fmt: skip
    if document.leaks:
        lines.append(f"- **judged on what it has seen**, which was allowed: {'; '.join(document.leaks)}")
    lines += [f"- **{note}**" for note in document.notes]
    if at_load:
        names = " and ".join(f"`{name}`" for name in at_load)
        lines.append(f"- **{names} has no file format**: this folder holds the weights from before it; infopt repeats it at load")
    lines += [
        f"- **{check.reader} does not read it**: {check.refusal}"
        if check.refusal
        else f"- loaded back by {check.reader}: logits within {units.significant(check.max_abs_logit_difference)} of the model "
        f"that was made, on {check.tokens} tokens (allowed {units.significant(check.tolerance)})"
        + (
            ""
            if (rounded := check.rounded_cache_logit_difference) is None
            else f"; within {units.significant(rounded)} where it rounds keys and values as the file says"
        )
        for check in document.load_back
    ]
    lines += ["", "```", "infopt bench <this folder>", 'infopt generate <this folder> "Hello"', "```", ""]
    lines += [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md")) if path.name != "README.md"]
    lines += [f"![{path.stem}]({path.name})\n" for path in sorted(folder.glob("*.svg"))]
    return "\n".join(lines)
