"""What running calibration text through a model's blocks costs, as arithmetic. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from infopt.protocols import Machine, Prediction, Shapes

#: Attention, norms and rotary angles beside the linear layers' products, as a share of their time; measured.
BESIDE = 0.6
#: The upper half of a Hessian, in blocks, over all of it.
HALF = 0.6

#: Seconds until a process in an environment of its own has imported its libraries and opened a model; measured.
START_S = 5.0


def elsewhere(step: Prediction, before: Prediction) -> Prediction:
    """`step` done by another process, which opens the model too."""
    seconds = None if step.seconds is None else step.seconds + START_S
    return replace(step, peak_bytes=step.peak_bytes + before.weights_bytes, seconds=seconds)


def add(
    step: Prediction,
    before: Prediction,
    shapes: Shapes,
    tokens: int,
    machine: Machine,
    *,
    passes: float = 1.0,
    hessians: bool = True,
) -> Prediction:
    """`step` with the seconds and memory of `tokens` of text going `passes` times through every block of the model `before`.

    `hessians`: also X·Xᵀ of each different input. Memory is the hidden states between blocks and one batch inside one.
    """
    element = 2 if before.weights_bytes < 3 * shapes.parameters else 4
    flops = 2 * tokens * shapes.linear_parameters * passes * (1 + BESIDE)
    if hessians:
        inputs = {(name.rpartition(".")[0], inner) for name, (_, inner) in shapes.linear.items()}
        flops += sum(2 * tokens * inner**2 * HALF for _, inner in inputs)
    rate = machine.flops.get("float32" if element == 4 else "bfloat16")
    seconds = None if rate is None or step.seconds is None else step.seconds + flops / rate
    held = tokens * shapes.hidden * element + (128 << 20) + (1 << 30)
    return replace(step, seconds=seconds, peak_bytes=step.peak_bytes + held)
