"""Does a calibrated step take time in proportion to the layers, and memory of one block only?

    python benchmarks/calibration_scaling.py [--layers 4 8 16 32] [--hidden 256]

Each size runs in a process of its own, GPTQ on 64 × 256 tokens of a random Llama. Seconds are the process's CPU seconds,
which other load on the machine hardly moves; memory is the growth of its peak over the loaded model. Exits 1 when the
largest model takes more than 1.15 × its share of time, or its memory beside the model grows with its depth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import psutil

SAMPLES, TOKENS = 64, 256
CHILD = """
import json, sys, time, torch, psutil, resource
from transformers import LlamaConfig, LlamaForCausalLM
from infopt.model.bundle import Bundle
from infopt.protocols import Context
from infopt.techniques.gptq import Gptq, GptqOptions
layers, hidden, samples, tokens = map(int, sys.argv[1:])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
model = LlamaForCausalLM(config).eval().requires_grad_(False)
bundle = Bundle(model, None, "random")
ids = tuple(tuple(torch.randint(512, (tokens,)).tolist()) for _ in range(samples))
size = bundle.resident_bytes()
loaded = psutil.Process().memory_info().rss
start = time.process_time()
Gptq(GptqOptions()).apply(bundle, Context(calibration_ids=ids))
print(json.dumps({"layers": layers, "cpu_s": time.process_time() - start, "model_bytes": size,
                  "beside_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - loaded}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--hidden", type=int, default=256)
    asked = parser.parse_args()
    rows = []
    for layers in sorted(asked.layers):
        arguments = [str(number) for number in (layers, asked.hidden, SAMPLES, TOKENS)]
        # Freed memory goes back at once, so that holes in the allocator's heap are not taken for memory in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", CHILD, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        rows.append(row := json.loads(done.stdout))
        print(
            f"{layers:>3} layers  {row['cpu_s']:7.2f} CPU s  {row['cpu_s'] / layers:6.3f} a layer   "
            f"model {row['model_bytes'] / 1e6:6.1f} MB, beside it {row['beside_bytes'] / 1e6:6.1f} MB"
        )
    first, last = rows[0], rows[-1]
    share = last["cpu_s"] / first["cpu_s"] / (last["layers"] / first["layers"])
    # The packed result, kept until it is saved, grows with the model: half a byte a weight and its scales.
    packed = (last["model_bytes"] - first["model_bytes"]) * 0.15
    grown = last["beside_bytes"] - first["beside_bytes"] - packed
    print(f"time: {share:.2f} × its share; memory beside the model and the packed result grew by {grown / 1e6:.0f} MB")
    print(f"on {psutil.cpu_count()} CPUs")
    return int(share > 1.15 or grown > 0.1 * last["beside_bytes"] + 20e6)


if __name__ == "__main__":
    sys.exit(main())
