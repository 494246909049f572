"""One run of llm-compressor on a job folder (see `job.py`). Runs in the environment `llmcompressor`, without infopt."""

from __future__ import annotations

from typing import Any

from job import Job


def main() -> None:
    job = Job.open()
    job.say("importing")
    import torch
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(job.seed)
    job.say_bars()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto").to(job.device)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    windows: Any = [{"input_ids": torch.tensor(ids)} for ids in job.ids]
    data = DataLoader(windows, batch_size=job.options["batch_size"]) if windows else None
    oneshot(model=model, tokenizer=tokenizer, recipe=modifiers(job.options), dataset=data)
    job.say("saving")
    model.save_pretrained(job.out, save_compressed=True)
    tokenizer.save_pretrained(job.out)


def modifiers(options: dict[str, Any]) -> list[Any]:
    """What llm-compressor calls a recipe."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if options["pruning"] is not None:
        chosen = dict(options["pruning"])
        make = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[chosen.pop("method")]
        return [make(**chosen, targets=["Linear"], ignore=options["ignore"])]
    scheme = options["scheme"]  # a preset's name, or a group of its own
    target = {"scheme": scheme} if isinstance(scheme, str) else {"config_groups": {"group_0": scheme}}
    target["ignore"] = options["ignore"]
    smooth = options["smoothing"]
    return [
        *([SmoothQuantModifier(smoothing_strength=smooth)] if smooth is not None else []),
        QuantizationModifier(**target) if options["gptq"] is None else GPTQModifier(**target, **options["gptq"]),
    ]


if __name__ == "__main__":
    main()
