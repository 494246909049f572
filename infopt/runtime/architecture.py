"""Does a way of running a model compute what a class of models computes? Tried on a small random model of the same class."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from infopt.runtime.decoder import Unfit
from infopt.runtime.steps import Run

#: Largest difference of a logit, in shares of the logits' standard deviation, in float32.
TOLERANCE = 1e-4
TOKENS = 40
VOCABULARY = 96


def small_copy(model: Any) -> Any:
    """A random model of the same class and configuration but for its sizes; the generator of the process is left alone."""
    config = copy.deepcopy(model.config.get_text_config(decoder=True))
    group = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None)
    wanted = {
        "num_hidden_layers": 2, "num_key_value_heads": 2, "num_attention_heads": 2 * group,
        "hidden_size": 2 * group * head_dim, "intermediate_size": 112, "vocab_size": VOCABULARY,
    }  # fmt: skip
    if kinds:
        wanted["layer_types"] = sorted(set(kinds), reverse=True) if len(set(kinds)) == 2 else kinds[:2]
    if getattr(config, "sliding_window", None):
        wanted["sliding_window"] = TOKENS // 3
    for name, number in wanted.items():
        if hasattr(config, name):
            setattr(config, name, number)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if hasattr(config, name):
            setattr(config, name, None if name != "pad_token_id" else 0)
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = type(model)._from_config(config).float().eval()
        for parameter in made.parameters():
            noise = torch.randn_like(parameter)
            parameter.data += 0.1 * noise if parameter.dim() == 1 else 0.05 * noise
    return made


@torch.inference_mode()
def check(model: Any, make: Callable[[Any], Any]) -> None:
    """Raises Unfit where the logits of a step differ: of a prompt, token by token over what is cached, and after a cut.

    `make`: from a float32 model, which it consumes, to a step. Whatever else goes wrong keeps that way from being taken, too.
    """
    try:
        small = small_copy(model)
    except Exception as error:  # configurations check themselves, each in its own way
        raise Unfit(f"no small model of its class can be made to check it on: {error}") from None
    ids = [(7 * i * i + 3 * i) % VOCABULARY for i in range(TOKENS)]
    try:
        wanted = small(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        found = _found(make(small), ids).to(wanted.device)
    except Unfit:
        raise
    except Exception as error:
        raise Unfit(f"a small model of its class does not run: {type(error).__name__}: {error}") from None
    off = float((found - wanted).abs().max() / wanted.std())
    if not off < TOLERANCE:
        raise Unfit(f"its logits come out {off:.2g} of their spread off")


def _found(step: Any, ids: list[int]) -> torch.Tensor:
    """Logits after each of `ids`, of which the last three were read twice."""
    sequence, half, again = step.open(), len(ids) // 2, len(ids) - 3
    try:
        found = [_logits(step, sequence, ids[:half]), *(_logits(step, sequence, [token]) for token in ids[half:])]
        step.cut(sequence, again)
        return torch.cat([*found[:-3], _logits(step, sequence, ids[again:])])
    finally:
        step.close(sequence)


def _logits(step: Any, sequence: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = step.run([Run(sequence, ids, all_logits=True)]).logits
    return found.clone()
