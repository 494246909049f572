"""Which engines read what infopt writes: every artifact and export × every reader, each reader in its own Python.

    make interop
    python benchmarks/interop.py --only 'rtn_*' --readers "transformers;vllm" --out results/interop

A reader is a script, run as `PYTHON script REQUEST.json ANSWER.json`, that imports the engine and nothing of infopt's models:

    request  {"folder": path, "dtype": "float32", "prompts": [[ids]], "new_tokens": n, "text": [ids], "texts": [str]}
    answer   {"versions": {name: version}, and either "error": one line,
              or "outputs": [{"tokens": [ids], "logprobs": […], "margins": […]}], one per prompt, greedy, past end tokens,
                 "text_logprobs": of each id of `text` but the first,
                 "encoded" (optional): ids of each of `texts`, by the reader's own tokenizer,
                 "layers" (optional): how many layers run in which kernel, "dtype" (optional): when not the one asked for}

What is expected comes from the dense float32 weights that the artifact stands for (for a GGUF file: those in the file; for
an artifact that rounds activations or has adapters: infopt's own layers), run in transformers. A prompt counts as equal when
all its tokens are; as a tie when the first other token comes where the two likeliest were nearer to each other than the reader's
log-probabilities are to the expected ones. llama.cpp rounds activations, mostly to 8 bits, which on the demo model moves
log-probabilities by 0.07 nats on average, and so does the same rounding after a change of 1e-6 of the embeddings: no two
programs agree more closely. So it is held against that distance, measured by rounding in transformers: `rounding` is an
answer that lies no further from the dense weights than `ROUNDING` times that. The same goes for artifacts that round
activations themselves, in every reader: they are held against what infopt's own layers make of embeddings that differ by
1e-6. Nothing excuses a perplexity of the text that is off by more than 2 %, or than `ROUNDING` times what that change makes
of it: then the reader has other weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import interop_rounding
import interop_transformers
import torch

from infopt import __version__, arms, optimize, pipeline, recipe, techniques
from infopt.backends import environments
from infopt.data import texts
from infopt.errors import InfoptError
from infopt.export import export
from infopt.export.source import open_source, probe_texts
from infopt.model.bundle import Bundle
from infopt.settings import LoadOptions

HERE = Path(__file__).parent
ROOT = HERE.parent
OPTIONS = LoadOptions(device="cpu")

#: Artifacts that are read: shipped recipes, and some of them with a setting changed.
RECIPES: dict[str, tuple[str, ...]] = dict.fromkeys((
    "rtn_int8", "int8", "rtn_int4", "gptq_int4", "awq_int4", "autoround_int4", "mixed_int4", "mixed_vllm", "qat_int3", "rtn_w8a8",
    "smoothquant_int8", "fp8", "mxfp4", "nvfp4", "nf4", "qlora_nf4", "bnb_int8", "llmcompressor_gptq",
    "llmcompressor_smoothquant", "llmcompressor_fp8", "llmcompressor_nvfp4",
), ()) | {
    "rtn_int4, a zero point": ("steps.0.rtn.symmetric=false",),
    "rtn_int4, per row": ("steps.0.rtn.group_size=null",),
    "rtn_w8a8, no zero points": ("steps.0.rtn.activations=token",),
}  # fmt: skip
#: (name, recipe or None for the model itself, format, type)
EXPORTS = (
    *((f"gguf-{kind}", None, "gguf", kind) for kind in ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_1", "q4_0")),
    ("rtn_int4-gguf-q4_0", "rtn_int4", "gguf", "q4_0"),
    ("int8-gguf-q8_0", "int8", "gguf", "q8_0"),
    *((f"onnx-{kind}", None, "onnx", kind) for kind in ("fp32", "int8", "int4")),
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three states of matter are",
)
NEW_TOKENS = 24
TEXT_TOKENS = 256
TIMEOUT_S = 1800
ROUNDING = 1.5
PERPLEXITY_OFF = 0.02
JITTER = 1e-6
JITTERS = 6


@dataclass(frozen=True)
class Reader:
    """`python` None: this one. A reader whose Python is not there is listed as not installed."""

    name: str
    script: str
    formats: tuple[str, ...]
    python: Path | None = None


def readers(vllm: Path | None) -> tuple[Reader, ...]:
    found = environments.ENVIRONMENTS.get("vllm")
    own = found.interpreter if found else environments.root() / "vllm" / "bin" / "python"
    return (
        Reader("transformers", "interop_transformers.py", ("folder", "gguf")),
        Reader("transformers, oldest", "interop_transformers.py", ("folder", "gguf"), ROOT / ".venv-oldest" / "bin" / "python"),
        Reader("vllm", "interop_vllm.py", ("folder",), vllm or own),
        Reader("llama.cpp", "interop_llama.py", ("gguf",)),
        Reader("onnxruntime-genai", "interop_genai.py", ("onnx",)),
    )


@dataclass(frozen=True)
class Subject:
    """Something to read. `reference`: the model or artifact whose dense weights say what to expect."""

    name: str
    format: str
    path: Path
    reference: str
    bytes: int
    is_same: bool = True
    """False: its builder quantized the reference anew, so that it is another model and tells its distance only."""


@dataclass
class Row:
    subject: str
    format: str
    reader: str
    versions: dict[str, str] = field(default_factory=dict)
    loads: bool = False
    verdict: str = "does not load"
    """equal | ties | rounding | DIFFERENT | requantized | does not load | not installed | not compared"""
    equal_prompts: int | None = None
    prompts: int | None = None
    max_abs_logprob_difference: float | None = None
    mean_abs_logprob_difference: float | None = None
    rounding_mean_abs_logprob_difference: float | None = None
    """What rounding activations as the reader does costs by itself."""
    rounding_perplexity_off: float | None = None
    """The furthest that it moves the text's perplexity."""
    texts_encoded_alike: int | None = None
    texts: int | None = None
    layers: dict[str, int] | None = None
    dtype: str | None = None
    """What the reader computed in, where it says so."""
    perplexity_ratio: float | None = None
    reason: str | None = None


