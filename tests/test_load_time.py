"""`load_s` times the reading of weights, not the importing of libraries."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from infopt import arms, pipeline, worker
from infopt.protocols import Machine
from infopt.settings import LoadOptions, WorkloadSpec

class Opened(Exception): pass

def opened(*arguments):
    for name in ("transformers.models.llama.modeling_llama", "compressed_tensors"):
        assert name in sys.modules, f"{name} would be imported while the clock runs"
    raise Opened

pipeline.open_arm = opened
spec = arms.spec("tiny", "rtn_int8")
try:
    worker.OpenArm(spec, LoadOptions(device="cpu"), WorkloadSpec(), Machine("cpu", None), lambda *a, **k: None)
except Opened:
    print("opened last")
"""


def test_libraries_are_imported_before_the_clock_starts() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.strip() == "opened last", done.stderr
