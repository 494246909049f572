"""What do smaller models keep, what does training give back, and do they get faster as their bytes say?

    python benchmarks/smaller.py [--part depth heal signals width draft narrow] [--tasks FOLDER] [--out FOLDER]

depth    six of thirty blocks, chosen in every way; KLD on text that no choice saw
heal     the share of the lost log-likelihood that training gives back, and the speed of what is left
signals  the same student and tokens under different losses
width    narrower matrices, trained afterwards: measured speed against what the bytes predict
draft    how many drafted tokens the model accepts, before and after the draft learned its words, and what that does to speed
narrow   a task for half of the bytes (`benchmarks/narrow_tasks.py` writes the rows into --tasks FOLDER)

Every arm is made by `infopt optimize`, or taken from the cache, and judged on the same windows of the bundled evaluation text;
intervals resample windows, all arms together. Speeds are of the native engine in int8, arms taking turns. What FOLDER holds of
other parts, and of other tasks, is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from native_arms import native_decode

from infopt import __version__, host, optimize, pipeline, recipe, techniques, units
from infopt.arms import ArmSpec
from infopt.artifact import read_artifact
from infopt.data import choices, texts
from infopt.model import checkpoint, load
from infopt.protocols import Request, Trace
from infopt.quality import fidelity, tasks
from infopt.sections import EngineSection, Speculative
from infopt.settings import LoadOptions

OPTIONS = LoadOptions(device="cpu", allow_leakage=True)
TOKENS, WINDOWS, DRAWS, ROUNDS = 512, 16, 10_000, 25
RANDOM_DRAWS = 5
#: The blocks that `greedy` takes out of the demo model, so that arms which differ in training do not choose again.
GONE = [17, 16, 18, 14, 15, 13]
TEXT = {"text": "bundled", "samples": 262, "tokens": 256, "seed": 0}
SHORT = {"text": "bundled", "samples": 16, "tokens": 256, "seed": 0}
TRAINING = {"epochs": 1, "batch": 4, "learning_rate": 0.0003}
SIGNALS: dict[str, dict[str, Any]] = {
    "logits": {},
    "next token": {"logits": 0.0, "tokens": 1.0},
    "teacher's words": {"logits": 0.0, "tokens": 1.0, "answers": "teacher", "answer_tokens": 191},
}
OPENING, SAID, PROMPTS = 64, 96, 16


def say(line: str) -> None:
    print(f"\r{line[:100]:<100}", end="", file=sys.stderr, flush=True)


def own(name: str, *steps: dict[str, Any], calibration: dict[str, Any] | None = None) -> recipe.Recipe:
    return recipe.parse({"version": 1, "name": name, "steps": list(steps), "calibration": calibration or TEXT}, techniques.find)


class Bench:
    def __init__(self, model: str) -> None:
        self.model = model
        bundle = load.load(pipeline.resolve(model, OPTIONS))
        self.tokenizer = bundle.tokenizer
        ids = bundle.tokenizer(texts.read_text("bundled", "evaluation"), verbose=False)["input_ids"]
        self.windows = texts.windows(ids, TOKENS, WINDOWS)
        with torch.inference_mode():
            self.reference = [bundle.model(input_ids=torch.tensor([w]), use_cache=False).logits for w in self.windows]

    def made(self, chosen: recipe.Recipe, *, model: str | None = None, seed: int = 0) -> Path:
        spec = ArmSpec(chosen.name, model or self.model, chosen)
        folder = optimize.ensure(spec, replace(OPTIONS, seed=seed), lambda line: say(f"{chosen.name}: {line}"))
        assert folder is not None
        return folder

    def score(self, folder: Path) -> dict[str, Any]:
        """KLD and the loss above the reference's, nats per token, window by window; bytes and seconds."""
        model = load.load(pipeline.resolve(str(folder), OPTIONS)).model
        stored = iter(self.reference)
        found = fidelity.compare_models(
            lambda ids: next(stored), lambda ids: model(input_ids=ids, use_cache=False).logits, self.windows
        )
        written = folder / "distil.json"
        learned = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else None
        return {
            "kld": [float(w.kld.mean()) for w in found.windows],
            "lost": [float((w.nll - w.nll_reference).mean()) for w in found.windows],
            "weights_bytes": checkpoint.tensor_bytes(folder),
            "seconds": {step.name: step.seconds for step in read_artifact(folder).steps},
            "learned_tokens": learned["tokens"] if learned else None,
        }

    def arm(self, chosen: recipe.Recipe, *, seed: int = 0) -> dict[str, Any]:
        found = self.score(self.made(chosen, seed=seed))
        mean, lost = np.mean(found["kld"]), np.mean(found["lost"])
        print(f"\r{chosen.name:<32} KLD {mean:.4f}  perplexity × {math.exp(lost):.4f}  {units.size(found['weights_bytes'])}")
        return found

    def native(self, folder: Path | None, speculative: Speculative | None = None) -> Any:
        """Bundle and recipe of the model, or an artifact, in the native engine with int8 weights."""
        chosen = replace(recipe.Recipe(name="native"), engine=EngineSection(weights="int8"), speculative=speculative)
        spec = ArmSpec("native", str(folder or self.model), chosen, is_artifact=folder is not None)
        return pipeline.open_arm(spec, "cpu", OPTIONS), chosen