def subjects(model: str, only: str, work: Path) -> Iterator[Subject]:
    """Artifacts from infopt's cache, made there if need be, and exports, made afresh."""
    made: dict[str, Path] = {}
    for name, overrides in RECIPES.items():
        wanted = fnmatch(name, only) or any(source == name and fnmatch(export_name, only) for export_name, source, *_ in EXPORTS)
        if not wanted:
            continue
        print(f"making {name}", file=sys.stderr)
        try:
            folder = optimize.ensure(arms.spec(model, name.split(",")[0], overrides, None), OPTIONS)
        except InfoptError as error:
            print(f"  {error}", file=sys.stderr)
            continue
        if folder is not None:
            made[name] = folder
            if fnmatch(name, only):
                yield Subject(name, "folder", folder, str(folder), _bytes(folder))
    for name, source, to, kind in EXPORTS:
        if not fnmatch(name, only) or (source is not None and source not in made):
            continue
        print(f"exporting {name}", file=sys.stderr)
        origin = model if source is None else str(made[source])
        path = work / (f"{name}.gguf" if to == "gguf" else name)
        try:
            export(origin, to, kind, path, OPTIONS)
        except InfoptError as error:
            print(f"  {error}", file=sys.stderr)
            continue
        yield Subject(name, to, path, str(path) if to == "gguf" else origin, _bytes(path), to == "gguf" or kind == "fp32")


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(part.stat().st_size for part in path.rglob("*") if part.is_file())


