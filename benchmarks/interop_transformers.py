"""Reads a folder, or a GGUF file, with plain transformers: nothing of infopt is imported, no tokenizer or config is repaired.

    python interop_transformers.py REQUEST.json ANSWER.json

Request and answer are described in interop.py.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def read(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(request["folder"])
    place = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if place else path
    tokenizer = AutoTokenizer.from_pretrained(folder, **place)
    encoded = [list(tokenizer(text)["input_ids"]) for text in request["texts"]]

    def answered(dtype: str) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **place)
        return {**answer(model.requires_grad_(False), request), "encoded": encoded, "dtype": dtype}

    try:
        return answered(request["dtype"])
    except (NotImplementedError, RuntimeError, ValueError) as error:  # compressed-tensors opens FP4 to bfloat16 alone
        if "dtype" not in str(error):
            raise
        return answered("bfloat16")


def answer(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """`outputs` and `text_logprobs` of an open model."""
    import torch

    with torch.inference_mode():
        outputs = [greedy(model, prompt, request["new_tokens"]) for prompt in request["prompts"]]
        ids = torch.tensor([request["text"]])
        logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        text = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return {"outputs": outputs, "text_logprobs": text}


def greedy(model: Any, prompt: list[int], count: int) -> dict[str, Any]:
    """The likeliest `count` tokens, end tokens included, their log-probabilities and the distance to the second likeliest."""
    import torch

    ids, cache = torch.tensor([prompt]), None
    made: dict[str, list[Any]] = {"tokens": [], "logprobs": [], "margins": []}
    for _ in range(count):
        step = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        top = step.logits[0, -1].double().log_softmax(-1).topk(2)
        made["tokens"].append(int(top.indices[0]))
        made["logprobs"].append(float(top.values[0]))
        made["margins"].append(float(top.values[0] - top.values[1]))
        ids = top.indices[None, :1]
    return made


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found: dict[str, Any] = {"versions": {name: version(name) for name in ("transformers", "torch")}}
    try:
        found |= read(request)
    except Exception as error:  # whatever it is, it is the finding
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
