"""Libraries without their log lines and progress bars, for as long as a block runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TALKATIVE = ("bitsandbytes", "compressed_tensors", "torchao", "torch.utils._pytree")


@contextmanager
def quiet() -> Iterator[None]:
    """What their logs would say about a load, `load` checks and raises instead."""
    import tqdm
    from transformers import utils

    own: Any = utils.logging
    level, bars = own.get_verbosity(), own.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    bar: Any = tqdm.std.tqdm
    make = bar.__init__
    own.set_verbosity_error()
    own.disable_progress_bar()
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)

    def silent(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named | {"disable": True})

    bar.__init__ = silent
    try:
        yield
    finally:
        bar.__init__ = make
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        own.set_verbosity(level)
        if bars:
            own.enable_progress_bar()
