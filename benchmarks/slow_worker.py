"""A worker whose model takes a tenth longer per step: the known slowdown that `honesty.py` must see judged.

Every forward pass is followed by spinning for 10 % of the time since the end of the one before, so that a whole step, and
not only its forward pass, becomes 10 % longer.
"""

from __future__ import annotations

import time
from typing import Any

from infopt import worker
from infopt.engines.transformers import TransformersEngine

SHARE = 0.10


def slow_down(model: Any) -> None:
    last = [0.0]

    def spin(*arguments: Any) -> None:
        now = time.perf_counter()
        # The pause between two requests is not a step.
        until = now + SHARE * min(now - last[0], 0.5)
        while time.perf_counter() < until:
            pass
        last[0] = time.perf_counter()

    model.register_forward_hook(spin)


class SlowEngine(TransformersEngine):
    def __init__(self, model: Any, **settings: Any) -> None:
        slow_down(model)
        super().__init__(model, **settings)


if __name__ == "__main__":
    from infopt.engines import transformers

    transformers.ENGINE = SlowEngine
    worker.main()
