"""The model to export, opened as plain float32 matrices, with the grids that packed weights lie on."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infopt import __version__, artifact, leakage, pipeline
from infopt.data import texts
from infopt.errors import InputError
from infopt.export.record import Export
from infopt.model import atomic, load, reference
from infopt.model.plan import LoadPlan
from infopt.model.quiet import quiet
from infopt.protocols import Progress
from infopt.result import read_record
from infopt.settings import LoadOptions

if TYPE_CHECKING:
    from infopt.artifact import Artifact
    from infopt.model.bundle import Bundle
    from infopt.model.reference import ModelReference

REPORT = "json"
"""Ending of the report of an export that is a single file."""
#: Longer than the probe of an artifact: what is compared here is another library's arithmetic.
TOKENS = 4 * pipeline.PROBE_TOKENS
#: Texts that a tokenizer must encode alike: numbers, spaces, line ends, scripts, contractions, joined emoji.
TRICKY = (
    "Hello, world  12\n\n3 'tis naïve I'LL we've 1234567 3.14\t\ttab",
    "中文 тест हिन्दी 🦙🧑‍🚀 é é ½\r\n end ",
    "def f(x):\n    return x**2  # ok\n\n\n<|im_start|>user\n",
    " leading and trailing ",
)


@dataclass
class Source:
    """`bundle`'s linear layers are all plain float32. `scales`: parameter name → float32 [out, groups], where packed."""

    text: str
    reference: ModelReference
    description: str
    _bundle: Bundle | None
    scales: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    saved: Artifact | None = None
    """What is known of an artifact."""
    was_quantized: bool = False
    """The files say how they are quantized, so they are not what `bundle` has."""
    is_rounded: bool = False
    """The weights lie on a grid already."""
    rounds_activations: bool = False
    """The artifact rounds what enters its layers too, which `bundle` does not."""

    @property
    def bundle(self) -> Bundle:
        assert self._bundle is not None, "the source was closed"
        return self._bundle

    def close(self) -> None:
        """Lets go of the model, so that the export has room to be opened."""
        self._bundle = None

    def provenance(self) -> dict[str, Any]:
        """The fields of `Export` that say where it comes from."""
        return {
            "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "infopt_version": __version__,
            "source": self.text,
            "source_description": self.description,
            "source_hash": reference.fingerprint(self.reference),
            "calibration_hash": self._calibration()[0],
        }

    def copy_fingerprint(self, target: Path) -> None:
        """The fingerprint of the text that the source was calibrated on, to the file `target`, where there is one."""
        digest, known = self._calibration()
        if digest is not None and known.is_file():
            with atomic.writing(target):
                shutil.copyfile(known, target)

    def _calibration(self) -> tuple[str | None, Path]:
        """The hash of what an artifact, or an export of one, was calibrated on, and where its fingerprint lies."""
        path = Path(self.text).expanduser()
        if self.saved is not None:
            return self.saved.calibration_hash, path / leakage.FILE
        record = beside(path, REPORT)
        is_export = path.is_file() and record.is_file()
        return read_record(record, Export).calibration_hash if is_export else None, beside(path, leakage.FILE)


def beside(path: Path, name: str) -> Path:
    """Where what belongs to a file lies: `model.gguf.json`."""
    return path.with_name(f"{path.name}.{name}")


def open_source(model: str, options: LoadOptions, progress: Progress) -> Source:
    """A reference or an artifact. Raises InputError for what has no plain weights to export."""
    ref = pipeline.resolve(model, options)
    description, saved = load.describe(ref), None
    if ref.kind == "artifact":
        saved = artifact.read_artifact(Path(model))
        at_load = [saved.steps[index].name for index in saved.at_load]
        if at_load:
            raise InputError(
                f"{model}: {at_load[0]} runs when infopt opens it, and no file holds its result",
                hint=f"export its reference: infopt export {saved.reference} …",
            )
        description = f"{saved.reference_description}, optimized by {saved.recipe['name']}"
    plan = LoadPlan(dtype="float32", device="cpu", trust_remote_code=options.trust_remote_code)
    source = Source(model, ref, description, load.load(ref, plan, progress), saved=saved)
    _make_plain(source)
    return source


