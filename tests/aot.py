"""Compile Triton kernels for GPUs that are not there, and read what the compiler made of them."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one program may use, in bytes, by compute capability.
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "debug", "sanitize_overflow")


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes: registers per thread, spilled bytes per thread, bytes of shared
    memory."""

    registers: int
    spills: int
    shared: int
    warps: int


def compile_kernel(
    kernel, pointers: Mapping[str, str | tuple[str, ...] | None], constants: Mapping[str, object], capability: int
):
    """Compile ``kernel`` for sm_``capability``.

    ``pointers`` gives the types of the pointers that are passed, aligned as PyTorch's are, of other numbers, and as
    a tuple those of strides, all divisible by 16; an argument that is neither there nor in ``constants`` is an int32
    if its values are not specialised, else None. ``constants`` also holds the launch options of `OPTIONS`."""
    options = {name: constants[name] for name in OPTIONS if name in constants}
    numbers = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize}
    types, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        types[name] = pointers.get(name) or ("i32" if name in numbers else "constexpr")
        if types[name] == "constexpr":
            values[i,] = constants.get(name)
        elif isinstance(types[name], tuple):
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(len(types[name]))}
        elif types[name][0] == "*":
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled) -> Resources:
    """Read from the cubin by cuobjdump; the stack of a kernel is what it spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = (int(re.search(rf"{field}:(\d+)", report)[1]) for field in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared, compiled.metadata.num_warps)


def record(path: Path, operator: str, figures: Mapping[str, Mapping[str, Resources]]) -> None:
    """Write the resources of an operator's kernels, by target and name, beside the compiler's version. Those of the
    other operators stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(path.read_text()) if path.exists() else {"compiled ahead of time, not run": True}
    plain = {target: {name: asdict(used) for name, used in kernels.items()} for target, kernels in figures.items()}
    report[operator] = {"triton": triton.__version__, "kernels": plain}
    path.write_text(json.dumps(report, indent=1) + "\n")
