"""What h200.py found, for people."""

from __future__ import annotations

from typing import Any

import numpy as np
from gpu_predict import Ceilings


def markdown(document: dict[str, Any]) -> str:
    machine = document.get("machine", "")
    lines = ["# The native engine on a GPU", "", f"{machine}. Random weights: figures are of speed.", ""]
    lines += [Ceilings(**document["ceilings"]).about] if "ceilings" in document else []
    for title, found in _tables(document).items():
        lines += ["", f"## {title}: {found['shape']}, {found['rows']} rows after {found['prompt']} tokens", ""]
        lines += ["| arm | tok/s (range) | steady | limit | of it | predicted | bound | launches | warm-up, s | J/token |"]
        lines += ["|---|---:|---:|---:|---:|---:|---|---:|---:|---:|"]
        lines += [_row(name, arm) for name, arm in found["arms"].items()]
        lines += [f"\n{name} failed: {arm['failed']}" for name, arm in found["arms"].items() if "failed" in arm]
        lines += [f"\n{name}: {'; '.join(arm['remarks'])}" for name, arm in found["arms"].items() if arm.get("remarks")]
    return "\n".join([*lines, *_remarks(document), ""])


def _tables(document: dict[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {part: document[part] for part in ("decode", "batch", "lookup") if part in document}
    tables |= {f"small, {name}": each for name, each in document.get("small", {}).items()}
    found = document.get("formats")
    if found:
        about = {"shape": found["shape"], "prompt": found["prompt"]}
        tables |= {f"formats, {rows} rows": about | {"rows": rows, "arms": each} for rows, each in found["rows"].items()}
    return tables


def _row(name: str, arm: dict[str, Any]) -> str:
    if "failed" in arm:
        return f"| {name} | failed | | | | | | | | |"
    rates, joules = arm["tok_per_s"], arm["joules_per_token"]
    cells = [
        name, f"{np.median(rates):.0f} ({min(rates):.0f} … {max(rates):.0f})", f"{np.median(arm['steady_tok_per_s']):.0f}",
        f"{arm['limit_tok_per_s']:.0f}", f"{arm['share_of_limit']:.0%}", f"{arm['predicted_tok_per_s']:.0f}", arm["bound"],
        str(arm["launches"] or "–"), f"{arm['warm_s']:.1f}", "–" if joules is None else f"{joules:.3f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _remarks(document: dict[str, Any]) -> list[str]:
    lines = []
    for name, each in document.get("check", {}).get("arms", {}).items():
        figures = f"KLD {each['kld']:.2e} nats, argmax equal {each['top1_agreement']:.1%}"
        lines.append(f"\n{name}: largest error {each['error']:.3g} of the logits' spread, {figures}")
    agreed = document.get("decode", {}).get("stock_agrees")
    if agreed:
        lead = f"its own word led by {agreed['largest_lead']:.3g} at most where it would not"
        lines.append(f"\nStock transformers would have said {agreed['share']:.1%} of the text of native bfloat16; {lead}")
    if "lookup" in document:
        lines.append(f"\nAll drafted texts are the plain ones: {'yes' if document['lookup']['same_text'] else 'no'}")
    for alpha, each in document.get("lookup", {}).get("drafts", {}).items():
        speeds = f"{each['speedup']:.2f} ×, by the formula {each['predicted']:.2f} ×"
        lines.append(f"\nAcceptance {alpha}, {each['drafted']} drafted: {speeds}; {each['tokens_per_step']:.2f} tokens a step")
    lines += [f"\n{name} does not run: {why}" for name, why in document.get("formats", {}).get("refused", {}).items()]
    taken = ", ".join(f"{part} {seconds:.0f}" for part, seconds in document.get("seconds", {}).items())
    return [*lines, f"\nSeconds: {taken}"]
