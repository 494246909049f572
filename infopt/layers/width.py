"""How wide a decoder's blocks are, as arithmetic: MLP channels, heads, hidden dimension; what may be kept of them. Torch-free."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace

from infopt.errors import RecipeError
from infopt.layers import passes
from infopt.protocols import Machine, Prediction, Shapes

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
#: What reads the hidden states, and what writes them.
READERS, WRITERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


@dataclass(frozen=True)
class Width:
    """`mlp` channels, `kv_heads` with `queries` heads of `head_dim` each, `hidden` dimensions; the same in every block."""

    mlp: int
    kv_heads: int
    hidden: int
    queries: int
    head_dim: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.queries

    def linear(self, part: str) -> tuple[int, int]:
        """(out, in) of a block's layer."""
        wide = self.heads * self.head_dim
        narrow = self.kv_heads * self.head_dim
        return {
            "q_proj": (wide, self.hidden), "k_proj": (narrow, self.hidden), "v_proj": (narrow, self.hidden),
            "o_proj": (self.hidden, wide), "gate_proj": (self.mlp, self.hidden), "up_proj": (self.mlp, self.hidden),
            "down_proj": (self.hidden, self.mlp),
        }[part]  # fmt: skip


def block_layers(shapes: Shapes) -> list[dict[str, str]]:
    """Of each decoder block its layers, last part → dotted name. The blocks are the list that holds most weights."""
    weights: Counter[str] = Counter()
    places: dict[str, dict[int, dict[str, str]]] = {}
    for name, (out, inner) in shapes.linear.items():
        found = re.match(r"(.+?)\.(\d+)\.", name)
        if found:
            weights[found[1]] += out * inner
            places.setdefault(found[1], {}).setdefault(int(found[2]), {})[name.rpartition(".")[2]] = name
    return [] if not weights else [layers for _, layers in sorted(places[weights.most_common(1)[0][0]].items())]


