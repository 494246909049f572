"""`infopt export --to onnx`: onnxruntime-genai's model builder, its output run there and compared before it counts.

The builder quantizes by itself (int8 and int4, blocks of 32 inputs), from plain weights: an artifact's own integers are
not carried over.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt import host, leakage
from infopt.errors import InfoptError, InputError, LoadBackError, MissingNeedError, unknown
from infopt.export import compare
from infopt.export.record import Export, LoadBackCheck
from infopt.export.source import TOKENS, TRICKY, Source, open_source, probe_texts, unrounded
from infopt.model import atomic, reference, save
from infopt.needs import Needs, missing_need
from infopt.optimize import probe, probe_ids
from infopt.protocols import Progress
from infopt.result import dump
from infopt.settings import LoadOptions

if TYPE_CHECKING:
    import torch

#: Type → the least share of positions where the likeliest token must be the source's. A broken graph agrees on almost
#: none; what 4 bits cost depends on the model, and `against_source` says it.
TOP1_FLOORS = {"fp32": 0.99, "int8": 0.8, "int4": 0.3}
#: The builder's own options. By default it puts a head that is the embedding too in 4 bits: on the demo model the likeliest
#: token is then the source's at 60 % of the positions, with an 8-bit head and llama.cpp's search for scales at 70 %.
BUILDER_OPTIONS = {"int4": ("algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8")}
#: Largest |logit| change of fp32: another library's kernels, the same weights.
TOLERANCE = 5e-3
READER = "onnxruntime-genai"
REPORT = "export.json"
PROMPTS = ("The capital of France is", "Once upon a time", "1, 2, 3,", "def add(a, b):")
NEW_TOKENS = 16
_NEEDS = Needs(modules=("onnxruntime_genai", "onnx", "onnx_ir"))
_KEPT = 4  # lines of the builder's own error


def export(model: str, out: Path, kind: str, options: LoadOptions, progress: Progress = lambda line: None) -> Export:
    """Writes `model` (a reference or an artifact) to the folder `out` in precision `kind`: fp32, int8 or int4.

    Raises InputError when `out` exists, the precision is unknown or the builder refuses the model, MissingNeedError
    without the `onnx` extra, LoadBackError when onnxruntime-genai does not answer as the source does, DiskFullError.
    """
    if kind not in TOP1_FLOORS:
        raise InputError(unknown("ONNX type", kind, TOP1_FLOORS), hint="infopt export --help lists them")
    lacking = missing_need(_NEEDS)
    if lacking:
        raise MissingNeedError(f"--to onnx {lacking.message}", hint="pip install 'infopt[onnx]'")
    save.require_free_target(out)
    source = open_source(model, options, progress)
    if kind != "fp32":
        source = unrounded(source, options, progress)
    ids = probe_ids(source.bundle, TOKENS)
    expected = probe(source.bundle, ids)
    prompts = [source.bundle.tokenizer(text, verbose=False)["input_ids"] for text in PROMPTS]
    answers = [greedy(source.bundle.model, prompt) for prompt in prompts]
    texts = compare.encoded(source.bundle.tokenizer, probe_texts(source.bundle.tokenizer))
    if kind != "fp32":
        head = ", the head in 8" if kind in BUILDER_OPTIONS else ""
        source.notes.append(f"quantized to {kind}{head} by onnxruntime-genai's builder, from the source's plain weights")
    with atomic.new_folder(out, source.bundle.resident_bytes()) as staging:
        with tempfile.TemporaryDirectory(dir=staging, prefix="work-") as scratch:
            folder = _plain_folder(source, Path(scratch))
            source.close()
            gc.collect()
            progress(f"building {kind}")
            _build(folder, staging, kind, Path(scratch))
        progress("loading back")
        reader = Reader(staging)
        found = reader.logits(ids)
        check = _check(reader, kind, compare.figures(expected, found), texts, list(zip(prompts, answers, strict=True)))
        if check.texts < len(texts):  # its tokenizer.json is the source's own
            odd = len(texts) - check.texts
            source.notes.append(f"{READER}'s own tokenizer encodes {odd} of {len(texts)} unusual texts differently")
        made = Export(
            **source.provenance(),
            to="onnx",
            type=kind,
            path=str(out),
            stored={},
            exact=0,
            bytes=sum(path.stat().st_size for path in staging.iterdir()),
            checks=(check,),
            against_source=compare.against(expected, found, ids),
            notes=tuple(source.notes),
            versions=host.versions() | {name: version(name) for name in ("onnxruntime-genai", "onnxruntime", "onnx")},
        )
        source.copy_fingerprint(staging / leakage.FILE)
        save.write_text(staging / REPORT, dump(made))
    return made


def _check(
    reader: Reader, kind: str, figures: dict[str, Any], texts: dict[str, list[int]], answers: list[tuple[list[int], list[int]]]
) -> LoadBackCheck:
    """`answers`: prompts with the source's own answers. Raises LoadBackError when onnxruntime-genai answers too differently."""
    odd = compare.parting(texts, reader.encode)
    compare.same_tokens({text: ids for text, ids in texts.items() if text not in TRICKY}, reader.encode, READER)
    same = sum(reader.greedy(prompt) == answer for prompt, answer in answers)
    check = compare.require(
        LoadBackCheck(
            **figures,
            reader=READER,
            tolerance=TOLERANCE if kind == "fp32" else None,
            top1_floor=TOP1_FLOORS[kind],
            texts=len(texts) - len(odd),
            texts_tried=len(texts),
            answers=len(answers),
            same_answers=same,
        )
    )
    if kind == "fp32" and same < len(answers):
        raise LoadBackError(
            f"{READER} answers {len(answers) - same} of {len(answers)} prompts in other tokens; nothing was written"
        )
    return check


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """The likeliest continuation of `prompt`, at most `NEW_TOKENS` tokens, up to and with an end token."""
    import torch

    ends = model.generation_config.eos_token_id
    ids, cache = torch.tensor([prompt]), None
    made: list[int] = []
    while len(made) < NEW_TOKENS:
        with torch.inference_mode():
            step = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, token = step.past_key_values, int(step.logits[0, -1].argmax())
        made.append(token)
        if token == ends or (isinstance(ends, list) and token in ends):
            break
        ids = torch.tensor([[token]])
    return made


