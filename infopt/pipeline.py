"""Reference and recipe → an open model: plan → load → apply, or reopen what was saved.

The only place where references, techniques and engines meet. `optimize` builds and saves through it; workers, `generate`
and the quality checks open arms through it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt import artifact, engines, host, recipe, techniques
from infopt.arms import ArmSpec
from infopt.data import calibration, lessons
from infopt.data.calibration import Source
from infopt.errors import InputError, MissingNeedError, RecipeError
from infopt.measure import memory
from infopt.model import cache, load, reference, same_tokens, shapes
from infopt.model.plan import LoadPlan
from infopt.needs import missing_need
from infopt.protocols import Context, Engine, Machine, Prediction, Progress, Sampling, Shapes
from infopt.recipe import Recipe
from infopt.sections import OWN_DRAFTS, EngineSection, SamplingSection, unheard
from infopt.settings import LoadOptions
from infopt.techniques.base import Technique

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle
    from infopt.model.reference import ModelReference

PROBE_TOKENS = 64
"""Length of the text on which a saved model is compared with the one that was made."""
NATIVE = "native"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def resolve(model: str, options: LoadOptions) -> ModelReference:
    return reference.parse(model, revision=options.revision, trust_remote_code=options.trust_remote_code)


def build_techniques(
    chosen: Recipe,
    model_shapes: Shapes,
    device: str = "auto",
    *,
    element_bytes: Callable[[], float] | None = None,
    machine: Callable[[], Machine] | None = None,
) -> list[Technique]:
    """The recipe's techniques, each checked against the shapes that it finds, this machine and the device asked for.

    `element_bytes`, `machine`: what budgets of bytes and seconds need; without them these are checked when the step runs.
    Raises RecipeError, MissingNeedError.
    """
    techniques.check_order(chosen)
    found = []
    for index, step in enumerate(chosen.steps):
        technique = techniques.find(step.name, chosen.place(index))(step.options)
        lacking = missing_need(technique.needs, device)
        if lacking:
            raise MissingNeedError(f"{chosen.place(index)}: {lacking.message}", hint=lacking.hint)
        for name in technique.models:
            reference.parse(name)
        technique.cache_dtype, technique.device = chosen.cache.dtype, device
        technique.calibration_tokens = chosen.calibration.samples * chosen.calibration.tokens
        technique.calibration_samples = chosen.calibration.samples
        technique.element_bytes, technique.machine = element_bytes, machine
        technique.check(model_shapes, chosen.place(index))
        model_shapes = technique.reshape(model_shapes)
        found.append(technique)
    return found


def unchecked(chosen: Recipe) -> list[Technique]:
    """The techniques that an artifact was made with, whatever shapes they left of the model."""
    return [techniques.find(step.name, chosen.place(index))(step.options) for index, step in enumerate(chosen.steps)]


def import_libraries(chosen: Recipe) -> None:
    """Imports what opening an arm of the recipe will need, so that nobody takes it for loading."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 - resolved here, not when first used

    for index, step in enumerate(chosen.steps):
        for module in techniques.find(step.name, chosen.place(index))(step.options).needs.modules:
            importlib.import_module(module)


def changes_weights(chosen: Recipe) -> bool:
    """Whether running the recipe needs an artifact first: it has weight steps, or stores another dtype."""
    return bool(chosen.steps) or chosen.engine.dtype != "auto"


def load_plan(chosen: Recipe, device: str, *, trust_remote_code: bool = False) -> LoadPlan:
    attention = None if chosen.engine.attention == "auto" else chosen.engine.attention
    return LoadPlan(dtype=chosen.engine.dtype, device=device, attention=attention, trust_remote_code=trust_remote_code)


def as_stored(chosen: Recipe) -> Recipe:
    """The recipe with whatever dtype the files hold."""
    return replace(chosen, engine=chosen.engine.model_copy(update={"dtype": "auto"}))


def in_stock(chosen: Recipe) -> Recipe:
    """The recipe in transformers' own modules, whatever engine it names."""
    return replace(chosen, engine=chosen.engine.model_copy(update={"name": "transformers"}))


def predict(chosen: Recipe, model_shapes: Shapes, loaded: Prediction, machine: Machine) -> list[tuple[str, Prediction]]:
    """What every step will cost, by name, from the model as `loaded`."""
    rows, state, element = [], loaded, loaded.weights_bytes / model_shapes.parameters
    found = build_techniques(chosen, model_shapes, machine.device, element_bytes=lambda: element, machine=lambda: machine)
    for technique, step in zip(found, chosen.steps, strict=True):
        state = technique.predict(model_shapes, state, machine)
        model_shapes = technique.reshape(model_shapes)
        rows.append((step.name, state))
    return rows


