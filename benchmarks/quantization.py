"""How much of what rounding, or pruning by magnitude, loses does each method save? On unseen text, window by window.

    python benchmarks/quantization.py [--model demo] [--windows 16] [--only gptq_int4 …] [--out FOLDER]

Every arm is made by `infopt optimize` (or taken from the cache), opened as its users open it, and scored against the
unquantized model on the same windows of the bundled evaluation text. A share is 1 − mean KLD of the candidate ÷ mean KLD
of the baseline; its interval resamples windows, both arms together, since a hard window is hard for both. What FOLDER
holds of other arms, by the same versions on the same windows, is kept, so that the table can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from infopt import host, optimize, pipeline, recipe, techniques, units
from infopt.arms import ArmSpec
from infopt.artifact import read_artifact
from infopt.data import calibration, texts
from infopt.errors import InfoptError
from infopt.measure import environment
from infopt.model import checkpoint, load
from infopt.quality import fidelity
from infopt.settings import LoadOptions

CALIBRATION = {"text": "bundled", "samples": 128, "tokens": 256, "seed": 0}
TOKENS = 512
DRAWS = 10_000
OPTIONS = LoadOptions(device="cpu")

#: Recipes as they are shipped, and what stands beside them.
SHIPPED = (
    "rtn_int4", "gptq_int4", "awq_int4", "autoround_int4", "llmcompressor_gptq", "qat_int3", "rtn_w8a8", "smoothquant_int8",
    "llmcompressor_smoothquant", "mixed_int4", "nf4", "qlora_nf4", "magnitude_50", "wanda_50", "sparsegpt_50",
)  # fmt: skip
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "gptq4_in_order": [{"gptq": {"bits": 4, "act_order": False}}],
    "rtn4_row": [{"rtn": {"bits": 4, "group_size": None}}],
    "gptq4_row": [{"gptq": {"bits": 4, "group_size": None}}],
    "rtn3": [{"rtn": {"bits": 3}}],
    "gptq3": [{"gptq": {"bits": 3}}],
    "rtn8_row": [{"rtn": {"bits": 8, "group_size": None}}],
    "w8a8_symmetric": [{"rtn": {"bits": 8, "group_size": None, "activations": "token"}}],
    "smoothquant_asymmetric": [
        {"smoothquant": {}},
        {"rtn": {"bits": 8, "group_size": None, "activations": "token_asymmetric"}},
    ],
    "mixed_rtn": [{"mixed": {"method": "rtn"}}],
    "mixed_smaller": [{"mixed": {"average_bits": 3.93}}],
    "mixed_rtn_smaller": [{"mixed": {"method": "rtn", "average_bits": 3.85}}],
    "llmcompressor_wanda": [{"llmcompressor": {"method": "wanda"}}],
    "llmcompressor_sparsegpt": [{"llmcompressor": {"method": "sparsegpt"}}],
    "magnitude_24": [{"magnitude": {"pattern": "2:4"}}],
    "wanda_24": [{"wanda": {"pattern": "2:4"}}],
    "sparsegpt_24": [{"sparsegpt": {"pattern": "2:4"}}],
}
ARMS = (*SHIPPED, *VARIANTS)
#: (what, baseline, candidate, least share of the baseline's KLD that is removed, whether the whole interval must lie above)
SHARES: list[tuple[str, str, str, float | None, bool]] = [
    ("4 bits, group 64: gptq in the order of columns", "rtn_int4", "gptq4_in_order", 0.20, False),
    ("4 bits, group 64: gptq with act-order", "rtn_int4", "gptq_int4", None, False),
    ("4 bits, group 64: awq", "rtn_int4", "awq_int4", None, False),
    ("4 bits, group 64: autoround", "rtn_int4", "autoround_int4", None, False),
    ("4 bits, per row: gptq", "rtn4_row", "gptq4_row", 0.40, False),
    ("3 bits, group 64: gptq", "rtn3", "gptq3", 0.45, False),
    ("3 bits, group 64: qat", "rtn3", "qat_int3", 0.40, False),
    ("W8A8: smoothquant", "rtn_w8a8", "smoothquant_int8", 0.0, True),
    ("W8A8, no zero points: smoothquant", "w8a8_symmetric", "smoothquant_int8", 0.0, True),
    ("W8A8: zero points of activations", "w8a8_symmetric", "rtn_w8a8", None, False),
    ("W8A8 after smoothquant: zero points of activations", "smoothquant_int8", "smoothquant_asymmetric", None, False),
    ("mixed at the bytes of 4 bits, rounding", "rtn_int4", "mixed_rtn", 0.10, False),
    ("mixed at the bytes of 4 bits, gptq", "gptq_int4", "mixed_int4", 0.10, False),
    ("mixed in fewer bytes, gptq", "gptq_int4", "mixed_smaller", 0.0, False),
    ("mixed in fewer bytes, rounding", "rtn_int4", "mixed_rtn_smaller", 0.0, False),
    ("qlora over nf4", "nf4", "qlora_nf4", 0.0, True),
    ("gptq over llm-compressor's", "llmcompressor_gptq", "gptq_int4", -0.02, False),
    ("smoothquant over llm-compressor's", "llmcompressor_smoothquant", "smoothquant_int8", -0.02, False),
    ("half of the weights: wanda over magnitude", "magnitude_50", "wanda_50", 0.5, False),
    ("half of the weights: sparsegpt over magnitude", "magnitude_50", "sparsegpt_50", 0.5, False),
    ("2 of 4 weights: wanda over magnitude", "magnitude_24", "wanda_24", None, False),
    ("2 of 4 weights: sparsegpt over magnitude", "magnitude_24", "sparsegpt_24", None, False),
    ("wanda over llm-compressor's", "llmcompressor_wanda", "wanda_50", -0.02, False),
    ("sparsegpt over llm-compressor's", "llmcompressor_sparsegpt", "sparsegpt_50", -0.02, False),
]
BEST_OF = ("4 bits, group 64: the best of gptq, awq and autoround", ("gptq_int4", "awq_int4", "autoround_int4"), 0.30)


@dataclass(frozen=True)
class Scored:
    """One arm: KLD per window (nats), and what it cost to make."""

    kld: list[float]
    kld_mean: float
    ppl_ratio: float
    ppl_ratio_low: float | None
    ppl_ratio_high: float | None
    top1_agreement: float
    weights_bytes: int
    bits_per_weight: float | None
    """Of the layers that are stored packed, scales included."""
    seconds: float
    peak_bytes: int | None
    machine: str
    """The processor and threads that the seconds are of."""


class Bench:
    def __init__(self, model: str, windows: int) -> None:
        self.model = model
        bundle = load.load(pipeline.resolve(model, OPTIONS))
        self.folder = bundle.model.name_or_path
        ids = bundle.tokenizer(texts.read_text("bundled", "evaluation"), verbose=False)["input_ids"]
        self.windows = texts.windows(ids, TOKENS, windows)
        self.tokenizer = bundle.tokenizer
        with torch.inference_mode():
            self.reference = [bundle.model(input_ids=torch.tensor([w]), use_cache=False).logits for w in self.windows]

    def write_texts(self, path: Path) -> None:
        """The windows, and the calibration text of the 4-bit recipes, as token ids: for what runs elsewhere."""
        section = recipe.load("awq_int4", techniques.find).calibration
        assert section
        written = calibration.windows(calibration.read(section), section, self.tokenizer)
        folder = self.folder
        document = {"folder": str(folder), "calibration": written, "windows": self.windows}
        path.write_text(json.dumps(document), encoding="utf-8")

    def score(self, name: str) -> Scored:
        chosen = chosen_recipe(name)
        folder = optimize.ensure(
            ArmSpec(name, self.model, chosen), OPTIONS, lambda line: print(f"\r{name}: {line:<60}", end="", file=sys.stderr)
        )
        assert folder is not None
        made = read_artifact(folder)
        stock = ArmSpec(name, str(folder), pipeline.in_stock(chosen), is_artifact=True)  # what the format itself gives
        bundle = pipeline.open_arm(stock, "cpu", OPTIONS)
        stored, model = iter(self.reference), bundle.model
        found = fidelity.compare_models(
            lambda ids: next(stored), lambda ids: model(input_ids=ids, use_cache=False).logits, self.windows
        )
        kld, ratio, top1 = found.kld_mean, found.ppl_ratio, found.top1_agreement
        assert kld
        assert ratio
        assert top1
        return Scored(
            [float(w.kld.mean()) for w in found.windows], kld.estimate, ratio.estimate, ratio.low, ratio.high, top1.estimate,
            checkpoint.tensor_bytes(folder), bits_per_weight(folder), sum(step.seconds for step in made.steps),
            max((step.peak_bytes or 0 for step in made.steps), default=None),
            f"{environment.cpu_model()}, {torch.get_num_threads()} threads",
        )  # fmt: skip


def bits_per_weight(folder: Path) -> float | None:
    """Stored bits of compressed-tensors' packed layers ÷ their weights; None where there are none."""
    stored = weights = 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = file.keys()
        packed = {name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")}
        for name in names:
            if name.rpartition(".")[0] in packed and not name.endswith((".bias", ".weight_shape")):
                tensor = file.get_tensor(name)
                stored += tensor.nbytes * 8
        for name in packed:
            weights += int(file.get_tensor(f"{name}.weight_shape").prod())
    return stored / weights if weights else None


def markdown(document: dict[str, Any]) -> str:
    """The same for people."""
    size = document["calibration"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    lines = [
        f"# What each method saves: `{document['model']}`",
        "",
        f"{document['windows']} windows of {document['tokens']} tokens that calibration never saw, against the unquantized model "
        f"in float32; {size['samples']} × {size['tokens']} calibration tokens; 95 % intervals over windows. Seconds are those of "
        f"the steps, measured once. {versions}.",
        "",
        "| recipe | KLD, nats | perplexity × | top-1 | stored | to make | on |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for name, arm in document["arms"].items():
        ratio = f"{arm['ppl_ratio']:.4f} [{arm['ppl_ratio_low'] or 0:.4f}, {arm['ppl_ratio_high'] or 0:.4f}]"
        stored, seconds = units.size(arm["weights_bytes"]), f"{arm['seconds']:.0f} s"
        made = f"{stored} | {seconds} | {arm['machine']}"
        lines.append(f"| `{name}` | {arm['kld_mean']:.4f} | {ratio} | {arm['top1_agreement']:.1%} | {made} |")
    lines += [
        "",
        "| share of the baseline's KLD that is removed | baseline | candidate | share | wanted |",
        "|---|---|---|---|---|",
    ]
    for row in document["shares"]:
        wanted = "" if row["least"] is None else f"≥ {row['least']:.0%}"
        share = f"{row['share']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
        lines.append(f"| {row['what']} | `{row['baseline']}` | `{row['candidate']}` | {share} | {wanted} |")
    return "\n".join([*lines, ""])


def chosen_recipe(name: str) -> recipe.Recipe:
    if name in SHIPPED:
        return recipe.load(name, techniques.find)
    return recipe.parse({"version": 1, "name": name, "steps": VARIANTS[name], "calibration": CALIBRATION}, techniques.find)


def removed(baseline: Scored, candidate: Scored) -> tuple[float, float, float]:
    """Share of the baseline's mean KLD that the candidate does not have, with a 95 % bootstrap interval over windows."""
    a, b = np.array(baseline.kld), np.array(candidate.kld)
    draws = np.random.default_rng(0).integers(0, len(a), (DRAWS, len(a)))
    shares = 1 - b[draws].mean(1) / a[draws].mean(1)
    return float(1 - b.mean() / a.mean()), float(np.quantile(shares, 0.025)), float(np.quantile(shares, 0.975))


def shares(scores: dict[str, Scored]) -> list[dict[str, Any]]:
    rows = []
    for what, baseline, candidate, least, strictly in SHARES:
        if baseline in scores and candidate in scores:
            share, low, high = removed(scores[baseline], scores[candidate])
            rows.append({
                "what": what, "baseline": baseline, "candidate": candidate, "share": share, "low": low, "high": high,
                "least": least, "strictly": strictly,
            })  # fmt: skip
    return rows


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is wanted of shares, as bars."""
    bars = []
    for row in rows:
        if row["least"] is not None:
            found = row["low"] if row["strictly"] else row["share"]
            wanted = f"share of KLD removed ≥ {row['least']:.0%}" + (", whole interval" if row["strictly"] else "")
            bars.append({"what": row["what"], "found": found, "wanted": wanted, "met": found >= row["least"]})
    what, names, least = BEST_OF
    best = max((row["share"] for row in rows if row["baseline"] == "rtn_int4" and row["candidate"] in names), default=None)
    if best is not None:
        bars.append({"what": what, "found": best, "wanted": f"share of KLD removed ≥ {least:.0%}", "met": best >= least})
    return bars


def absolute(scores: dict[str, Scored]) -> list[dict[str, Any]]:
    """What is wanted of single arms, and of seconds and bytes of two."""
    bars = []

    def at_most(what: str, most: float, find: Callable[[], float | None]) -> None:
        try:
            found = find()
        except KeyError:  # an arm that was not asked for
            return
        if found is not None:
            bars.append({"what": what, "found": found, "wanted": f"≤ {most}", "met": found <= most})

    at_most("8 bits by rounding: perplexity ratio", 1.01, lambda: scores["rtn8_row"].ppl_ratio)
    at_most("W8A8 by rounding: perplexity ratio", 1.03, lambda: scores["rtn_w8a8"].ppl_ratio)
    at_most("4 bits, group 64: stored bits per weight", 4.6, lambda: scores["rtn_int4"].bits_per_weight)
    at_most("qat: minutes", 15, lambda: scores["qat_int3"].seconds / 60)
    at_most(
        "gptq: seconds over llm-compressor's", 0.5, lambda: scores["gptq_int4"].seconds / scores["llmcompressor_gptq"].seconds
    )
    at_most(
        "mixed in fewer bytes: bytes over uniform", 0.999,
        lambda: scores["mixed_smaller"].weights_bytes / scores["gptq_int4"].weights_bytes,
    )  # fmt: skip
    return bars


def earlier(out: Path | None, facts: dict[str, Any]) -> dict[str, Scored]:
    """Arms that an earlier run left in `out`; none where its model, windows, calibration or versions were others."""
    path = out / "quantization.json" if out else None
    document = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    if any(document.get(name) != value for name, value in facts.items()):
        return {}
    return {name: Scored(**arm) for name, arm in document["arms"].items() if name in ARMS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write-texts", type=Path, help="what modelopt_awq.py reads")
    asked = parser.parse_args()
    bench = Bench(asked.model, asked.windows)
    if asked.write_texts:
        bench.write_texts(asked.write_texts)
    facts = {
        "model": asked.model, "windows": len(bench.windows), "tokens": TOKENS, "calibration": CALIBRATION,
        "versions": host.versions(), "python": platform.python_version(),
    }  # fmt: skip
    scores = earlier(asked.out, facts)
    for name in asked.only:
        try:
            scores[name] = found = bench.score(name)
        except InfoptError as error:
            print(f"\r{name}: not made: {error}")
            continue
        print(
            f"\r{name:<20} KLD {found.kld_mean:.4f}  perplexity ×{found.ppl_ratio:.4f} "
            f"[{found.ppl_ratio_low or 0:.4f}, {found.ppl_ratio_high or 0:.4f}]  top-1 {found.top1_agreement:.1%}  "
            f"{units.size(found.weights_bytes)}  {found.seconds:.0f} s  peak {units.size(found.peak_bytes)}"
        )
    scores = {name: scores[name] for name in ARMS if name in scores}
    rows = shares(scores)
    bars = [*judged(rows), *absolute(scores)]
    for row in rows:
        print(f"{row['what']:<55} removes {row['share']:.1%} [{row['low']:.1%}, {row['high']:.1%}]")
    for bar in bars:
        print(f"{'ok   ' if bar['met'] else 'SHORT'} {bar['what']:<55} {bar['found']:.4g}  ({bar['wanted']})")
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        document = {
            **facts, "arms": {name: asdict(found) for name, found in scores.items()}, "shares": rows, "bars": bars,
        }  # fmt: skip
        (asked.out / "quantization.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (asked.out / "quantization.md").write_text(markdown(document), encoding="utf-8")
    return int(not all(bar["met"] for bar in bars))


if __name__ == "__main__":
    sys.exit(main())