def expected(subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
    """The request, what its answer should be (`wanted`), and `rounded`: what else rounding activations makes of the text.

    That is with llama.cpp's rounding for GGUF files; for artifacts that round by themselves, after small changes.
    """
    bundle, rounds_activations = opened(subject)
    tokenizer, model = bundle.tokenizer, bundle.model
    tried = probe_texts(tokenizer)
    request = {
        "folder": str(subject.path),
        "dtype": "float32",
        "prompts": [tokenizer(text)["input_ids"] for text in PROMPTS],
        "new_tokens": NEW_TOKENS,
        "text": tokenizer(texts.read_text("bundled", "evaluation")[:4000], verbose=False)["input_ids"][:TEXT_TOKENS],
        "texts": tried,
    }
    answers: dict[str, Any] = {"wanted": interop_transformers.answer(model, request)}
    answers["wanted"]["encoded"] = [list(tokenizer(text, verbose=False)["input_ids"]) for text in tried]
    if subject.format == "gguf":
        with interop_rounding.llama_inputs(model, subject.path):
            answers["rounded"] = [interop_transformers.answer(model, {**request, "prompts": []})]
    elif rounds_activations:
        answers["rounded"] = list(jittered(model, request))
    del bundle, model
    gc.collect()
    return request, answers


def jittered(model: Any, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Answers about the text when the embeddings differ by `JITTER` of themselves."""
    weight = model.get_input_embeddings().weight
    kept = weight.data.clone()
    for seed in range(JITTERS):
        noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed))
        weight.data.copy_(kept * (1 + JITTER * noise))
        yield interop_transformers.answer(model, {**request, "prompts": []})
    weight.data.copy_(kept)


def opened(subject: Subject) -> tuple[Bundle, bool]:
    """What a subject should compute: its dense weights, or the artifact itself where these are not all of it; which of them."""
    try:
        source = open_source(subject.reference, OPTIONS, lambda line: None)
    except InfoptError:
        if subject.format != "folder":
            raise
    else:
        if subject.format != "folder" or not source.rounds_activations:
            return source.bundle, False
        source.close()
    stock = pipeline.in_stock(
        recipe.load(str(subject.path / "recipe.yaml"), techniques.find)
    )  # which rounds what the format says
    return pipeline.reopen(subject.path, stock.engine, "cpu", OPTIONS), True


def ask(reader: Reader, request: dict[str, Any], work: Path) -> dict[str, Any]:
    """The reader's answer; `error` when it cannot give one."""
    question, answer = work / "request.json", work / "answer.json"
    question.write_text(json.dumps(request), encoding="utf-8")
    answer.unlink(missing_ok=True)
    command = [str(reader.python or sys.executable), str(HERE / reader.script), str(question), str(answer)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=work, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {TIMEOUT_S} s"}
    if not answer.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {"error": f"exit code {done.returncode}: {lines[-1][:300] if lines else 'no message'}"}
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def judge(
    subject: Subject, reader: Reader, found: dict[str, Any], wanted: dict[str, Any], rounded: Sequence[dict[str, Any]] = ()
) -> Row:
    """One line of the table. `rounded`: the expected answer with activations rounded as the reader does, or otherwise."""
    row = Row(
        subject.name, subject.format, reader.name, found.get("versions", {}), layers=found.get("layers"), dtype=found.get("dtype")
    )
    if "error" in found:
        row.reason = found["error"]
        return row
    pairs = list(zip(found["text_logprobs"], wanted["text_logprobs"], strict=True))
    gaps = [abs(a - b) for a, b in pairs]
    other = [[b - a for a, b in zip(each["text_logprobs"], wanted["text_logprobs"], strict=True)] for each in rounded]
    floor = max((sum(map(abs, each)) / len(each) for each in other), default=0.0)
    row.rounding_perplexity_off = max((abs(math.exp(sum(each) / len(each)) - 1) for each in other), default=None)
    row.loads = True
    row.prompts = len(wanted["outputs"])
    row.max_abs_logprob_difference, row.mean_abs_logprob_difference = max(gaps), sum(gaps) / len(gaps)
    parted = [_parting(a["tokens"], b) for a, b in zip(found["outputs"], wanted["outputs"], strict=True)]
    row.equal_prompts = sum(margin is None for margin in parted)
    # Both of the two likeliest tokens may move, in opposite directions.
    are_ties = all(margin is None or margin <= 2 * max(gaps) for margin in parted)
    is_rounding = row.mean_abs_logprob_difference <= ROUNDING * floor
    if row.equal_prompts == row.prompts:
        row.verdict = "equal"
    else:
        row.verdict = "ties" if are_ties else "rounding" if is_rounding else "DIFFERENT"
    row.rounding_mean_abs_logprob_difference = floor if rounded else None
    row.perplexity_ratio = math.exp(sum(b - a for a, b in pairs) / len(pairs))
    if not subject.is_same:
        row.verdict = "requantized"
        row.reason = f"the text's perplexity is {row.perplexity_ratio - 1:+.1%} off the unquantized model's"
    elif abs(row.perplexity_ratio - 1) > max(PERPLEXITY_OFF, ROUNDING * (row.rounding_perplexity_off or 0)):
        row.verdict = "DIFFERENT"
        row.reason = f"the text's perplexity is {row.perplexity_ratio - 1:+.1%} off"
    elif row.verdict == "DIFFERENT":
        row.reason = f"a token differs where the expected one was {max(m for m in parted if m is not None):.3g} nats ahead"
    if "encoded" in found:
        row.texts = len(wanted["encoded"])
        row.texts_encoded_alike = sum(a == b for a, b in zip(found["encoded"], wanted["encoded"], strict=True))
    return row


def _parting(tokens: list[int], wanted: dict[str, Any]) -> float | None:
    """How far ahead the expected token was where the answers part; None when they do not."""
    for token, expected_token, margin in zip(tokens, wanted["tokens"], wanted["margins"], strict=True):
        if token != expected_token:
            return float(margin)
    return None


def markdown(rows: list[Row], model: str) -> str:
    """The table for people."""
    head = (
        "| what | format | reader | version | reads | prompts equal | mean, max Δ log p | texts encoded alike | reason if not |"
    )
    lines = [
        f"# What reads what: `{model}`",
        "",
        f"infopt {__version__}, {datetime.now(UTC).date()}, {platform.machine()}. {NEW_TOKENS} greedy tokens for each of "
        f"{len(PROMPTS)} prompts, and the log-probabilities of {TEXT_TOKENS} tokens of text in nats, against the dense float32 "
        "weights in transformers. `ties`: another token only where the two likeliest were nearer than the log-probabilities "
        "differ anyway. `rounding`: as far from them as llama.cpp's rounding of activations moves the same weights. ONNX int8 "
        "and int4 are held against the unquantized model: their builder quantizes them, and the engine rounds activations.",
        "",
        head,
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        version = ", ".join(f"{name} {number}" for name, number in list(row.versions.items())[:1])
        version += f", {row.dtype}" if row.dtype not in (None, "float32") else ""
        prompts = "–" if row.prompts is None else f"{row.equal_prompts} of {row.prompts}"
        gaps = (row.mean_abs_logprob_difference, row.max_abs_logprob_difference)
        gap = "–" if row.max_abs_logprob_difference is None else ", ".join(f"{found:.2g}" for found in gaps)
        alike = "–" if row.texts is None else f"{row.texts_encoded_alike} of {row.texts}"
        reason = (row.reason or "").replace("|", "\\|")
        cells = (row.subject, row.format, row.reader, version, row.verdict, prompts, gap, alike, reason)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", default="*", help="glob over recipes' and exports' names")
    parser.add_argument("--readers", default="", help="their names, separated by semicolons; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "interop")
    parser.add_argument("--vllm", type=Path, help="the Python that has vLLM; that of `infopt env install vllm` by default")
    arguments = parser.parse_args()
    chosen = [
        reader for reader in readers(arguments.vllm) if not arguments.readers or reader.name in arguments.readers.split(";")
    ]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for subject in subjects(arguments.model, arguments.only, Path(scratch)):
            fitting = [reader for reader in chosen if subject.format in reader.formats]
            if not fitting:
                continue
            try:
                request, answers = expected(subject)
            except InfoptError as error:  # nothing plain to hold it against
                rows += [
                    Row(subject.name, subject.format, reader.name, verdict="not compared", reason=str(error))
                    for reader in fitting
                ]
                write(rows, arguments.model, arguments.out)
                continue
            for reader in fitting:
                if reader.python is not None and not reader.python.exists():
                    row = Row(subject.name, subject.format, reader.name, verdict="not installed", reason=f"no {reader.name} here")
                else:
                    rounds = subject.format == "folder" or reader.name == "llama.cpp"  # transformers opens GGUF to dense weights
                    rounded = answers.get("rounded", ()) if rounds else ()
                    row = judge(subject, reader, ask(reader, request, Path(scratch)), answers["wanted"], rounded)
                rows.append(row)
                print(f"{row.subject} in {row.reader}: {row.verdict} {row.reason or ''}", file=sys.stderr)
                write(rows, arguments.model, arguments.out)  # after each: a run that is stopped leaves what it found


def write(rows: list[Row], model: str, out: Path) -> None:
    """The table, with the rows that an earlier run over the same model left and this one did not make again."""
    out.mkdir(parents=True, exist_ok=True)
    earlier = json.loads((out / "interop.json").read_text()) if (out / "interop.json").is_file() else {}
    again = {(row.subject, row.reader) for row in rows}
    if earlier.get("model") == model:
        rows = [row for old in earlier["rows"] if ((row := Row(**old)).subject, row.reader) not in again] + rows
    order = [*RECIPES, *(name for name, *_ in EXPORTS)]
    rows.sort(key=lambda row: (order.index(row.subject) if row.subject in order else len(order), row.reader))
    document = {"schema_version": 1, "model": model, "infopt": __version__, "rows": [asdict(row) for row in rows]}
    (out / "interop.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (out / "interop.md").write_text(markdown(rows, model), encoding="utf-8")


if __name__ == "__main__":
    main()