def calibration_source(chosen: Recipe) -> Source | None:
    """What the recipe's steps read: what its calibration draws, and rows of their own. None where none reads any.

    Raises InputError.
    """
    steps = unchecked(chosen)
    found = [calibration.read(chosen.calibration)] if any(step.needs.calibration for step in steps) else []
    found += [lessons.source(Path(name)) for name in dict.fromkeys(step.data for step in steps if step.data)]
    return calibration.joined(found) if found else None


def calibration_ids(ref: ModelReference, chosen: Recipe) -> tuple[tuple[tuple[int, ...], ...], Source | None]:
    """The recipe's calibration windows as token ids of the model, and where they come from; no weight is read."""
    source = calibration_source(chosen)
    if source is None or not any(step.needs.calibration for step in unchecked(chosen)):
        return (), source
    section, context = chosen.calibration, shapes.shapes(ref).context
    if context and section.tokens > context:
        raise RecipeError("calibration.tokens", f"found {section.tokens}; allowed: the model's context of {context} at most")
    return calibration.windows(calibration.read(section), section, load.open_tokenizer(ref)), source


def home(chosen: Recipe, found: list[Technique], device: str) -> str:
    """Where the weights lie while steps work on `device`: on the host where every step brings over what it works on.

    So a model larger than the device's memory can be made. Attention that the host has no kernel for keeps it on the device.
    """
    walks = bool(found) and all(technique.walks for technique in found)
    return "cpu" if walks and chosen.engine.attention != "flash_attention_2" else device


class Observer:
    """What `build` tells while it runs. This one listens to nothing."""

    wants_reference = False
    """Whether `loaded` must be called with the model as it is before any step."""

    def loaded(self, bundle: Bundle) -> None: ...

    def step(self, index: int) -> AbstractContextManager[None]:
        """Entered around a step."""
        return nullcontext()

    def done(self, index: int, bundle: Bundle) -> None: ...


def build(
    ref: ModelReference,
    chosen: Recipe,
    device: str,
    *,
    options: LoadOptions,
    progress: Progress = lambda line: None,
    observer: Observer | None = None,
    unfinished: Path | None = None,
) -> tuple[Bundle, list[Technique], Source | None]:
    """Plan → load → apply, up to the first step that a file cannot hold (see `Technique.at_load`).

    `unfinished`: a folder where steps keep what lets an interrupted run go on. Returns the open model, all techniques
    of the recipe, and the calibration text where one was read.
    """
    observer = observer or Observer()
    found = _techniques_of(ref, chosen, device)
    storable = found[: first_at_load(chosen, found)]
    plan = load_plan(chosen, home(chosen, found, device), trust_remote_code=options.trust_remote_code)
    for technique in storable:
        plan = technique.plan(plan)
    samples, source = calibration_ids(ref, chosen)
    progress(f"loading {ref.text}")
    # A technique that only plans does its work while the weights are read: loading is its step.
    loading = next((i for i, t in enumerate(storable) if type(t).apply is Technique.apply), None)
    if observer.wants_reference and loading is not None:
        observer.loaded(load.load(ref, load_plan(chosen, device, trust_remote_code=options.trust_remote_code), progress))
    with nullcontext() if loading is None else observer.step(loading):
        bundle = load.load(ref, plan, progress)
    if observer.wants_reference and loading is None:
        observer.loaded(bundle)

    def open_model(name: str | None) -> Bundle:
        source = resolve(name, options) if name else ref
        return load.load(source, load_plan(chosen, device, trust_remote_code=options.trust_remote_code), progress)

    def open_tokenizer(name: str | None) -> Any:
        return load.open_tokenizer(resolve(name, options) if name else ref)

    def open_engine(name: str | None, sampling: Sampling) -> Engine:
        drawn = Recipe(name="own", sampling=SamplingSection(temperature=sampling.temperature, candidates=sampling.candidates))
        return engine(natively(open_model(name), drawn, options, progress), drawn)

    context = Context(
        options.seed, device, samples, progress,
        open_model=open_model, open_tokenizer=open_tokenizer, open_engine=open_engine,
    )  # fmt: skip
    for index, technique in enumerate(storable):
        if index != loading:
            progress(f"applying {chosen.steps[index].name}")
            own = unfinished / f"{index}-{chosen.steps[index].name}" if unfinished else None
            with observer.step(index):
                bundle = technique.apply(bundle, replace(context, unfinished=own))
        if samples and not technique.keeps_vocabulary:
            again = calibration.windows(calibration.read(chosen.calibration), chosen.calibration, bundle.tokenizer)
            context = replace(context, calibration_ids=again)
        bundle = replace(bundle, steps=(*bundle.steps, chosen.steps[index].name))
        observer.done(index, bundle)
    return bundle, found, source


