"""Reads an ONNX folder with onnxruntime-genai: nothing of infopt is imported.

    python interop_genai.py REQUEST.json ANSWER.json

Request and answer are described in interop.py.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def read(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import onnxruntime_genai as genai

    model = genai.Model(request["folder"])
    tokenizer = genai.Tokenizer(model)

    def start(ids: list[int], count: int) -> Any:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + count, min_length=len(ids) + count, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        return generator

    def greedy(ids: list[int], count: int) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"tokens": [], "logprobs": [], "margins": []}
        generator = start(ids, count)
        for _ in range(count):
            logprobs = log_softmax(generator.get_logits()[0, -1])
            best, second = logprobs.argsort()[-2:][::-1]
            made["tokens"].append(int(best))
            made["logprobs"].append(float(logprobs[best]))
            made["margins"].append(float(logprobs[best] - logprobs[second]))
            generator.append_tokens(np.array([best], dtype=np.int32))  # goes on past end tokens, as the others do
        return made

    def log_softmax(logits: Any) -> Any:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    text = np.array(request["text"])
    logprobs = log_softmax(start(request["text"], 1).get_output("logits")[0, :-1])
    return {
        "outputs": [greedy(prompt, request["new_tokens"]) for prompt in request["prompts"]],
        "text_logprobs": logprobs[np.arange(len(text) - 1), text[1:]].tolist(),
        "encoded": [[int(token) for token in tokenizer.encode(text)] for text in request["texts"]],
    }


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found: dict[str, Any] = {"versions": {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}}
    try:
        found |= read(request)
    except Exception as error:  # whatever it is, it is the finding
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
