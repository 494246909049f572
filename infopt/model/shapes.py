"""A model's shapes from its config alone: built on torch's meta device, so no weight is read or allocated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.errors import InfoptError, InputError, first_line
from infopt.model import checkpoint, gguf_config, gguf_file, hub
from infopt.model.quiet import quiet
from infopt.model.reference import ModelReference, config_path, local_path
from infopt.protocols import Shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_HINT = "allowed: decoder-only text models this transformers knows; a model's own code runs only with --trust-remote-code"
_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def shapes(reference: ModelReference) -> Shapes:
    """The shapes of any reference; a hub model costs the download of its config.

    The experts of a mixture are stored as one stacked parameter, not as `nn.Linear`: they count under `other`.
    Raises InputError when the config is not that of a causal language model with attention.
    """
    config = read_config(reference)
    text = config.get_text_config()
    lacking = [name for name in _NEEDED if getattr(text, name, None) is None]
    if lacking:
        raise InputError(
            f"{reference.text}: model type {config.model_type!r} has no {lacking[0]}, which infopt is not tested with",
            hint=_HINT,
        )
    model = _on_meta(config, reference)
    return _measure(model, text)


def opened(model: PreTrainedModel) -> Shapes:
    """The shapes of a model that is open, and not packed."""
    return _measure(model, model.config.get_text_config())


def read_config(reference: ModelReference) -> PreTrainedConfig:
    """The config as transformers reads it, without its `quantization_config`. Raises InputError."""
    from transformers import AutoConfig

    auto: Any = AutoConfig
    path = config_path(reference)
    try:
        with quiet():
            if path.is_file():
                with gguf_file.shared_reader(path) as reader:
                    config: PreTrainedConfig = gguf_config.read(path, reader)
            else:
                config = auto.from_pretrained(path, trust_remote_code=reference.trust_remote_code)
    except InfoptError:
        raise
    except Exception as error:  # OSError, ValueError, huggingface_hub's own for a field of the wrong type, …
        raise InputError(f"{reference.text}: its config does not read: {first_line(error)}", hint=_HINT) from None
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _on_meta(config: PreTrainedConfig, reference: ModelReference) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=reference.trust_remote_code)
    except Exception as error:  # whatever the model's own code makes of sizes that do not go together
        message = f"{reference.text}: {config.model_type!r} does not open as a causal language model: {first_line(error)}"
        raise InputError(message, hint=_HINT) from None
    return model


def _measure(model: Any, text: Any) -> Shapes:
    from torch import nn

    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}
    linear = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    is_tied = head is not None and (head.weight is embedding or bool(getattr(text, "tie_word_embeddings", False)))
    head_shape = None if head is None else (head.weight.shape[0], head.weight.shape[1])
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    counted = {id(embedding), *([id(head.weight)] if head is not None else [])}
    rest = sum(count for key, count in unique.items() if key not in counted)
    return Shapes(
        architecture=type(model).__name__,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None) or 0,
        linear=linear,
        head=head_shape,
        is_head_tied=is_tied,
        embedding=embedding.numel(),
        other=rest - sum(out * inner for out, inner in linear.values()),
        biased=tuple(dict.fromkeys(name.rpartition(".")[2] for name, layer in layers.items() if layer.bias is not None)),
    )


def stored_bytes(source: ModelReference | Path) -> int:
    """Bytes of the weights as stored, from headers. For a hub model that is not here yet: from its config's shapes and dtype.

    Raises InputError.
    """
    if isinstance(source, ModelReference):
        if source.kind == "hub":
            return _hub_bytes(source)
        source = local_path(source)
    if source.is_file():
        return gguf_file.tensor_bytes(gguf_file.open_reader(source))
    return checkpoint.tensor_bytes(source)


def _hub_bytes(reference: ModelReference) -> int:
    try:
        return checkpoint.tensor_bytes(hub.snapshot(reference.name, reference.revision, local_only=True))
    except InputError:
        import torch

        dtype = read_config(reference).dtype
        return shapes(reference).parameters * (dtype.itemsize if isinstance(dtype, torch.dtype) else 4)
