"""`infopt inspect`: what a model is made of, and the fastest that this machine could run it."""

from __future__ import annotations

from typing import Any

from infopt import host, pipeline, units
from infopt.measure import roofline
from infopt.model import shapes
from infopt.protocols import Machine, Shapes
from infopt.settings import LoadOptions

#: Stored bits per weight: int8 with one bfloat16 scale a row is 8.0-and-a-bit; int4 in groups of 64 with a 16-bit scale 4.25.
WIDTHS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "int4 group 64": 4.25}
BATCHES = (1, 8, 64)


def inspect(model: str, options: LoadOptions, context: int) -> dict[str, Any]:
    """Shapes, sizes and limits as one JSON-able document. Raises InputError."""
    ref = pipeline.resolve(model, options)
    found = shapes.shapes(ref)
    device = host.device_name(options.device)
    machine = host.measured(device, host.set_threads(options.threads))
    kv = found.kv_bytes_per_token(2)
    return {
        "schema_version": 1,
        "model": model,
        "architecture": found.architecture,
        "layers": found.layers,
        "hidden": found.hidden,
        "heads": found.heads,
        "kv_heads": found.kv_heads,
        "head_dim": found.head_dim,
        "vocabulary": found.vocabulary,
        "context": found.context,
        "is_head_tied": found.is_head_tied,
        "parameters": found.parameters,
        "linear_parameters": found.linear_parameters,
        "head_parameters": found.head_parameters,
        "embedding_parameters": found.embedding,
        "stored_bytes": shapes.stored_bytes(ref),
        "bytes": {name: round(_stored(found, bits)) for name, bits in WIDTHS.items()},
        "kv_bytes_per_token_16bit": kv,
        "kv_bytes_at_context": kv * context,
        "group_sizes": group_sizes(found),
        "machine": {
            "device": machine.device,
            "read_bytes_per_s": machine.read_bytes_per_s,
            "flops": machine.flops,
            "last_level_cache_bytes": machine.last_level_cache_bytes,
        },
        "limit_context": context,
        "decode_limit_tok_per_s": {
            name: {str(batch): _limit(found, machine, bits, batch, context) for batch in BATCHES} for name, bits in WIDTHS.items()
        },
    }


def group_sizes(found: Shapes) -> list[int]:
    """The usual quantization group sizes that divide the input of every linear."""
    return [size for size in (32, 64, 128, 256) if all(inner % size == 0 for _, inner in found.linear.values())]


def _stored(found: Shapes, bits: float) -> float:
    """Linears at `bits`; embedding, head and norms stay at 16 bits below that width."""
    rest = found.embedding + found.other + (0 if found.is_head_tied else found.head_parameters)
    return found.linear_parameters * bits / 8 + rest * max(bits, 16.0 if bits < 16 else bits) / 8


def _limit(found: Shapes, machine: Machine, bits: float, batch: int, context: int) -> float | None:
    touched = roofline.touched_weight_bytes(found, round(_stored(found, bits)), max(bits, 16) / 8)
    dtype = "float32" if bits == 32 else "bfloat16"
    element = 4 if bits == 32 else 2
    limit = roofline.decode_limit(
        found, machine, weights_bytes=touched, kv_element_bytes=element, batch=batch, context=context, dtype=dtype
    )
    return None if limit.seconds is None else batch / limit.seconds


def lines(found: dict[str, Any]) -> list[str]:
    """The document for people."""
    machine = found["machine"]
    tied = "tied to the embedding" if found["is_head_tied"] else "separate"
    shape = f"{found['layers']} layers, hidden {found['hidden']}, {found['heads']} heads / {found['kv_heads']} KV heads"
    text = [
        f"{found['model']}: {found['architecture']}, {found['parameters'] / 1e6:.1f} M parameters",
        f"  {shape} of {found['head_dim']}, context {found['context']}",
        f"  vocabulary {found['vocabulary']}, head {tied}",
        f"  stored {units.size(found['stored_bytes'])}; as "
        + ", ".join(f"{k} {units.size(v)}" for k, v in found["bytes"].items()),
        f"  KV cache {units.size(found['kv_bytes_per_token_16bit'])} per token at 16 bits, "
        f"{units.size(found['kv_bytes_at_context'])} at {found['limit_context']} tokens",
        f"  group sizes that divide every linear: {', '.join(map(str, found['group_sizes'])) or 'none'}",
        "",
        f"this machine ({machine['device']}), measured: read {units.size(machine['read_bytes_per_s'])}/s, "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in machine["flops"].items()),
        f"decode limit in tok/s at {found['limit_context']} tokens of context:",
        "  " + f"{'weights':<16}" + "".join(f"{'batch ' + str(batch):>12}" for batch in BATCHES),
    ]
    for name, by_batch in found["decode_limit_tok_per_s"].items():
        text.append("  " + f"{name:<16}" + "".join(f"{units.significant(rate):>12}" for rate in by_batch.values()))
    return text
