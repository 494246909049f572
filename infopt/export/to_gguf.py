"""`infopt export --to gguf`: every tensor in llama.cpp's layout and storage types, read back and compared before it counts."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infopt import __version__, host, leakage
from infopt.errors import InputError, LoadBackError, first_line
from infopt.export import compare, gguf_model, gguf_vocabulary, storage
from infopt.export.gguf_model import Tensor
from infopt.export.record import Export, LoadBackCheck
from infopt.export.source import REPORT, TOKENS, Source, beside, open_source, probe_texts
from infopt.model import atomic, gguf_file, load, reference, save
from infopt.model.bundle import Bundle
from infopt.model.quiet import quiet
from infopt.optimize import probe, probe_ids
from infopt.protocols import Progress
from infopt.result import dump
from infopt.settings import LoadOptions

if TYPE_CHECKING:
    import torch

    Ids = Mapping[str, Sequence[int]]

#: The same weights through the same modules: what remains is where tensors lie in memory, which picks the kernel.
TOLERANCE = 1e-4
READER = "infopt, over transformers' GGUF reader"
#: Storage type → the file type that it makes most of the file (`LlamaFileType`).
FILE_TYPES = {
    "F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1", "Q5_K": "MOSTLY_Q5_K_S", "Q6_K": "MOSTLY_Q6_K",
}  # fmt: skip
_METADATA_BYTES = 32_000_000
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: the layout of ggml's blocks


def export(model: str, out: Path, kind: str, options: LoadOptions, progress: Progress = lambda line: None) -> Export:
    """Writes `model` (a reference or an artifact) to the file `out`, its matrices in storage type `kind`.

    Raises InputError when `out` exists, the type is unknown or the model has no place in GGUF, LoadBackError when the
    file does not read back as the same model with the same tokenizer, DiskFullError.
    """
    asked = storage.check(kind)
    require_free(out)
    source = open_source(model, options, progress)
    writer = _Writer(source, asked)
    ids = probe_ids(source.bundle, min(TOKENS, writer.context))
    before = probe(source.bundle, ids)
    with atomic.new_file(out, writer.bytes + _METADATA_BYTES) as path:
        writer.write(path, progress)
        expected = probe(source.bundle, ids)  # its weights are now those of the file
        texts = compare.encoded(source.bundle.tokenizer, probe_texts(source.bundle.tokenizer))
        template = source.bundle.tokenizer.chat_template
        source.close()
        gc.collect()
        progress("loading back")
        checks = (_check(path, expected, ids, texts, template), _check_plain(path, expected, ids, texts))
        made = Export(
            **source.provenance(),
            to="gguf",
            type=kind,
            path=str(out),
            stored={name: tuple(tensors) for name, tensors in writer.stored.items()},
            exact=writer.exact,
            bytes=path.stat().st_size,
            checks=checks,
            against_source=compare.against(before, expected, ids),
            notes=(*source.notes, *writer.notes(), *_remarks(checks[-1])),
            versions=host.versions() | {"gguf": version("gguf")},
        )
        source.copy_fingerprint(beside(out, leakage.FILE))
        save.write_text(beside(out, REPORT), dump(made))
    return made


def require_free(out: Path) -> None:
    """Raises InputError when `out` cannot be a new file with a report beside it."""
    for path in (out, beside(out, REPORT)):
        if path.exists():
            raise InputError(f"{path}: exists", hint="choose another name with -o, or remove it")
    if out.suffix.lower() != ".gguf":
        raise InputError(f"{out}: a GGUF file's name ends in .gguf", hint=f"-o {out}.gguf")


def _check(path: Path, expected: torch.Tensor, ids: torch.Tensor, texts: Ids, template: object) -> LoadBackCheck:
    """Raises LoadBackError unless the file is the model, with the tokenizer, that was to be written."""
    read = load.load(reference.parse(str(path)))
    compare.same_tokens(texts, lambda text: compare.encoded(read.tokenizer, [text])[text], READER)
    if isinstance(template, str) and read.tokenizer.chat_template != template:
        raise LoadBackError("the export's chat template is not the source's; nothing was written")
    figures, count = compare.figures(expected, probe(read, ids)), len(texts)
    return compare.require(LoadBackCheck(**figures, reader=READER, tolerance=TOLERANCE, texts=count, texts_tried=count))


def _check_plain(path: Path, expected: torch.Tensor, ids: torch.Tensor, texts: Ids) -> LoadBackCheck:
    """What transformers makes of the file by itself is told, not judged: it leaves out the rotary scaling of some
    architectures and some ways to split text, whatever the file says."""
    common: dict[str, Any] = {"reader": f"plain transformers {version('transformers')}", "texts_tried": len(texts)}
    try:
        read = _plain(path)
        figures = compare.figures(expected, probe(read, ids))
        odd = compare.parting(texts, lambda text: compare.encoded(read.tokenizer, [text])[text])
    except Exception as error:  # its reader raises whatever it runs into
        common |= dict.fromkeys(("max_abs_logit_difference", "top1_agreement"))
        return LoadBackCheck(**common, refusal=first_line(error), tokens=ids.numel(), texts=0)
    return LoadBackCheck(**common, **figures, texts=len(texts) - len(odd))


def _plain(path: Path) -> Bundle:
    """As users of transformers open a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with gguf_file.shared_reader(path), quiet():
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        return Bundle(model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), path.name)


