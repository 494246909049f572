"""Low-rank adapters over 4-bit weights: they learn what NormalFloat rounding lost."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from infopt.errors import RecipeError
from infopt.layers import grid, passes
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import Modules, Needs, Options, Technique
from infopt.techniques.nf4 import check_cpu_kernel, stored_bytes

if TYPE_CHECKING:
    import torch

    from infopt.layers.student_linear import StudentLinear
    from infopt.model.bundle import Bundle

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
    keep: Literal["beside", "merged"] = "beside"
    double_quant: bool = True
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    ignore: Modules = ("lm_head",)


class Qlora(Technique):
    """Trains LoRA adapters over frozen NF4 weights to say what the unquantized model says.

    QLoRA (Dettmers et al., arXiv 2305.14314): W ≈ NF4(W) + B·A with B [out, rank] and A [rank, in], of which only B and A
    are trained; here against the model's own logits on the calibration text (KL divergence). From `svd`, B·A starts as
    the best approximation of W − NF4(W) of its rank (LoftQ, arXiv 2310.08659, algorithm 1 with one iteration), which
    wants no text.

    Beside: the artifact holds NF4(W) as `nf4` stores it and the adapter as peft does, in one folder, which transformers
    opens as it is **where peft is installed; without peft it takes the 4-bit weights alone**. Merged: NF4(W) + B·A
    multiplied out in the model's dtype, **as many bytes as before**, since the sum is on no 4-bit grid; any engine runs
    it, and a later step may round it again.

    rank           of the adapters, ≥ 1, default 16.
    init           svd (default), or zero: B is 0 and the model starts as NF4(W).
    epochs         times that training goes over the calibration text, ≥ 0, default 1. 0 with svd: no training at all.
    learning_rate  of AdamW at its highest; rises over the first 5 % of the steps, then falls linearly to zero. Default 0.0005.
    batch          calibration windows a step, ≥ 1, default 1.
    keep           the adapters beside the 4-bit weights (default), or merged into them.
    double_quant   NF4's scales quantized to 8 bits in blocks of 256, default true.
    compute_dtype  what a layer and its adapter multiply in, and adapters are stored in, when kept beside: bfloat16
                   (default), float16, float32.
    ignore         modules left alone, as globs or last parts; default [lm_head].
    """

    Options = QloraOptions
    needs = Needs(modules=("accelerate", "bitsandbytes", "peft"), calibration=True)
    neutral: ClassVar = {"ignore": ["*"]}
    options: QloraOptions

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.packs = self.options.keep == "beside"
        self.arithmetic = self.options.compute_dtype if self.packs else None

    def check(self, shapes: Shapes, path: str) -> None:
        grid.check_ignore(shapes, self.options.ignore, path)
        layers = grid.chosen(shapes, self.options.ignore)
        if self.device == "cpu" and self.packs:
            check_cpu_kernel(layers, path)
        smallest = min((min(shape) for shape in layers.values()), default=self.options.rank)
        if self.options.rank > smallest:
            raise RecipeError(f"{path}.rank", f"found {self.options.rank}; allowed: 1 … {smallest}, the smallest layer's side")

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.distil.self_teaching import Course, teach_itself
        from infopt.layers import normal_float, packing
        from infopt.layers.student_linear import StudentLinear, teaching

        o = self.options
        students: dict[str, StudentLinear] = {}
        for name, layer in packing.linears(bundle, o.ignore).items():
            students[name] = StudentLinear(layer, normal_float.rounded(layer.weight.data, o.double_quant))
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
            teach_itself(adapted, trained, teacher, Course(o.epochs, o.batch, o.learning_rate), context, "qlora")
        if o.keep == "beside":
            return self._beside(bundle, adapted, students)
        model = adapted.merge_and_unload(safe_merge=True)
        for name, student in students.items():
            model.set_submodule(name, student.plain(student.weight.detach()))
        return replace(bundle, model=model)

    def _adapt(self, model: Any, students: dict[str, StudentLinear], seed: int) -> Any:
        """The model with adapters around `students`, as `init` says; random numbers come from the seed alone."""
        import peft
        import torch

        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for something under its old name
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(model, self._config(students))
        if self.options.init == "svd":
            for name, student in students.items():
                layer = model.get_submodule(name)  # peft's, around the student
                low_rank = nearest_of_rank(student.original.float() - student.weight.detach().float(), self.options.rank)
                for part, value in zip((layer.lora_B, layer.lora_A), low_rank, strict=True):
                    part["default"].weight.data.copy_(value)
        return adapted

    def _beside(self, bundle: Bundle, adapted: Any, students: dict[str, StudentLinear]) -> Bundle:
        """The model in the layers that a reader of the artifact will run it in, and what is stored of it."""
        import peft
        import torch

        from infopt.layers import normal_float, packing

        o = self.options
        dtype = getattr(torch, o.compute_dtype)
        adapter = {}
        for name in students:
            layer = adapted.get_base_model().get_submodule(name)
            for part in ("lora_A", "lora_B"):
                adapter[f"{name}.{part}"] = getattr(layer, part)["default"].weight.detach().to(dtype)
        config, model, packed = self._config(students, inference_mode=True), adapted.unload(), {}
        for name in list(students):
            student = students.pop(name)
            packed[name], quantized = normal_float.pack(student.plain(student.original), o.double_quant, dtype)
            model.set_submodule(name, quantized)
        ignored = packing.left_alone(model, packed)
        with torch.random.fork_rng():  # the adapters start random, and are overwritten
            model.is_loaded_in_4bit = True  # peft then takes the layer that a reader's will take
            peft.inject_adapter_in_model(config, model)
            del model.is_loaded_in_4bit
        for name in packed:
            for part in ("lora_A", "lora_B"):
                getattr(model.get_submodule(name), part)["default"].weight.data = adapter[f"{name}.{part}"]
        described = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        return replace(
            bundle,
            model=model.requires_grad_(False).eval(),
            packed=packed,
            save_config=normal_float.config(o.double_quant, o.compute_dtype, ignored),
            adapter={f"base_model.model.{name}.weight": tensor for name, tensor in adapter.items()},
            files={**bundle.files, "adapter_config.json": json.dumps(described, indent=2, sort_keys=True) + "\n"},
        )

    def _config(self, names: Iterable[str], **options: Any) -> Any:
        """peft's description of the adapters: α/r = 1, so that what is added is B·A."""
        import peft

        rank = self.options.rank
        return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(names), task_type="CAUSAL_LM", **options)

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        """Kept beside: `nf4` and the adapters. Merged: as before. The model is there twice while it is trained."""
        layers = grid.chosen(shapes, self.options.ignore)
        held = sum(out * inner for out, inner in layers.values()) * before.weights_bytes // shapes.parameters
        held += sum(out + inner for out, inner in layers.values()) * self.options.rank * 16  # with gradient and two moments
        rate = machine.read_bytes_per_s
        largest = max((out * inner for out, inner in layers.values()), default=0)
        step = Prediction(
            weights_bytes=before.weights_bytes if self.options.keep == "merged" else self._stored_bytes(layers, shapes, before),
            peak_bytes=max(before.peak_bytes, before.weights_bytes + held + grid.HELD_BYTES * largest),
            seconds=sum(out * inner for out, inner in layers.values()) * TRAFFIC_BYTES / rate if rate else None,
        )
        tokens = self.options.epochs * self.calibration_tokens
        # Training multiplies in bfloat16 where that is faster, whatever the model's dtype.
        fastest = replace(machine, flops=dict.fromkeys(machine.flops, max(machine.flops.values(), default=0.0)))
        return passes.add(step, before, shapes, tokens, fastest, passes=PASSES, hessians=False)

    def _stored_bytes(self, layers: Mapping[str, tuple[int, int]], shapes: Shapes, before: Prediction) -> int:
        element = 4 if self.options.compute_dtype == "float32" else 2
        adapters = sum(out + inner for out, inner in layers.values()) * self.options.rank * element
        return stored_bytes(layers.values(), shapes, before, self.options.double_quant) + adapters


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
