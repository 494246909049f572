"""Calibrated scales for engines that keep keys and values in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from infopt.errors import InputError, RecipeError
from infopt.layers import passes
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Needs, Options, Technique

if TYPE_CHECKING:
    from infopt.calibrate.blocks import Block
    from infopt.model.bundle import Bundle

#: The largest number that a key or value is mapped to: E4M3's, and half the range of 4-bit integers.
LARGEST = {8: 448.0, 4: 7.5}
#: Of those that were tried: their files load back.
FAMILIES = "llama, mistral, qwen2, qwen3, gemma2, gemma3, phi, olmo2, starcoder2, stablelm, granite, cohere, smollm3, glm4"
#: The recipe's `cache.dtype` that keeps numbers of so many bits.
DTYPES = {8: "fp8", 4: "int4"}


class KvCacheOptions(Options):
    bits: Literal[4, 8] = 8
    scales: Literal["tensor", "head"] = "tensor"


class KvCache(Technique):
    """Records, per layer, the scales with which an engine can keep keys and values in few bits; no weight changes.

    Hooper et al., KVQuant, arXiv 2401.18079, section 2: calibrating ahead spares the engine from looking for the range
    of every new token. The scale is the largest magnitude of a layer's keys (after rotary embedding) or values over the
    calibration text, divided by the largest number of the grid: 448 of FP8 (E4M3), 7.5 of 4-bit integers.

    Written as compressed-tensors `kv_cache_scheme`, with `k_scale` and `v_scale` beside the weights; the last step of a
    recipe, after any that packs weights. Engines turn it on (vLLM: 8 bits, `kv_cache_dtype=fp8`); in infopt the
    recipe's `cache.dtype` does, and what this step makes runs as before.

    bits    8 (default): FP8, which vLLM reads. 4: integers, for engines to come.
    scales  tensor (default): one for all heads of a layer, which every engine reads. head: one per key/value head, closer,
            above all at 4 bits.

    Plain transformers rounds keys and values as the file says, with a cache or without; infopt does not. The artifact's
    check of the weights leaves that rounding out, and says beside it what it does to the logits.
    """

    Options = KvCacheOptions
    needs = Needs(modules=("compressed_tensors",), calibration=True)
    reopens_always = True
    is_record: ClassVar = True
    walks = True
    options: KvCacheOptions

    def check(self, shapes: Shapes, path: str) -> None:
        fitting = ("auto", DTYPES[self.options.bits])
        if self.cache_dtype not in fitting:
            raise RecipeError(
                "cache.dtype", f"found {self.cache_dtype}, with {path}.bits {self.options.bits}; allowed: {' or '.join(fitting)}"
            )

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.calibrate import blocks, calls
        from infopt.layers import packing
        from infopt.layers.kv_ranges import attention_of

        if getattr(bundle.model, "hf_quantizer", None) is not None or bundle.adapter:
            raise InputError("this quantization's file format has no place for KV scales", hint="a step such as rtn, gptq or fp8")
        is_read_back = getattr(bundle.model.config, "num_key_value_heads", None) is not None
        has_experts = any(".experts." in name for name, _ in bundle.model.named_parameters())
        if not is_read_back or has_experts or None in map(attention_of, calls.decoder_blocks(bundle.model)[1]):
            raise InputError(
                f"{type(bundle.model).__name__}: KV scales need num_key_value_heads in its config, one attention with a k_proj "
                "in every block, and no experts",
                hint=f"families that work: {FAMILIES}",
            )
        for attention, scales in blocks.walk(bundle, context, (), self._see).items():
            for name, scale in scales.items():
                bundle.model.get_submodule(attention).register_buffer(name, scale.to(bundle.device))
        per = "tensor" if self.options.scales == "tensor" else "attn_head"
        return replace(bundle, save_config=packing.with_kv_cache(bundle.save_config, self.options.bits, per))

    def _see(self, block: Block) -> None:
        """Runs the block's calibration inputs, and leaves the scales with what it packs, so that `--resume` finds them."""
        from infopt.layers.kv_ranges import Ranges, attention_of

        seen = Ranges()
        for x in block.inputs:
            block.call(x, past_key_values=seen)
        scales = {name: (size / LARGEST[self.options.bits]).clamp(min=2.0**-24).cpu() for name, size in seen.largest.items()}
        block.packed[f"{block.name}.{attention_of(block.module)}"] = {
            name: scale.amax().reshape(1) if self.options.scales == "tensor" else scale.view(-1, 1, 1)
            for name, scale in scales.items()
        }

    def reopen(self, bundle: Bundle) -> Bundle:
        from infopt.layers.kv_ranges import leave_cache_alone

        leave_cache_alone(bundle.model)
        return bundle

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        scales = 2 * shapes.layers * (1 if self.options.scales == "tensor" else shapes.kv_heads)
        rate = machine.read_bytes_per_s
        seconds = before.weights_bytes / rate if rate else None
        after = replace(before, weights_bytes=before.weights_bytes + 4 * scales, seconds=seconds)
        return passes.add(after, before, shapes, self.calibration_tokens, machine, passes=2, hessians=False)


TECHNIQUE = KvCache