def interval(of: Callable[[Any], Any], *arms: Sequence[float]) -> dict[str, float]:
    """`of` the arms' means, with a 95 % interval over windows resampled together."""
    columns = np.array(arms)
    draws = np.random.default_rng(0).integers(0, columns.shape[1], (DRAWS, columns.shape[1]))
    values = of(columns[:, draws].mean(-1))
    low, high = np.quantile(values, (0.025, 0.975))
    return {"value": float(of(columns.mean(-1))), "low": float(low), "high": float(high)}


def ratio(a: dict[str, Any], b: dict[str, Any], key: str) -> dict[str, float]:
    return interval(lambda means: means[0] / means[1], a[key], b[key])


def depth(bench: Bench) -> dict[str, Any]:
    arms = {
        by: bench.arm(own(f"drop 6 by {by}", {"drop_layers": {"count": 6, "by": by}}, calibration=SHORT))
        for by in ("greedy", "kld", "influence", "even")
    }
    for seed in range(RANDOM_DRAWS):
        steps = {"drop_layers": {"count": 6, "by": "random"}}
        arms[f"random, seed {seed}"] = bench.arm(own(f"drop 6, seed {seed}", steps, calibration=SHORT), seed=seed)
    against = {name: ratio(arms["greedy"], arm, "kld") for name, arm in arms.items() if name != "greedy"}
    return {"arms": arms, "KLD of greedy over": against}


def speed(bench: Bench, folders: dict[str, Path | None]) -> dict[str, Any]:
    """Tokens per second of each, taking turns; ratios to the first are medians over rounds."""
    prompt = list(bench.windows[0][:128])
    steps = {name: bench.native(folder)[0].model.step for name, folder in folders.items()}
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            rate, _ = native_decode(step, [prompt], 96)
            if number:  # the first warms up
                rates[name].append(rate)
    base, *others = rates
    found: dict[str, Any] = {"tok_per_s": rates, "read_bytes": {name: step.read_bytes for name, step in steps.items()}}
    found["speedup"] = {
        name: {
            "median": float(np.median(r := np.divide(rates[name], rates[base]))),
            "least": float(r.min()),
            "most": float(r.max()),
        }
        for name in others
    }
    found["predicted"] = {name: steps[base].read_bytes / steps[name].read_bytes for name in others}
    return found


def heal(bench: Bench) -> dict[str, Any]:
    dropped = own("drop 6", {"drop_layers": {"layers": GONE}})
    healed = recipe.load("distil_heal", techniques.find)
    arms = {"dropped": bench.arm(dropped), "healed": bench.arm(healed)}
    regained = interval(lambda means: 1 - means[1] / means[0], arms["dropped"]["lost"], arms["healed"]["lost"])
    found = speed(bench, {"whole": None, "24 blocks": bench.made(healed)})
    return {"arms": arms, "share of the lost log-likelihood regained": regained, "speed": found}


def signals(bench: Bench) -> dict[str, Any]:
    arms = {"dropped": bench.arm(own("drop 6", {"drop_layers": {"layers": GONE}}))}
    for name, options in SIGNALS.items():
        steps = ({"drop_layers": {"layers": GONE}}, {"distil": TRAINING | options})
        arms[name] = bench.arm(own(name.replace("'", ""), *steps))
    regained = {
        name: interval(lambda means: 1 - means[1] / means[0], arms["dropped"]["lost"], arm["lost"])
        for name, arm in arms.items()
        if name != "dropped"
    }
    return {"arms": arms, "share of the lost log-likelihood regained": regained}


def width(bench: Bench) -> dict[str, Any]:
    cut = recipe.load("prune_width", techniques.find)
    training = {"distil": TRAINING}
    healed = own("prune_width, trained", *(step.as_dict() for step in cut.steps), training)
    arms = {"cut": bench.arm(cut), "cut and trained": bench.arm(healed)}
    regained = interval(lambda means: 1 - means[1] / means[0], arms["cut"]["lost"], arms["cut and trained"]["lost"])
    found = speed(bench, {"whole": None, "cut": bench.made(healed)})
    return {"arms": arms, "share of the lost log-likelihood regained": regained, "speed": found}