def unrounded(source: Source, options: LoadOptions, progress: Progress) -> Source:
    """For a builder that rounds by itself: the reference of an artifact whose weights are rounded already.

    It is `source` itself where nothing is rounded, or the reference is not found as it was. The notes say which.
    """
    saved = source.saved
    if not source.is_rounded:
        return source
    with suppress(InputError):
        options = replace(options, revision=saved.revision if saved else None)
        if saved and reference.fingerprint(pipeline.resolve(saved.reference, options)) == saved.reference_hash:
            source.close()
            found = open_source(saved.reference, options, progress)
            found.notes.append(f"{source.text} is rounded already: this starts from its reference, {saved.reference}, instead")
            return found
    source.notes.append("quantized a second time: the source's weights are rounded already, and its reference is not here")
    return source


def _make_plain(source: Source) -> None:
    """Replaces packed layers by float32 ones. Raises InputError for layers that cannot be."""
    import torch

    from infopt.layers import packing

    model: Any = source.bundle.model
    if getattr(model, "peft_config", None):
        raise InputError(f"{source.text}: its adapters lie beside its weights", hint="qlora with keep: merged")
    if _drop_cache_scales(model):
        source.notes.append("the source's scales of keys and values are left out: the format has no place for them")
    schemes = {name: getattr(module, "quantization_scheme", None) for name, module in model.named_modules()}
    packed = {name: scheme for name, scheme in schemes.items() if scheme is not None and scheme.weights is not None}
    source.was_quantized = getattr(model, "hf_quantizer", None) is not None
    source.is_rounded = bool(packed) or _odd(model) is not None
    if packed:
        scales = {f"{name}.weight": _scale(model.get_submodule(name)) for name in packed}
        source.scales = {name: scale for name, scale in scales.items() if scale is not None}
        packing.open_packed(model, _plain_layer)
        source.notes.append(f"{len(packed)} layers of the source are packed: they were dequantized first")
        source.rounds_activations = any(scheme.input_activations is not None for scheme in packed.values())
        if source.rounds_activations:
            source.notes.append("the artifact rounds activations too; the export does not")
    elif source.is_rounded:
        source.rounds_activations = bool(getattr(getattr(model.config, "quantization_config", None), "load_in_8bit", False))
        with suppress(AttributeError, ValueError, NotImplementedError), quiet():  # what stays odd is refused below
            model.dequantize()
        source.notes.append("quantized layers of the source were dequantized first")
    if found := _odd(model):
        raise InputError(f"{source.text}: {found} has no plain weight to export", hint="export the reference instead")
    for owner, name in ((model, "hf_quantizer"), (model, "_weight_conversions"), (model.config, "quantization_config")):
        vars(owner).pop(name, None)  # `save` would write the weights the way they were read
    model.to(torch.float32).requires_grad_(False)


def _drop_cache_scales(model: Any) -> bool:
    """Takes the KV scales out of a model, and leaves its keys and values alone. Returns whether there were any."""
    from infopt.layers.kv_ranges import leave_cache_alone

    found = leave_cache_alone(model)
    for module in model.modules() if found else ():
        for name in ("k_scale", "v_scale"):
            module._parameters.pop(name, None)
    return found


def _odd(model: Any) -> str | None:
    """The first linear layer or parameter that does not hold plain numbers."""
    from torch import nn

    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and type(module) is not nn.Linear)
    parameters = (name for name, parameter in model.named_parameters() if not parameter.is_floating_point())
    return next(chain(layers, parameters), None)


def _plain_layer(module: Any) -> Any:
    """A packed layer's weights alone: what it does to its inputs is left out."""
    import torch
    from torch import nn

    from infopt.layers import packing

    found = packing.unpacked(module, torch.float32)
    if type(found) is nn.Linear:
        return found
    plain = nn.Linear(found.in_features, found.out_features, bias=found.bias is not None, device="meta")
    plain.weight, plain.bias = found.weight, found.bias
    return plain


def _scale(module: Any) -> NDArray[np.float32] | None:
    """float32 [out, groups] of a layer packed with integers in order of their inputs; None for other formats."""
    weights = module.quantization_scheme.weights
    scale = getattr(module, "weight_scale", None)
    if weights is None or scale is None or str(getattr(weights.type, "value", weights.type)) != "int":
        return None
    if getattr(module, "weight_g_idx", None) is not None or scale.dim() != 2:
        return None
    found: NDArray[np.float32] = scale.detach().float().cpu().numpy()
    return found


def probe_texts(tokenizer: Any) -> list[str]:
    """What a tokenizer is tried on: `TRICKY`, English prose, and a chat where there is a template."""
    found = [*TRICKY, texts.read_text("bundled", "evaluation")[:4000]]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Hi! What is 12+34?"}]
        found.append(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return found
