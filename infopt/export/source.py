"""The model to export, opened as plain float32 matrices, with the grids that packed weights lie on."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infopt import __version__, artifact, pipeline
from infopt.data import texts
from infopt.errors import InputError
from infopt.model import load, reference
from infopt.model.plan import LoadPlan
from infopt.model.quiet import quiet
from infopt.protocols import Progress
from infopt.settings import LoadOptions

if TYPE_CHECKING:
    import torch

    from infopt.model.bundle import Bundle
    from infopt.model.reference import ModelReference

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
    was_packed: bool = False
    """The files hold packed weights, not those that `bundle` has."""
    rounds_activations: bool = False
    """The artifact rounds the inputs of its layers too; `bundle` does not."""

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
        }


def open_source(model: str, options: LoadOptions, progress: Progress) -> Source:
    """A reference or an artifact. Raises InputError for what has no plain weights to export."""
    ref = pipeline.resolve(model, options)
    description = load.describe(ref)
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
    source = Source(model, ref, description, load.load(ref, plan, progress))
    _make_plain(source)
    return source


def _make_plain(source: Source) -> None:
    """Replaces packed layers by float32 ones. Raises InputError for layers that cannot be."""
    import torch

    from infopt.layers import packing

    model: Any = source.bundle.model
    if getattr(model, "peft_config", None):
        raise InputError(f"{source.text}: its adapters lie beside its weights", hint="qlora with keep: merged")
    modules = dict(model.named_modules())
    packed = [name for name, module in modules.items() if getattr(module, "quantization_scheme", None) is not None]
    source.was_packed = getattr(model, "hf_quantizer", None) is not None
    if packed:
        source.scales = {f"{name}.weight": scale for name in packed if (scale := _scale(modules[name])) is not None}
        inputs = (modules[name].quantization_scheme.input_activations for name in packed)
        source.rounds_activations = any(arguments is not None for arguments in inputs)
        packing.open_packed(model, _plain_layer)
        source.notes.append(f"{len(packed)} layers of the source are packed: they were dequantized first")
        if source.rounds_activations:
            source.notes.append("the artifact rounds activations too; the export does not")
    elif _odd(model):
        with suppress(AttributeError, ValueError, NotImplementedError), quiet():  # what stays odd is refused below
            model.dequantize()
        source.notes.append("quantized layers of the source were dequantized first")
    if found := _odd(model):
        raise InputError(f"{source.text}: {found} has no plain weight to export", hint="export the reference instead")
    model.to(torch.float32)


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


def probe_ids(tokenizer: Any) -> torch.Tensor:
    """[1, tokens] of the bundled evaluation text."""
    import torch

    ids = tokenizer(texts.read_text("bundled", "evaluation")[:4000], verbose=False)["input_ids"]
    return torch.tensor([ids[: 4 * pipeline.PROBE_TOKENS]])
