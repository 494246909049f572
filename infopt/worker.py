"""The measuring process: `python -m infopt.worker`. One JSON command per line in, JSON events out.

    prepare         an arm's weight steps, into the artifact cache
    check           whether workloads fit a model
    check_quality   whether candidates can be judged against a reference
    open            an arm; tells what was loaded
    block           one block of requests; a `sample` event each
    finish          peaks of memory
    assess          quality of candidates against a reference

stdout carries the protocol alone: whatever libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from infopt import artifact, assess, host, optimize, pipeline
from infopt.arms import ArmSpec
from infopt.data import prompts, texts
from infopt.errors import InfoptError, InputError
from infopt.measure import candidates, energy, environment, memory, nvml, peaks, roofline
from infopt.measure.clock import WallClock
from infopt.measure.value import value
from infopt.measure.window import Instruments, Place, measure_block
from infopt.model import load, reference, shapes
from infopt.protocols import Machine, Request, Trace
from infopt.result import Value
from infopt.settings import LoadOptions, QualitySettings, WorkloadSpec
from infopt.workload import Workload
from infopt.workload.prompts import prompt_set
from infopt.workload.shapes import FixedShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Emit = Callable[..., None]


class OpenArm:
    """An arm that is loaded and ready for blocks."""

    def __init__(self, spec: ArmSpec, options: LoadOptions, workload: WorkloadSpec, machine: Machine | None, emit: Emit) -> None:
        self.spec, self.options, self._emit = spec, options, emit
        self.device = host.device_name(options.device)
        self.threads = host.set_threads(options.threads)
        self.clock = WallClock(self.device)
        self.gpu, gpu_reason = nvml.open_gpu(self.device)
        self.memory = memory.MemoryWatch(self.device, self.gpu, gpu_reason)
        self.machine = machine or peaks.measure_machine(self.device)
        self.reference = pipeline.resolve(spec.model, options)
        self.shapes = shapes.shapes(self.reference)  # imports the model's code: what `load_s` times is the weights
        pipeline.import_libraries(spec.recipe)
        start = self.clock.now()
        self.bundle = pipeline.open_arm(spec, self.device, options, lambda line: emit("progress", line=line))
        self.clock.synchronise()
        self.load_s = self.clock.now() - start
        self.engine = pipeline.engine(self.bundle, spec.recipe)
        self.workload = build_workload(workload, self.bundle.tokenizer, self.shapes.context)
        self.seed = options.seed
        self._decoded: dict[tuple[int, ...], str] = {}
        self.meter = energy.open_meter(self.device, self.clock.now, self.gpu, gpu_reason)
        self.idle_power_w = energy.idle_power_w(self.meter, self.clock) if not isinstance(self.meter, energy.NoEnergy) else None
        start = self.clock.now()
        self.engine.generate(next(iter(self.workload.warmup(self.seed, 0))))
        self.clock.synchronise()
        self.first_run_s = self.clock.now() - start
        self.memory.reset()

    def facts(self) -> dict[str, Any]:
        """What the parent puts into `run.json`."""
        return {
            "reference": self.bundle.description,
            "reference_hash": reference.fingerprint(self.reference),
            "device": self.device,
            "engine": self.engine.name,
            "notes": self.engine.notes,
            "dtype": str(self.bundle.model.dtype).removeprefix("torch."),
            "environment": environment.gather(self.device, self.threads, self.gpu),
            "workload": self.workload.as_dict(),
            "workload_hash": self.workload.hash,
            "machine": asdict(self.machine),
            "traffic": self._traffic(),
            "figures": {
                key: value(key, number, reason="its weights are those it came with").model_dump()
                for key, number in (
                    ("load_s", self.load_s),
                    ("optimize_s", self._optimize_s()),
                    ("first_run_s", self.first_run_s),
                    ("weights_bytes", float(shapes.stored_bytes(self.reference))),
                    ("resident_weights_bytes", float(self.bundle.resident_bytes())),
                )
            },
        }

    def _optimize_s(self) -> float | None:
        """What an artifact says of its making."""
        if not self.spec.is_artifact:
            return None
        return sum(step.seconds for step in artifact.read_artifact(Path(self.spec.model)).steps)

    def block(self, index: int, round: int, position: int, is_first: bool, warmup_cap: int, warmup_later: int) -> dict[str, Any]:
        """One measured block of the workload."""
        instruments = Instruments(
            clock=self.clock,
            energy=self.meter,
            memory=self.memory,
            gpu=self.gpu,
            tokenise=self._tokenise,
            detokenise=self._detokenise,
            idle_power_w=self.idle_power_w,
        )
        block, _ = measure_block(
            self.engine,
            self.workload.batches(self.seed, index),
            instruments,
            Place(self.spec.label, index, round, position),
            warmup=iter(self.workload.warmup(self.seed, index)),
            is_first_block=is_first,
            warmup_cap=warmup_cap,
            warmup_later=warmup_later,
            on_sample=lambda sample: self._emit("sample", sample=sample.model_dump()),
        )
        return block.model_dump()

    def finish(self) -> dict[str, Any]:
        """Peaks of memory since the arm was open, and what its candidates cost against one."""
        found = self.memory.values() | {candidates.KEY: self._candidates_cost()}
        return {"figures": {key: each.model_dump() for key, each in found.items()}}

    def _candidates_cost(self) -> Value:
        sampling = self.spec.recipe.sampling
        if sampling.candidates == 1:
            return candidates.not_asked()
        self._emit("progress", line="one candidate, to see what the others cost")
        single = sampling.model_copy(update={"candidates": 1, "choose": None, "answer": None})
        one = pipeline.engine(self.bundle, replace(self.spec.recipe, sampling=single))
        return candidates.cost_ratio(self.engine, one, self.workload.batches(self.seed, 0), self.clock)

    def _traffic(self) -> dict[str, Any]:
        """What the parent needs for the limits: shapes, bytes that a step reads, and what it multiplies in."""
        dtype = str(self.bundle.model.dtype).removeprefix("torch.")
        element = pipeline.ELEMENT_BYTES[dtype]
        if self.engine.name == pipeline.NATIVE:
            return self._native_traffic()
        found = pipeline.unchecked(self.spec.recipe)
        # As stored, or as held in memory where steps ran at load or a .gguf file was dequantized.
        is_held = self.reference.kind == "gguf" or pipeline.first_at_load(self.spec.recipe, found) < len(found)
        stored = self._held_bytes() if is_held else shapes.stored_bytes(self.reference)
        return {
            "shapes": asdict(self.shapes),
            "weights_bytes": stored if is_held else roofline.touched_weight_bytes(self.shapes, stored, element),
            "kv_element_bytes": element,
            "dtype": next((each.arithmetic for each in reversed(found) if each.arithmetic), dtype),
        }

    def _native_traffic(self) -> dict[str, Any]:
        """What the native engine packed, and multiplies in."""
        model: Any = self.bundle.model
        return {
            "shapes": asdict(self.shapes),
            "weights_bytes": model.step.read_bytes,
            "kv_element_bytes": round(model.step.kv_bytes(1) / self.shapes.kv_bytes_per_token(1)),
            "dtype": model.step.arithmetic,
        }

    def _held_bytes(self) -> int:
        """Weights in memory that a step reads: not an input embedding that is no head as well, which is a gather."""
        model: Any = self.bundle.model
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        is_tied = getattr(head, "weight", None) is embedding
        gathered = 0 if is_tied else int(embedding.numel()) * int(embedding.element_size())
        return self.bundle.resident_bytes() - gathered

    def _tokenise(self, batch: Any) -> None:
        for text in self._texts(batch):
            self.bundle.tokenizer(text, verbose=False)

    def _texts(self, batch: list[Request]) -> list[str]:
        """Decoded outside the timed call, once per prompt."""
        for ids in (request.prompt_ids for request in batch):
            if ids not in self._decoded:
                self._decoded[ids] = str(self.bundle.tokenizer.decode(list(ids)))
        return [self._decoded[request.prompt_ids] for request in batch]

    def _detokenise(self, trace: Trace) -> None:
        for row in trace.output_ids:
            self.bundle.tokenizer.decode(list(row))


def build_workload(spec: WorkloadSpec, tokenizer: PreTrainedTokenizerBase, context: int) -> Workload:
    """The requests themselves. Raises InputError when they do not fit the model's context, or the file is no good."""
    if spec.prompts_file is None:
        ids = tokenizer(texts.read_text("bundled", "evaluation"), verbose=False)["input_ids"]
        return FixedShape(
            name=spec.name,
            prompt_tokens=spec.prompt_tokens,
            new_tokens=spec.new_tokens,
            batch=spec.batch,
            requests=spec.requests,
            text_ids=tuple(ids),
            context=context,
        )
    rows = prompts.read_prompts(Path(spec.prompts_file))
    return prompt_set(
        spec.name,
        rows,
        lambda row: prompts.encode(row, tokenizer),
        new_tokens=spec.new_tokens,
        context=context,
        batch=spec.batch,
        ignore_eos=spec.ignore_eos,
    )


