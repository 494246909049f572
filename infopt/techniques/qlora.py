"""Low-rank adapters over 4-bit weights: they learn what NormalFloat rounding lost."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from infopt.errors import RecipeError
from infopt.layers import grid, passes
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Modules, Needs, Options, Technique

if TYPE_CHECKING:
    import torch

    from infopt.layers.student_linear import StudentLinear
    from infopt.model.bundle import Bundle

#: Weights per scale; what transformers' loader uses.
BLOCK = 64
#: Bytes moved per weight while it is rounded and its error decomposed.
TRAFFIC_BYTES = 400
#: Forward passes that a training step is worth: the teacher's, the student's, its backward pass, and the logits.
PASSES = 5


class QloraOptions(Options):
    rank: int = Field(default=16, ge=1)
    init: Literal["svd", "zero"] = "svd"
    epochs: int = Field(default=1, ge=0)
    learning_rate: float = Field(default=0.0005, gt=0)
    batch: int = Field(default=1, ge=1)
    double_quant: bool = True
    ignore: Modules = ("lm_head",)


class Qlora(Technique):
    """Trains LoRA adapters over frozen NF4 weights to say what the unquantized model says, and merges them.

    QLoRA (Dettmers et al., arXiv 2305.14314): W ≈ NF4(W) + B·A with B [out, rank] and A [rank, in], of which only B and A
    are trained; here against the model's own logits on the calibration text (KL divergence). From `svd`, B·A starts as
    the best approximation of W − NF4(W) of its rank (LoftQ, arXiv 2310.08659, algorithm 1 with one iteration), which
    wants no text.

    The artifact holds NF4(W) + B·A multiplied out, in the model's dtype: **as many bytes as before**, since the sum is on
    no 4-bit grid. It shows what an adapter wins back, and a later step may round it again. `nf4` is what saves bytes.

    rank           of the adapters, ≥ 1, default 16.
    init           svd (default), or zero: B is 0 and the model starts as NF4(W).
    epochs         times that training goes over the calibration text, ≥ 0, default 1. 0 with svd: no training at all.
    learning_rate  of AdamW at its highest; rises over the first 5 % of the steps, then falls linearly to zero. Default 0.0005.
    batch          calibration windows a step, ≥ 1, default 1.
    double_quant   NF4's scales quantized to 8 bits in blocks of 256, default true.
    ignore         modules left alone, as globs or last parts; default [lm_head].
    """

    Options = QloraOptions
    needs = Needs(modules=("bitsandbytes", "peft"), calibration=True)
    neutral: ClassVar = {"ignore": ["*"]}
    options: QloraOptions

    def check(self, shapes: Shapes, path: str) -> None:
        grid.check_ignore(shapes, self.options.ignore, path)
        smallest = min((min(shape) for shape in grid.chosen(shapes, self.options.ignore).values()), default=self.options.rank)
        if self.options.rank > smallest:
            raise RecipeError(f"{path}.rank", f"found {self.options.rank}; allowed: 1 … {smallest}, the smallest layer's side")

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.calibrate.distillation import Schedule, distill
        from infopt.layers import packing
        from infopt.layers.student_linear import StudentLinear, teaching

        o = self.options
        students: dict[str, StudentLinear] = {}
        for name, layer in packing.linears(bundle, o.ignore).items():
            students[name] = StudentLinear(layer, normal_float(layer.weight.data, o.double_quant))
            bundle.model.set_submodule(name, students[name])
        if not students:
            return bundle
        adapted = self._adapt(bundle.model, students, context.seed)

        @contextmanager
        def teacher() -> Iterator[None]:
            with adapted.disable_adapter(), teaching(students.values()):
                yield

        if o.epochs:
            trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
            distill(adapted, trained, teacher, Schedule(o.epochs, o.batch, o.learning_rate), context, "qlora")
        model = adapted.merge_and_unload(safe_merge=True)
        for name, student in students.items():
            model.set_submodule(name, student.plain(student.weight.detach()))
        return replace(bundle, model=model)

    def _adapt(self, model: Any, students: dict[str, StudentLinear], seed: int) -> Any:
        """The model with adapters around `students`, as `init` says; random numbers come from the seed alone."""
        import peft
        import torch

        rank = self.options.rank
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(students), task_type="CAUSAL_LM")  # α/r = 1
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for something under its old name
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(model, config)
        if self.options.init == "svd":
            for name, student in students.items():
                layer = model.get_submodule(name)  # peft's, around the student
                low_rank = nearest_of_rank(student.original.float() - student.weight.detach().float(), rank)
                for part, value in zip((layer.lora_B, layer.lora_A), low_rank, strict=True):
                    part["default"].weight.data.copy_(value)
        return adapted

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        """As many bytes as before; the model is there twice while it is trained."""
        layers = grid.chosen(shapes, self.options.ignore)
        held = sum(out * inner for out, inner in layers.values()) * before.weights_bytes // shapes.parameters
        held += sum(out + inner for out, inner in layers.values()) * self.options.rank * 16  # with gradient and two moments
        rate = machine.read_bytes_per_s
        largest = max((out * inner for out, inner in layers.values()), default=0)
        step = Prediction(
            weights_bytes=before.weights_bytes,
            peak_bytes=max(before.peak_bytes, before.weights_bytes + held + grid.HELD_BYTES * largest),
            seconds=sum(out * inner for out, inner in layers.values()) * TRAFFIC_BYTES / rate if rate else None,
        )
        tokens = self.options.epochs * self.calibration_tokens
        # Training multiplies in bfloat16 where that is faster, whatever the model's dtype.
        fastest = replace(machine, flops=dict.fromkeys(machine.flops, max(machine.flops.values(), default=0.0)))
        return passes.add(step, before, shapes, tokens, fastest, passes=PASSES, hessians=False)


def normal_float(weight: torch.Tensor, double_quant: bool) -> torch.Tensor:
    """`weight` [out, in] rounded to NF4 and back, in its dtype."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that downloads kernels
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4")
    found: torch.Tensor = dequantize_4bit(packed, state)
    return found.to(weight.dtype)


def nearest_of_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B [out, rank], A [rank, in]) with B·A the nearest to `matrix` float32 [out, in] of that rank (Eckart and Young).

    With the singular values shared between both. From the eigenvectors of the smaller of M·Mᵀ and Mᵀ·M, which is many
    times faster than a whole singular value decomposition.
    """
    if matrix.shape[0] < matrix.shape[1]:
        b, a = nearest_of_rank(matrix.T, rank)
        return a.T, b.T
    import torch

    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:].flip(1)
    left = matrix @ vectors  # columns as long as the singular values
    root = left.norm(dim=0).sqrt().clamp_min(1e-20)
    return left / root, (vectors * root).T


TECHNIQUE = Qlora
