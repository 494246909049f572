"""One run of auto-round on a job folder (see `job.py`). Runs in the environment `autoround`, without infopt.

Written to `out/`: what each layer was rounded to, as integers and scales; packing them is left to the caller.
"""

from __future__ import annotations

from typing import Any

from job import Job


def main() -> None:
    job = Job.open()
    job.say("importing")
    import torch
    from auto_round import AutoRound
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job.say_bars()
    options = job.options
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    work = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        scheme=scheme(options),
        layer_config={name: {"bits": 16, "data_type": "float"} for name in options["ignore"]},
        dataset=[torch.tensor([ids]) for ids in job.ids],
        nsamples=len(job.ids),
        seqlen=min(len(ids) for ids in job.ids),
        iters=options["iters"],
        batch_size=options["batch_size"],
        scale_dtype={"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[options["scale_dtype"]],
        device_map=job.device,
        enable_torch_compile=False,  # saves a fifth of the steps, costs a minute and a compiler
        seed=job.seed,
    )
    rounded, _ = work.quantize()
    job.say("saving")
    tensors: dict[str, Any] = {}
    for name, layer in rounded.named_modules():
        if getattr(layer, "bits", 16) < 16 and hasattr(layer, "scale"):
            tensors.update({f"{name}.{part}": tensor.contiguous().cpu() for part, tensor in integers(layer).items()})
    job.out.mkdir()
    save_file(tensors, job.out / "rounded.safetensors")


def scheme(options: dict[str, Any]) -> dict[str, Any]:
    """What auto-round calls the grid: weights only, a group of −1 is a row."""
    group = options["group_size"] or -1
    return {"bits": options["bits"], "group_size": group, "sym": options["symmetric"], "data_type": "int", "act_bits": 16}


def integers(layer: Any) -> dict[str, Any]:
    """`q` int8 [out, in], `scale` float32 [out, groups] and, unless symmetric, `zero`: the weight is (q − zero)·scale."""
    import torch

    weight, scale = layer.weight.data.float(), layer.scale.float().view(layer.weight.shape[0], -1)
    half = 1 << (layer.bits - 1)
    groups = weight.view(*scale.shape, -1)
    zero = None if layer.sym else torch.as_tensor(layer.zp, dtype=torch.float32).expand_as(scale) - half
    q = groups / scale[..., None] + (0 if zero is None else zero[..., None])
    found = {"q": q.round().clamp(-half, half - 1).to(torch.int8).view_as(weight), "scale": scale}
    return found if zero is None else found | {"zero": zero}


if __name__ == "__main__":
    main()
