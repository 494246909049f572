"""What a step launches, and what the compiler makes of it, without a GPU.

On tensors of the `meta` device kernels have nothing to compute, but are told sizes, types and constants as on a GPU; here
they are taken down instead of launched. Each can then be compiled for any GPU and its machine code read: registers, spills,
widths of loads.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

from infopt.kernels.gpu import attention, norm, product_kernels

#: Modules that launch kernels, and the names that these have there.
KERNELS: dict[ModuleType, tuple[str, ...]] = {
    product_kernels: ("vector", "slices", "tiles", "join", "spread"),
    attention: ("attend", "gather"),
    norm: ("rms_norm", "largest", "largest_of_blocks"),
}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
ALIGNED = 16
#: Instructions that read or write memory others may write; asking for lines of it does neither.
MEMORY = ("LDG", "LD.", "ST", "RED", "ATOM")


@dataclass(frozen=True)
class Launch:
    """`signature`: Triton's type of each argument; `constants`: values of those that are compiled in; `aligned`: indices of
    pointers and numbers that are known to be multiples of 16."""

    kernel: Any
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class MachineCode:
    """`spills`: bytes of local memory a thread needs; `loads`: how often each width of loads from global memory occurs, bytes;
    `operations`: how often each machine instruction occurs; `loop`: how many of them its longest loop has;
    `before_wait`: those that reach for memory before it waits for other kernels, None where it does not."""

    registers: int
    spills: int
    shared_bytes: int
    loads: dict[int, int]
    operations: Counter[str]
    loop: int
    before_wait: list[str] | None


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **named: self.launches.append(_launch(self.kernel, grid, args, named))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels are taken down in the list that this gives, in order, and nothing is launched."""
    found: list[Launch] = []
    before = {(module, name): getattr(module, name) for module, names in KERNELS.items() for name in names}
    try:
        for (module, name), kernel in before.items():
            setattr(module, name, _Recorder(kernel, found))
        yield found
    finally:
        for (module, name), kernel in before.items():
            setattr(module, name, kernel)


def _launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    warps, stages, _ = named.pop("num_warps", 4), named.pop("num_stages", 3), named.pop("launch_pdl", None)
    given = dict(zip(kernel.arg_names, args, strict=False)) | named
    known = kernel.fn.__annotations__
    signature, constants, aligned = [], [], []
    for index, name in enumerate(kernel.arg_names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature.append((name, f"*{TYPES[value.dtype]}"))
            aligned.append(index)
        elif value is None or "constexpr" in str(known.get(name)) or (isinstance(value, int) and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32"))
            if value % ALIGNED == 0:
                aligned.append(index)
    return Launch(kernel, grid, tuple(signature), tuple(constants), tuple(aligned), warps, stages)


def compiled(launch: Launch, capability: int) -> MachineCode:
    """For GPUs of compute capability `capability`: 90 is Hopper, 80 is A100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(launch.kernel.arg_names)
    source = ASTSource(
        fn=launch.kernel, signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants},
        attrs={(index,): [["tt.divisibility", ALIGNED]] for index in launch.aligned},
    )  # fmt: skip
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read(made.asm["cubin"], int(made.metadata.shared))


def _read(cubin: bytes, shared: int) -> MachineCode:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = {
            flag: subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        }
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told["-res-usage"])}
    lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)(.*)", told["-sass"], re.M)
    names = [name for _, name, _ in lines]
    operations = Counter(names)
    waits = next((place for place, name in enumerate(names) if name.startswith("ACQBULK")), None)
    before = None if waits is None else [name for name in names[:waits] if name.startswith(MEMORY)]
    return MachineCode(
        usage["REG"], usage["STACK"] + usage["LOCAL"], shared, _loads(operations), operations, _longest_loop(lines), before
    )


def _longest_loop(lines: list[tuple[str, str, str]]) -> int:
    """Instructions from where a branch leads back to, up to it; `lines`: address, name, the rest."""
    places = {int(address, 16): place for place, (address, _, _) in enumerate(lines)}
    found = 0
    for place, (_, name, rest) in enumerate(lines):
        to = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        found = max(found, place - places.get(int(to[1], 16), place) + 1 if to else 0)
    return found


def _loads(operations: Counter[str]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for name, count in operations.items():
        if name.startswith(("LDG.", "LDGSTS.")) or name in ("LDG", "LDGSTS"):
            width = re.search(r"\.(U?8|U?16|S8|S16|64|128)\b", name)
            bits = int(width[1].lstrip("US")) if width else 32
            found[bits // 8] += count
    return dict(found)
