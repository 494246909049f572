"""vLLM on this CPU, in its own environment, for native.py: a process that waits between requests.

    python native_vllm.py FOLDER < REQUESTS > ANSWERS

A request is a line of JSON, {"prompts": [[ids]], "new": n}; its answer the seconds for one new token of each prompt, and for
n. The weights are bfloat16, which is what vLLM multiplies fastest on a CPU without a quantized artifact.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False, disable_log_stats=True)

    def seconds(prompts: list[list[int]], count: int) -> float:
        greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
        return time.perf_counter() - start

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(seconds(asked["prompts"], 1), seconds(asked["prompts"], asked["new"]), file=answers, flush=True)


if __name__ == "__main__":
    main()
