"""Quantization-aware training: round in every forward pass, and let training find weights that stand it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from infopt.layers import grid, passes
from infopt.protocols import Context, Machine, Prediction, Shapes
from infopt.techniques.base import GridOptions, GridTechnique, Needs

if TYPE_CHECKING:
    from infopt.model.bundle import Bundle

#: Forward passes that a training step is worth: the teacher's, the student's, its backward pass of two, and as much again
#: for rounding, the optimizer and the logits.
PASSES = 8
#: Bytes per trained weight beside the model: the float32 master, its gradient, two moments of Adam, the teacher's.
HELD_BYTES = 5 * 4


class QatOptions(GridOptions):
    epochs: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=0.0003, gt=0)
    batch: int = Field(default=1, ge=1)


class Qat(GridTechnique):
    """Trains the weights with rounding in the forward pass, to say what the unquantized model says.

    Jacob et al., arXiv 1712.05877, section 3: every pass rounds the weights to the grid, the gradient goes through the
    rounding as if it were not there (straight-through), and a float32 master takes the steps. The loss is the KL
    divergence to the model's own logits from before, on the calibration text (distillation, as in LLM-QAT, arXiv
    2305.17888), so no labels are needed. Meant for 3 bits and below. Needs 20 bytes per trained weight beside the
    model, all of it on one device. The artifact is that of `rtn`. An interrupted run goes on from its last checkpoint.

    bits           2, 3, 4 or 8 per weight, default 4.
    group_size     input features that share a scale, ≥ 8, default 64; must divide every layer's inputs. null: per row.
    symmetric      true (default): q·scale. false: (q − zero)·scale, closer at 3 bits and below.
    epochs         times that training goes over the calibration text, ≥ 1, default 2.
    learning_rate  of AdamW at its highest; rises over the first 5 % of the steps, then falls linearly to zero. Default 0.0003.
    batch          calibration windows a step, ≥ 1, default 1; more are fewer, surer steps for less time.
    scale_dtype    what scales are stored in: auto (the model's dtype, default), float32, bfloat16, float16.
    ignore         modules left alone, as globs or last parts; default [lm_head].
    """

    Options = QatOptions
    needs = Needs(modules=("compressed_tensors",), calibration=True)
    options: QatOptions

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        from infopt.distil.self_teaching import Course, teach_itself
        from infopt.layers import packing
        from infopt.layers.student_linear import StudentLinear, teaching

        rule, o = self._grid, self.options
        students = {
            name: StudentLinear(layer, layer.weight.detach().float().clone(), rule)
            for name, layer in packing.linears(bundle, o.ignore).items()
        }
        if not students:
            return bundle
        for name, student in students.items():
            bundle.model.set_submodule(name, student)
        masters = [student.weight for student in students.values()]
        course = Course(o.epochs, o.batch, o.learning_rate)
        teach_itself(bundle.model, masters, lambda: teaching(students.values()), course, context, "qat")
        packed = {}
        for name in list(students):
            student = students.pop(name)
            master, dtype = student.weight.detach(), student.original.dtype
            packed[name], dense = packing.store(master, packing.fit(master, rule, dtype), rule, dtype)
            bundle.model.set_submodule(name, student.plain(dense))
        return packing.finish(bundle, packed, rule)

    def predict(self, shapes: Shapes, before: Prediction, machine: Machine) -> Prediction:
        layers = grid.chosen(shapes, self.options.ignore)
        rounding = grid.predict(self._grid, layers, shapes, before, machine)
        held = HELD_BYTES * sum(out * inner for out, inner in layers.values())
        rounding = replace(rounding, peak_bytes=max(rounding.peak_bytes, before.weights_bytes + held))
        tokens = self.options.epochs * self.calibration_tokens
        # Training multiplies in bfloat16 where that is faster, whatever the model's dtype.
        fastest = replace(machine, flops=dict.fromkeys(machine.flops, max(machine.flops.values(), default=0.0)))
        return passes.add(rounding, before, shapes, tokens, fastest, passes=PASSES, hessians=False)


TECHNIQUE = Qat