def _remarks(plain: LoadBackCheck) -> Iterator[str]:
    """What a user of another reader should know."""
    if plain.texts < plain.texts_tried and plain.refusal is None:
        odd = plain.texts_tried - plain.texts
        yield f"transformers' own GGUF reader encodes {odd} of {plain.texts_tried} texts differently; the source's tokenizer fits"
    if plain.max_abs_logit_difference is not None and not plain.max_abs_logit_difference <= TOLERANCE:
        yield "transformers' own GGUF reader makes another model of it: open it with infopt or llama.cpp"
    yield "not checked in llama.cpp: make interop does"


class _Writer:
    """Plans the file from shapes, then writes it tensor by tensor, so that only one is held twice.

    What is written replaces the source's own weights: afterwards the source is the model that the file should be.
    """

    def __init__(self, source: Source, asked: str) -> None:
        import gguf

        self.source, self.asked = source, asked
        self.model: Any = source.bundle.model
        self.config = self.model.config
        self.parameters = dict(self.model.named_parameters())
        self.keys = gguf_model.metadata(self.config)
        self.context = int(str(self.keys["context_length"]))
        self.tensors = list(gguf_model.tensors(self.model))
        self.kinds = {t.name: storage.choose(asked, self._shape(t), is_head=t.is_head) for t in self.tensors}
        self.vocabulary = gguf_vocabulary.metadata(source.bundle.tokenizer, self.config.vocab_size)
        self.stored: dict[str, list[str]] = defaultdict(list)
        self.exact = self.kept = 0
        self.sizes = {}
        for tensor in self.tensors:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kinds[tensor.name]]]
            self.sizes[tensor.name] = prod(self._shape(tensor)) // block * size
        self.bytes = sum(self.sizes.values())

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(self.parameters[tensor.parameter].shape)

    def write(self, path: Path, progress: Progress) -> None:
        import gguf

        factors = gguf_model.rope_factors(self.model)
        writer = gguf.GGUFWriter(path, gguf_model.find(self.config).name)
        try:
            self._write_keys(writer)
            if factors is not None:
                writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
            for tensor in self.tensors:
                kind = gguf.GGMLQuantizationType[self.kinds[tensor.name]]
                # A shape in elements: the library counts bytes only where it is told uint8.
                writer.add_tensor_info(tensor.name, self._shape(tensor), np.dtype(np.float32), self.sizes[tensor.name], kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            stream = writer.fout[0]
            for data in chain([] if factors is None else [factors], self._data(progress)):
                writer.write_padding(stream, stream.tell())
                stream.write(data.tobytes())
            writer.write_padding(stream, stream.tell())
        finally:
            writer.close()

    def _data(self, progress: Progress) -> Iterator[NDArray[Any]]:
        """Each tensor as stored; the model's own becomes what readers will see."""
        import torch

        for done, tensor in enumerate(self.tensors, 1):
            progress(f"{self.asked} {done}/{len(self.tensors)} {tensor.name}")
            parameter = self.parameters[tensor.parameter]
            weight = gguf_model.to_gguf(tensor.name, parameter.numpy(), self.config)
            scale = self.source.scales.get(tensor.parameter)
            if scale is not None:
                scale = gguf_model.to_gguf(tensor.name, scale, self.config)
            encoded = storage.encode(weight, self.kinds[tensor.name], scale)
            parameter.copy_(torch.from_numpy(gguf_model.from_gguf(tensor.name, encoded.dense, self.config)))
            self.stored[encoded.kind].append(tensor.name)
            self.exact += encoded.is_exact and weight.ndim > 1
            self.kept += encoded.keeps_grid
            yield encoded.data

    def notes(self) -> list[str]:
        """What became of a packed source's integers."""
        count = len(self.source.scales)
        if not count:
            return []
        rest = f", {count - self.kept} were rounded again" if self.kept < count else ""
        return [f"{self.kept} of {count} packed layers keep their integers, with scales in float16{rest}"]

    def _write_keys(self, writer: Any) -> None:
        import gguf

        name = gguf_model.find(self.config).name
        general = {
            # With the type: transformers takes a llama that is called just "mistral" for another architecture.
            "general.name": f"{self.source.description}, {self.asked}",
            "general.quantized_by": f"infopt {__version__}",
            "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[self.asked]]),
            "general.quantization_version": _QUANTIZATION_VERSION,
        }
        keys = {**general, **{f"{name}.{key}": value for key, value in self.keys.items()}, **self.vocabulary}
        for key, value in keys.items():
            match value:
                case bool():
                    writer.add_bool(key, value)
                case int():
                    writer.add_uint32(key, value)
                case float():
                    writer.add_float32(key, value)
                case str():
                    writer.add_string(key, value)
                case _:
                    writer.add_array(key, value)