def _techniques_of(ref: ModelReference, chosen: Recipe, device: str) -> list[Technique]:
    found = shapes.shapes(ref)

    def element_bytes() -> float:
        dtype = "float32" if ref.kind == "gguf" and chosen.engine.dtype == "auto" else chosen.engine.dtype  # as such files open
        return ELEMENT_BYTES.get(dtype) or shapes.stored_bytes(ref) / found.parameters

    peaks = partial(host.measured, device, host.set_threads(None))
    return build_techniques(chosen, found, device, element_bytes=element_bytes, machine=peaks)


def first_at_load(chosen: Recipe, found: list[Technique]) -> int:
    """Index of the first step that runs at load; all after it must too. Raises RecipeError."""
    first = next((i for i, technique in enumerate(found) if technique.at_load), len(found))
    for index in range(first, len(found)):
        if not found[index].at_load:
            raise RecipeError(
                chosen.place(index),
                f"follows {chosen.steps[first].name}, which no file format can hold, so its result cannot be stored",
                hint=f"move {chosen.steps[first].name} to the end",
            )
    return first


def reopen(
    folder: Path, engine: EngineSection, device: str, options: LoadOptions, progress: Progress = lambda line: None
) -> Bundle:
    """An artifact as infopt runs it under `engine`: loaded, its at-load steps repeated, faster layers swapped in."""
    saved = artifact.read_artifact(folder)
    stored = recipe.load(str(folder / "recipe.yaml"), techniques.find)
    chosen = replace(stored, engine=engine)
    if engine.dtype == stored.engine.dtype:
        chosen = as_stored(chosen)
    options = replace(options, seed=saved.seed)  # the steps at load are those that the artifact was checked with
    bundle = finish(folder, chosen, saved.at_load, device, options, progress)
    return replace(bundle, description=f"{saved.reference_description}, optimized by {chosen.name}")


def finish(folder: Path, chosen: Recipe, at_load: Sequence[int], device: str, options: LoadOptions, progress: Progress) -> Bundle:
    """The weights in `folder` with what a file could not hold done again: steps `at_load`, and faster layers."""
    found = unchecked(chosen)
    plan = load_plan(chosen, device, trust_remote_code=options.trust_remote_code)
    for index in at_load:
        lacking = missing_need(found[index].needs, device)
        if lacking:
            raise MissingNeedError(f"{chosen.place(index)}: {lacking.message}", hint=lacking.hint)
        plan = found[index].plan(plan)
    bundle = load.load(reference.parse(str(folder), trust_remote_code=options.trust_remote_code), plan, progress)
    context = Context(seed=options.seed, device=device, progress=progress)
    for index, technique in enumerate(found):
        if index in at_load:
            bundle = technique.apply(bundle, context)
        elif chosen.engine.name != NATIVE or technique.reopens_always or at_load:  # steps at load build on what is opened
            bundle = technique.reopen(bundle)
        else:
            bundle = replace(bundle, undone=(*bundle.undone, technique.reopen))
    return replace(bundle, steps=tuple(step.name for step in chosen.steps))


def open_arm(spec: ArmSpec, device: str, options: LoadOptions, progress: Progress = lambda line: None) -> Bundle:
    """An arm's model: the artifact, or a reference whose recipe leaves its weights alone.

    Weight steps are applied once, by `optimize.ensure`, never here: asking for them is a mistake of the caller.
    """
    if spec.is_artifact:
        bundle = reopen(Path(spec.model), spec.recipe.engine, device, options, progress)
    else:
        assert not changes_weights(spec.recipe), "open an arm's artifact, not its recipe"
        plan = load_plan(spec.recipe, device, trust_remote_code=options.trust_remote_code)
        bundle = load.load(resolve(spec.model, options), plan, progress)
    return natively(bundle, spec.recipe, options, progress) if spec.recipe.engine.name == NATIVE else bundle