def draft(bench: Bench) -> dict[str, Any]:
    taught = recipe.load("make_draft", techniques.find)
    folders = {"untaught": bench.made(own("shallow", taught.steps[0].as_dict())), "taught": bench.made(taught)}
    found: dict[str, Any] = {"weights_bytes": {name: checkpoint.tensor_bytes(folder) for name, folder in folders.items()}}
    found["seconds"] = {step.name: step.seconds for step in read_artifact(folders["taught"]).steps}
    requests = [Request(str(n), tuple(w[:OPENING]), SAID) for n, w in enumerate(bench.windows[:PROMPTS])]
    engines = {"plain": pipeline.engine(*bench.native(None))}
    for name, folder in folders.items():
        for tokens in (2, 4):
            chosen = Speculative(draft=str(folder), tokens=tokens)
            engines[f"{name}, {tokens} ahead"] = pipeline.engine(*bench.native(None, chosen))
    engines["auto"] = pipeline.engine(*bench.native(None, Speculative(draft="auto", among=(str(folders["taught"]),))))
    rates: dict[str, list[float]] = {name: [] for name in engines}
    counts: dict[str, list[Trace]] = {name: [] for name in engines}
    for request in [requests[0], *requests]:  # the first warms up
        for name, engine in engines.items():
            counts[name].append(trace := engine.generate([request]))
            rates[name].append((SAID - 1) / (trace.emission_s[-1] - trace.emission_s[0]))
    for name, traces in counts.items():
        first = [trace.accepted_at[0] for trace in traces[1:] if trace.accepted_at]
        over = np.divide(rates[name][1:], rates["plain"][1:])
        found[name] = {
            "same_text": [t.output_ids for t in traces] == [t.output_ids for t in counts["plain"]],
            "drafted": sum(trace.drafted or 0 for trace in traces[1:]),
            "accepted": sum(trace.accepted or 0 for trace in traces[1:]),
            "first_drafted": sum(had for had, _ in first),
            "first_accepted": sum(kept for _, kept in first),
            "tok_per_s": rates[name][1:],
            "speedup": {"median": float(np.median(over)), "least": float(over.min()), "most": float(over.max())},
            "notes": [note.replace(str(folders["taught"]), "taught") for note in engines[name].notes],
        }
        share = f"first token kept {sum(k for _, k in first) / sum(h for h, _ in first):.3f}" if first else ""
        print(f"\r{name:<24} × {np.median(over):.3f} {share}  same text: {found[name]['same_text']}")
    return found


def narrow(bench: Bench, task: Path) -> dict[str, Any]:
    """A teacher, and students of half of the blocks: one whose teacher answers, and two that learn from the rows of a careless
    one, sifted and not. A task without prompts to answer has a teacher alone."""
    items = choices.read_choices(task / "test.jsonl")
    step = recipe.load("finetune", techniques.find).steps[0].as_dict()["distil"]
    teacher = bench.made(own(f"finetune, {task.name}", {"distil": step | {"data": str(task / "train.jsonl")}}))
    folders = {"teacher": teacher} | students(bench, task, teacher)
    scores = {name: scored(bench, folder, items) for name, folder in folders.items()}
    floor = tasks.majority(items)
    arms: dict[str, Any] = {}
    for name, each in scores.items():
        result = tasks.compare_scores(scores["teacher"], each, majority=floor)
        figures = {key: value.model_dump() for key, value in result.figures().items()}
        arms[name] = figures | {"weights_bytes": checkpoint.tensor_bytes(folders[name])}
        print(f"\r{task.name} {name:<22} accuracy {result.accuracy.estimate:.3f}  retention {result.retention}")
    lost = tasks.compare_scores(scores["noised rows, sifted"], scores["noised rows"]) if "noised rows" in scores else None
    unsifted = {key: value.model_dump() for key, value in lost.figures().items()} if lost else None
    return {"items": len(items), "majority": floor, "arms": arms, "noised over sifted": unsifted}


def students(bench: Bench, task: Path, teacher: Path) -> dict[str, Path]:
    """One for each way to learn that the task's folder has rows for."""
    student = recipe.load("distil_classify", techniques.find)
    *before, last = (each.as_dict() for each in student.steps)
    section = student.calibration.model_dump() if student.calibration else None
    rows = {"answers": "rows", "samples": 1, "answer_temperature": 0.0, "answer_tokens": 128, "logits": 0.0}
    found = {}
    for name, data, changes in (
        ("student", "answered", {}),
        ("noised rows, sifted", "noised", rows),
        ("noised rows", "noised", rows | {"filter": False}),
    ):
        if (task / f"{data}.jsonl").is_file():
            options = last["distil"] | {"teacher": str(teacher), "data": str(task / f"{data}.jsonl")} | changes
            found[name] = bench.made(own(f"{name}, {task.name}", *before, {"distil": options}, calibration=section))
    return found


