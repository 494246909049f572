"""`infopt generate`: one prompt, one or two models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from infopt import host, optimize, pipeline
from infopt.arms import ArmSpec
from infopt.data.candidates import require_rules
from infopt.data.expect import Expect
from infopt.data.prompts import Prompt
from infopt.errors import InputError
from infopt.measure import memory
from infopt.protocols import Progress
from infopt.quality.behaviour import Row, first_divergence, run_prompts
from infopt.settings import LoadOptions


@dataclass(frozen=True)
class Generated:
    """`text` and `output_ids`: of the chosen candidate, or of the first where `chosen` is None: nothing chose."""

    label: str
    description: str
    text: str
    output_ids: tuple[int, ...]
    candidates: tuple[Row, ...] = ()
    chosen: int | None = None
    why: str | None = None


def generate(
    spec: ArmSpec,
    prompt: str,
    options: LoadOptions,
    *,
    tokens: int,
    is_raw: bool,
    expect: Expect | None = None,
    progress: Progress = lambda line: None,
) -> Generated:
    """The answer of one arm; its weight steps come from the artifact cache. `expect`: what `choose: check` checks by.

    Raises InputError.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty", hint='infopt generate demo "Name the capital of France."')
    row, sampling = Prompt(id="prompt", text=prompt, is_raw=is_raw, max_tokens=tokens, expect=expect), spec.recipe.sampling
    require_rules([row], sampling.choose)
    device = host.device_name(options.device)
    host.set_threads(options.threads)
    folder = optimize.ensure(spec, options, progress)
    ready = spec if folder is None else replace(spec, model=str(Path(folder)), is_artifact=True)
    bundle = pipeline.open_arm(ready, device, options, progress)
    progress(f"{spec.label}: generating")
    engine = pipeline.engine(bundle, spec.recipe)
    (answer,) = run_prompts(engine, [row], bundle.tokenizer, seed=options.seed, sampling=sampling)
    found = Generated(spec.label, bundle.description, answer.text, answer.output_ids, answer.rows)
    if answer.choice:
        found = replace(found, chosen=answer.choice.index, why=answer.choice.why)
    del bundle
    memory.release(device)
    return found


def difference(first: Generated, second: Generated) -> str:
    """Where two answers part."""
    position = first_divergence(first.output_ids, second.output_ids)
    if position is None:
        return f"the same {len(first.output_ids)} tokens"
    return f"the same for {position} tokens, then different"