def natively(bundle: Bundle, chosen: Recipe, options: LoadOptions, progress: Progress = lambda line: None) -> Bundle:
    """The bundle with its module replaced by what the native engine runs; as it was, with a note, where no native way fits.

    Raises InputError for a draft that does not go with the model, or that only the native engine could use.
    """
    from infopt.runtime.decoder import Unfit

    try:
        opened = _opened(bundle, chosen, progress)
    except (Unfit, MissingNeedError) as error:
        if chosen.speculative and chosen.speculative.draft != "prompt_lookup":
            raise InputError(f"draft {chosen.speculative.draft!r} needs the native engine: {error}") from None
        note = f"stock generate of transformers; the native engine does not fit: {error}"
        progress(note)
        for reopen_it in bundle.undone:
            bundle = reopen_it(bundle)
        return replace(bundle, notes=(note,), undone=())
    for line in opened.notes[1:]:
        progress(line)
    for name in chosen.speculative.models if chosen.speculative else ():
        progress(f"opening the draft {name}")
        opened.drafts[name] = _draft(name, bundle, opened.step, chosen, options, progress)
    return replace(bundle, model=opened, notes=opened.notes)


def _opened(bundle: Bundle, chosen: Recipe, progress: Progress, beside: Any = None) -> Any:
    """A NativeModel of the bundle's module, which it consumes; `beside`: as in Settings. Raises Unfit, MissingNeedError."""
    import torch

    from infopt.runtime.native_model import Settings, open_native

    section, device, tuned = chosen.engine, str(bundle.device), cache.cache_dir() / "kernels"
    settings = Settings(
        torch.get_num_threads(), section.weights, section.head, chosen.cache.dtype, section.way,
        memory.available(device) // 2, beside, device, tuned,
    )  # fmt: skip
    opened = open_native(bundle.model, settings, progress)
    opened.notes = (*opened.notes, *unheard(section, chosen.cache, opened.step.name))
    return opened


def _draft(name: str, target: Bundle, step: Any, chosen: Recipe, options: LoadOptions, progress: Progress) -> Any:
    """The native step of a model that drafts for `target`, run by `step`. Raises InputError where it knows other tokens."""
    from infopt.runtime.decoder import Unfit

    ref, device = Path(name).expanduser(), str(target.device)
    if artifact.is_artifact(ref):
        found = reopen(ref, EngineSection(), device, options, progress)
    else:
        found = load.load(resolve(name, options), load_plan(as_stored(chosen), device), progress)
    gap = same_tokens.difference(target.tokenizer, found.tokenizer)
    if gap:
        raise InputError(
            f"speculative.draft: {name} knows other tokens than the model ({gap}); allowed: a model with the same vocabulary",
            hint="speculative: {draft: prompt_lookup} needs no second model",
        )
    try:
        return _opened(found, replace(chosen, engine=chosen.engine.model_copy(update={"way": "auto"})), progress, step).step
    except Unfit as error:
        hint = "speculative: {draft: prompt_lookup} needs no second model"
        raise InputError(f"speculative.draft: {name} does not run in the native engine: {error}", hint=hint) from None


def engine(bundle: Bundle, chosen: Recipe) -> Engine:
    """The recipe's engine around an open model: stock `generate` where the native engine does not run it.

    Raises InputError for settings that do not go together.
    """
    section, speculative = chosen.engine, chosen.speculative
    is_stock = section.name == NATIVE and not hasattr(bundle.model, "step")
    if is_stock and chosen.sampling.choose == "mean_logprob":
        raise InputError(
            f"sampling.choose: found mean_logprob, but this is {bundle.notes[0]}; allowed: majority, check or null",
            hint="--set sampling.choose=majority",
        )
    options: dict[str, Any] = {"draft": speculative.draft} if speculative else {}
    if speculative and speculative.tokens != "auto":
        options["draft_tokens"] = speculative.tokens
    if speculative and section.name == NATIVE and not is_stock:
        model: Any = bundle.model
        own = OWN_DRAFTS[:1] if model.step.name == "swapped" else OWN_DRAFTS
        options |= {"draft_layers": speculative.layers, "among": (*own, *speculative.models)}
    make = engines.find("transformers" if is_stock else section.name)
    made: Engine = make(
        bundle.model,
        pad_token_id=bundle.tokenizer.pad_token_id,
        sampling=Sampling(**chosen.sampling.model_dump()),
        cache=chosen.cache.kind,
        prefix=chosen.cache.prefix,
        compile=section.compile,
        notes=bundle.notes,
        **options,
    )
    # What the last step says holds: one after pruning may fill the zeros, or store them in fewer bits. Tokens stay what they are.
    steps = [done for step in chosen.steps if not (done := techniques.find(step.name)(step.options)).is_record]
    made.notes += tuple(each.remark for each in steps if each.remark and (each is steps[-1] or not each.keeps_vocabulary))
    return made