def _plain_folder(source: Source, scratch: Path) -> Path:
    """A folder of plain weights, as the builder reads them: the source's own where it has one."""
    own = source.reference
    if own.kind in ("demo", "tiny", "folder", "hub") and own.adapter is None and not source.was_quantized:
        return reference.local_path(own)
    save.save(source.bundle, scratch / "plain")
    return scratch / "plain"


def _build(folder: Path, target: Path, kind: str, scratch: Path) -> None:
    arguments = ["-m", str(folder), "-o", str(target), "-p", kind, "-e", "cpu", "-c", str(scratch / "cache")]
    if kind in BUILDER_OPTIONS:
        arguments += ["--extra_options", *BUILDER_OPTIONS[kind]]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if done.returncode or not (target / "model.onnx").is_file():
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        if "No space left" in reason:
            raise InfoptError(f"{target.parent}: no space left while the builder wrote", hint="free some space")
        raise InputError(f"onnxruntime-genai's builder does not convert this model: {reason}", hint="--to gguf may")


class Reader:
    """A built folder, open in onnxruntime-genai."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self._library: Any = onnxruntime_genai
        try:
            self._model = self._library.Model(str(folder))
            self._tokenizer = self._library.Tokenizer(self._model)
        except Exception as error:  # the library raises RuntimeError and its own
            raise LoadBackError(f"{READER} does not open what its builder wrote: {error}") from None

    def _start(self, prompt: list[int], new_tokens: int) -> Any:
        import numpy as np

        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False)
        generator = self._library.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        return generator

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[tokens, vocabulary] of `ids` [1, tokens]."""
        import torch

        return torch.from_numpy(self._start(ids[0].tolist(), 1).get_output("logits")[0].copy()).float()

    def greedy(self, prompt: list[int]) -> list[int]:
        """As the module's `greedy`, step by step with the engine's cache."""
        generator = self._start(prompt, NEW_TOKENS)
        made: list[int] = []
        while not generator.is_done() and len(made) < NEW_TOKENS:
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        return made

    def encode(self, text: str) -> list[int]:
        """As the engine's own tokenizer does."""
        return [int(token) for token in self._tokenizer.encode(text)]
