"""AWQ by NVIDIA's modelopt on the calibration text, and judged on the windows, of quantization.py.

    python benchmarks/quantization.py --only --write-texts texts.json
    PYTHON-WITH-MODELOPT benchmarks/modelopt_awq.py texts.json [--out FILE]

It wants an environment of its own: torch==2.13.0, nvidia-modelopt==0.47.0, transformers, accelerate, requests, pandas, datasets.
Weights are 4-bit integers in groups of 64 without zero points, as in recipes/awq_int4.yaml; `awq_lite` searches scales,
`awq_full` clips as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import modelopt
import modelopt.torch.quantization as mtq
import torch
from transformers import AutoModelForCausalLM

GROUP = 64
METHODS: dict[str, dict[str, Any]] = {
    "awq_lite": {"method": "awq_lite", "alpha_step": 0.1},
    "awq_full": {"method": "awq_full", "alpha_step": 0.1},
}


@torch.inference_mode()
def klds(model: Any, reference: list[torch.Tensor], windows: list[list[int]]) -> list[float]:
    """Mean KLD of each window, nats."""
    found = []
    for window, expected in zip(windows, reference, strict=True):
        ours = model(input_ids=torch.tensor([window]), use_cache=False).logits.log_softmax(-1)
        theirs = expected.log_softmax(-1)
        found.append(float((theirs.exp() * (theirs - ours)).sum(-1).mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    given = json.loads(asked.texts.read_text(encoding="utf-8"))
    model: Any = AutoModelForCausalLM.from_pretrained(given["folder"], dtype=torch.float32)
    model.eval()
    with torch.inference_mode():
        reference = [model(input_ids=torch.tensor([window]), use_cache=False).logits for window in given["windows"]]
    arms = {}
    for name, algorithm in METHODS.items():
        config = copy.deepcopy(mtq.INT4_AWQ_CFG)
        config["algorithm"] = algorithm
        for entry in config["quant_cfg"]:
            if entry.get("quantizer_name") == "*weight_quantizer":
                entry["cfg"]["block_sizes"][-1] = GROUP

        @torch.inference_mode()
        def calibrate(calibrated: Any) -> None:
            for start in range(0, len(given["calibration"]), 8):
                calibrated(input_ids=torch.tensor(given["calibration"][start : start + 8]), use_cache=False)

        began = time.perf_counter()
        quantized = mtq.quantize(copy.deepcopy(model), config, calibrate)
        seconds = time.perf_counter() - began
        found = klds(quantized, reference, given["windows"])
        arms[name] = {"kld": found, "kld_mean": sum(found) / len(found), "seconds": seconds}
        print(f"{name}: KLD {arms[name]['kld_mean']:.4f}, {seconds:.0f} s", flush=True)
        if asked.out:
            document = {"modelopt": modelopt.__version__, "torch": torch.__version__, "group_size": GROUP, "arms": arms}
            asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