def scored(bench: Bench, folder: Path, items: tuple[choices.Item, ...]) -> list[tasks.ItemScore]:
    bundle = load.load(pipeline.resolve(str(folder), OPTIONS))
    return tasks.score_choices(tasks.masked_logits_of(bundle.model), bundle.tokenizer, items, say)


def markdown(document: dict[str, Any]) -> str:
    """The same for people."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    lines = [
        f"# Smaller models: `{document['model']}`",
        "",
        f"{WINDOWS} windows of {TOKENS} tokens that nothing was chosen or trained by, against the whole model in float32; 95 % "
        f"intervals over windows. Speeds are of the native engine in int8, arms taking turns. {versions}.",
    ]
    for part in ("depth", "heal", "signals", "width"):
        if part not in document:
            continue
        found = document[part]
        lines += ["", f"## {part}", "", "| arm | KLD, nats | perplexity × | stored | tokens learned | seconds |"]
        lines += ["|---|---:|---:|---:|---:|---|"]
        for name, arm in found["arms"].items():
            seconds = ", ".join(f"{step} {taken:.0f}" for step, taken in arm["seconds"].items())
            figures = f"{np.mean(arm['kld']):.3f} | {math.exp(np.mean(arm['lost'])):.3f}"
            learned = arm["learned_tokens"] or "–"
            lines.append(f"| {name} | {figures} | {units.size(arm['weights_bytes'])} | {learned} | {seconds} |")
        lines += [f"\nKLD of greedy over {name}: {_range(each)}" for name, each in found.get("KLD of greedy over", {}).items()]
        regained = found.get("share of the lost log-likelihood regained", {})
        for name, each in ({"": regained} if "value" in regained else regained).items():
            lines.append(f"\nShare of the lost log-likelihood regained{f' by {name}' if name else ''}: {_range(each)}")
        for name, each in found.get("speed", {}).get("speedup", {}).items():
            spread = f"{each['median']:.2f} × ({each['least']:.2f} … {each['most']:.2f})"
            lines.append(f"\nDecoding with {name}: {spread}; the bytes say {found['speed']['predicted'][name]:.2f} ×")
    lines += _drafts(document.get("draft"))
    for task, found in document.get("narrow", {}).items():
        lines += [
            "",
            f"## narrow: {task}",
            "",
            f"{found['items']} items; the commonest label is right in {found['majority']:.1%}.",
            "",
        ]
        lines += ["| arm | accuracy | retention | stored |", "|---|---|---|---:|"]
        for name, arm in found["arms"].items():
            kept = _range(arm["mc.retention"] | {"value": arm["mc.retention"]["value"]}) if "mc.retention" in arm else "–"
            lines.append(f"| {name} | {_range(arm['mc.accuracy'])} | {kept} | {units.size(arm['weights_bytes'])} |")
        if found["noised over sifted"]:
            lines.append(f"\nNot to sift the noised rows changes accuracy by {_range(found['noised over sifted']['mc.delta'])}")
    return "\n".join([*lines, ""])


def _range(value: dict[str, Any]) -> str:
    bounds = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['value']:.3f}{bounds}"


def _drafts(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = ["", "## draft", "", "| draft | first token kept | of all drafted | speed × | same text |", "|---|---:|---:|---|---|"]
    for name, arm in found.items():
        if "speedup" not in arm:
            continue
        first = f"{arm['first_accepted'] / arm['first_drafted']:.3f}" if arm["first_drafted"] else "–"
        share = f"{arm['accepted'] / arm['drafted']:.3f}" if arm["drafted"] else "–"
        spread = f"{arm['speedup']['median']:.2f} ({arm['speedup']['least']:.2f} … {arm['speedup']['most']:.2f})"
        lines.append(f"| {name} | {first} | {share} | {spread} | {'yes' if arm['same_text'] else 'no'} |")
    return lines


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "depth": depth, "heal": heal, "signals": signals, "width": width, "draft": draft,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--part", nargs="*", choices=[*PARTS, "narrow"], default=list(PARTS))
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    bench = Bench(asked.model)
    path = asked.out / "smaller.json" if asked.out else None
    document = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    document |= {"schema_version": 1, "model": asked.model, "infopt": __version__, "versions": host.versions()}
    for part in asked.part:
        if part == "narrow":
            for task in sorted(each for each in asked.tasks.iterdir() if each.is_dir()):
                document["narrow"] = document.get("narrow", {}) | {task.name: narrow(bench, task)}
                write(document, path)
        else:
            document[part] = PARTS[part](bench)
            write(document, path)


def write(document: dict[str, Any], path: Path | None) -> None:
    """Both files, after every part and task: what took hours is kept if the next one fails."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(document), encoding="utf-8")


if __name__ == "__main__":
    main()