class Worker:
    """Answers commands; holds at most one open arm."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._arm: OpenArm | None = None

    def emit(self, event: str, **content: Any) -> None:
        self._stream.write(json.dumps({"event": event, **content}, allow_nan=False) + "\n")
        self._stream.flush()

    def progress(self, line: str) -> None:
        self.emit("progress", line=line)

    def serve(self, commands: IO[str]) -> None:
        for line in commands:
            arguments = json.loads(line)
            try:
                self.emit("answer", value=getattr(self, f"do_{arguments.pop('command')}")(**arguments))
            except InfoptError as error:
                self.emit("error", kind=type(error).__name__, message=str(error), hint=error.hint)
            except MemoryError:
                self.emit("error", kind="WorkerError", message="out of memory", hint="infopt optimize --dry-run")
            except Exception as error:
                traceback.print_exc()
                self.emit("error", kind="WorkerError", message=f"{type(error).__name__}: {error}".split("\n")[0], hint=None)

    def do_prepare(self, arm: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        folder = optimize.ensure(ArmSpec.from_dict(arm), LoadOptions(**options), self.progress)
        return {"folder": None if folder is None else str(folder), "seconds": time.perf_counter() - start}

    def do_check(self, arm: dict[str, Any], options: dict[str, Any], workloads: list[dict[str, Any]]) -> None:
        """Refuses a workload that does not fit the model, without reading a weight."""
        spec = ArmSpec.from_dict(arm)
        ref = pipeline.resolve(spec.model, LoadOptions(**options))
        tokenizer, context = load.open_tokenizer(ref), shapes.shapes(ref).context
        for each in (WorkloadSpec(**workload) for workload in workloads):
            build_workload(each, tokenizer, context)
            drafts_alone = spec.recipe.speculative and spec.recipe.engine.name != pipeline.NATIVE
            if each.batch > 1 and (drafts_alone or spec.recipe.cache.prefix):
                raise InputError(f"{each.name}: {spec.recipe.name} takes 1 request at a time", hint="use batch 1")

    def do_check_quality(
        self, reference: dict[str, Any], candidates: list[dict[str, Any]], options: dict[str, Any], settings: dict[str, Any]
    ) -> None:
        arms = [ArmSpec.from_dict(arm) for arm in (reference, *candidates)]
        assess.check(arms[0], arms[1:], LoadOptions(**options), QualitySettings(**settings))

    def do_fingerprint(self, model: str, options: dict[str, Any]) -> str:
        return reference.fingerprint(pipeline.resolve(model, LoadOptions(**options)))

    def do_open(
        self, arm: dict[str, Any], options: dict[str, Any], workload: dict[str, Any], machine: dict[str, Any] | None
    ) -> dict[str, Any]:
        """`machine`: its peaks, where an earlier process of the arm measured them."""
        peaks = Machine(**machine) if machine else None
        self._arm = OpenArm(ArmSpec.from_dict(arm), LoadOptions(**options), WorkloadSpec(**workload), peaks, self.emit)
        return self._arm.facts()

    def do_block(self, **arguments: Any) -> dict[str, Any]:
        assert self._arm is not None
        return self._arm.block(**arguments)

    def do_finish(self) -> dict[str, Any]:
        assert self._arm is not None
        return self._arm.finish()

    def do_assess(
        self, reference: dict[str, Any], candidates: list[dict[str, Any]], options: dict[str, Any], settings: dict[str, Any]
    ) -> None:
        """Emits one `quality` event per candidate."""
        arms = [ArmSpec.from_dict(arm) for arm in (reference, *candidates)]
        quality = QualitySettings(**settings)
        for label, found in assess.assess(arms[0], arms[1:], LoadOptions(**options), quality, self.progress):
            self.emit("quality", label=label, quality=found)


def main() -> None:
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    Worker(protocol).serve(sys.stdin)


if __name__ == "__main__":
    main()