def of(shapes: Shapes, path: str) -> Width:
    """How wide the model is. Raises RecipeError for one whose blocks are not built of the seven layers that this is about."""
    blocks = block_layers(shapes)
    lacking = next(((i, p) for i, b in enumerate(blocks) for p in (*ATTENTION, *MLP) if p not in b), (0, ATTENTION[0]))
    if not blocks or lacking[1] not in blocks[lacking[0]]:
        reason = "; a mixture's experts are no linear layers" if blocks and lacking[1] in MLP else ""
        raise RecipeError(
            path,
            f"{shapes.architecture} has no {lacking[1]} in block {lacking[0]}{reason}; allowed: blocks of "
            f"{', '.join((*ATTENTION, *MLP))}",
            hint="drop_layers takes whole blocks out, whatever they are built of",
        )
    odd = next((name for block in blocks for part, name in block.items() if part not in (*ATTENTION, *MLP)), None)
    if odd is not None:
        raise RecipeError(path, f"{shapes.architecture} has {odd} beside {', '.join((*ATTENTION, *MLP))}, which alone are cut")
    if shapes.heads % shapes.kv_heads:
        raise RecipeError(
            path, f"{shapes.heads} heads do not divide into the groups of {shapes.kv_heads} KV heads, which are what is removed"
        )
    down = shapes.linear[blocks[0]["down_proj"]]
    width = Width(down[1], shapes.kv_heads, shapes.hidden, shapes.heads // shapes.kv_heads, shapes.head_dim)
    for block in blocks:
        for part, name in block.items():
            if shapes.linear[name] != width.linear(part):
                found, wanted = ("×".join(map(str, each)) for each in (shapes.linear[name], width.linear(part)))
                raise RecipeError(path, f"{name} is {found}; allowed: {wanted} in every block, as a config has one size for all")
    return width


def count(wanted: float | None, there: int, multiple: int, path: str) -> int:
    """How many of `there` stay: `wanted`, a number of them or (a float) a share, rounded down to the multiple.

    The multiple holds where `there` is one. Raises RecipeError for what is too much, or no multiple.
    """
    if wanted is None:
        return there
    step = multiple if there % multiple == 0 else 1
    if isinstance(wanted, float):
        kept = int(there * wanted) // step * step
        if not kept:
            hint = None if step == 1 else f"multiple: {math.gcd(int(there * wanted), there)}"
            raise RecipeError(
                path, f"found {wanted}, which leaves less than {step} of {there}; allowed: {step / there:.3g} … 1", hint=hint
            )
        return kept
    if wanted > there:
        raise RecipeError(path, f"found {wanted}; allowed: up to {there}, which is all there is")
    if wanted % step:
        low = wanted // step * step
        nearest = f"{low} or {low + step}" if low else str(step)
        message = f"found {wanted}, which is no multiple of {step} as {there} is; allowed: {nearest}"
        raise RecipeError(path, message, hint=f"multiple: {math.gcd(wanted, there)}")
    return wanted


def check_hidden(shapes: Shapes, path: str) -> None:
    """Refuses to take hidden dimensions out where more depends on their number than sizes. Raises RecipeError."""
    if shapes.architecture.startswith("Gemma"):
        raise RecipeError(
            path,
            f"{shapes.architecture} scales its embeddings by the root of the hidden size, so its dimensions are not taken out; "
            "allowed: null",
        )
    inside = {name for block in block_layers(shapes) for name in block.values()}
    beside = next((name for name in shapes.linear if name not in inside), None)
    if beside is not None:
        raise RecipeError(path, f"{beside} lies beside the decoder blocks, and is not cut; allowed: null")


def check_config(shapes: Shapes, before: Width, after: Width, multiple: int, path: str) -> None:
    """Refuses sizes that the config's own class does: Llama's asks that heads divide the hidden size, whatever their own.

    Raises RecipeError naming those that go.
    """
    if after == before or after.hidden % after.heads == 0:
        return
    reason = _refusal(shapes, after)
    if reason is None:
        return
    heads = [count for count in range(1, before.kv_heads + 1) if after.hidden % (count * after.queries) == 0]
    if after.hidden == before.hidden:
        allowed = ", ".join(map(str, heads))
        raise RecipeError(f"{path}.kv_heads", f"found {after.kv_heads}: {reason}; allowed: {allowed}")
    step = math.lcm(after.heads, multiple if before.hidden % multiple == 0 else 1)
    nearest = sorted(range(step, before.hidden + 1, step), key=lambda size: abs(size - after.hidden))[:2]
    allowed = " or ".join(map(str, sorted(nearest))) or "null"
    hint = f"kv_heads: {max(heads)}" if heads else None
    raise RecipeError(f"{path}.hidden", f"found {after.hidden}: {reason}; allowed: {allowed}", hint=hint)


def _refusal(shapes: Shapes, width: Width) -> str | None:
    """Why transformers would not open a model of this `width`, if its config's class says so."""
    import transformers

    kind = getattr(getattr(transformers, shapes.architecture, None), "config_class", None)
    if kind is None:
        return None
    sizes = {
        "hidden_size": width.hidden, "num_attention_heads": width.heads, "num_key_value_heads": width.kv_heads,
        "head_dim": width.head_dim,
    }  # fmt: skip
    try:
        kind(**sizes)
    except Exception:  # huggingface_hub's own, around whatever the class raises
        return f"{kind.__name__} asks that the heads, {width.heads}, divide the hidden size"
    return None


def reshape(shapes: Shapes, width: Width) -> Shapes:
    """Shapes of a model that is cut to `width`. Where hidden dimensions go, its norms are two a block and one at the end."""
    linear, other = dict(shapes.linear), shapes.other
    for block in block_layers(shapes):
        for part, name in block.items():
            linear[name] = width.linear(part)
            if part in shapes.biased:
                other += linear[name][0] - shapes.linear[name][0]
    other -= (2 * shapes.layers + 1) * (shapes.hidden - width.hidden)
    return replace(
        shapes,
        hidden=width.hidden,
        heads=width.heads,
        kv_heads=width.kv_heads,
        head_dim=width.head_dim,
        linear=linear,
        head=(shapes.head[0], width.hidden) if shapes.head else None,
        embedding=shapes.embedding // shapes.hidden * width.hidden,
        other=other,
    )


def predict(
    shapes: Shapes, before: Width, after: Width, loaded: Prediction, tokens: int, machine: Machine, *, compensate: bool
) -> Prediction:
    """What cutting a model of `before` to `after` costs on `tokens` of calibration text.

    Where a layer's columns go, its inputs' second moments are summed up and, to refit the others, factored in float64.
    """
    element, blocks = loaded.weights_bytes / shapes.parameters, len(block_layers(shapes))
    stored = reshape(shapes, after).parameters * element
    pairs = [(before.mlp, after.mlp), (before.heads * before.head_dim, after.heads * after.head_dim)]
    flops, largest = 0.0, 0
    for there, kept in ((there, kept) for there, kept in pairs if kept < there):
        flops += _flops(tokens, there, kept, before.hidden, compensate)
        largest = max(largest, there)
    runs, held = (1.0 if flops else 0.0), 0.0
    if after.hidden < before.hidden:
        runs += 4.0
        rows = sum(before.linear(part)[0] for part in READERS)
        flops += 2 * _flops(tokens, before.hidden, after.hidden, rows / 2, compensate)
        held = blocks * rows * after.hidden * element if compensate else 0.0
        held += 0 if shapes.is_head_tied or not compensate else 12 * shapes.head_parameters
        largest = max(largest, before.hidden)
    rate, read = machine.flops.get("float32"), machine.read_bytes_per_s
    peak = loaded.weights_bytes + held + 28 * largest**2
    step = Prediction(
        weights_bytes=round(stored),
        peak_bytes=max(loaded.peak_bytes, round(peak)),
        seconds=blocks * flops / rate + loaded.weights_bytes / read if rate and read else None,
    )
    return passes.add(step, loaded, shapes, tokens, machine, passes=runs, hessians=False)


def _flops(tokens: int, there: int, kept: int, rows: float, compensate: bool) -> float:
    moments = 2 * tokens * there**2 * passes.HALF
    # In float64, which runs at half the rate, so everything counts twice.
    solved = 2 * (kept**3 / 3 + 2 * rows * kept**2) + 2 * rows * there * kept
    return moments + (solved if compensate else 0)
