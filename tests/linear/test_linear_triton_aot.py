"""The kernel compiled for GPUs that this machine need not have: registers, spills, memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import aot  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402

from aar_kernels import dispatch  # noqa: E402
from aar_kernels.linear import triton as backend  # noqa: E402
from aar_kernels.linear import triton_kernels as kernels  # noqa: E402

# Name -> pointers to x and to weights, and what is multiplied; uint8 are the bits of fp8.
DTYPES = {
    "bf16 by bf16": ("*bf16", "*bf16", tl.bfloat16),
    "bf16 by int8": ("*bf16", "*i8", tl.bfloat16),
    "bf16 by fp8": ("*bf16", "*u8", tl.bfloat16),
    "fp16 by int8": ("*fp16", "*i8", tl.float16),
    "fp16 by fp8": ("*fp16", "*u8", tl.float16),
    "fp32 by fp32": ("*fp32", "*fp32", tl.float32),
    "fp32 by bf16": ("*fp32", "*bf16", tl.float32),
    "fp32 by int8": ("*fp32", "*i8", tl.float32),
    "fp32 by fp8": ("*fp32", "*u8", tl.float32),
}
ROWS = (16, kernels.FEW_ROWS, kernels.MANY_ROWS, kernels.MANY_ROWS + 1)
# Compiling takes seconds per kernel, so that not everything is tested everywhere; `main` records all of it.
TESTED = [(80, "bf16 by fp8", 16), (90, "bf16 by int8", 512), (90, "bf16 by fp8", 513), (100, "fp32 by bf16", 512)]


def compile_case(capability: int, dtypes: str, rows: int):
    x, weight, dtype = DTYPES[dtypes]
    types = {"x": x, "data": weight, "out": x, "bias": "*fp32", "scale": "*fp32" if weight in ("*i8", "*u8") else None}
    constants = {"N": 1024, "K": 4096, "GELU": True, "DTYPE": dtype} | kernels.options(rows, dtype)
    return aot.compile_kernel(kernels.linear_kernel, types, constants, capability)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize(("capability", "dtypes", "rows"), TESTED)
def test_resources(capability: int, dtypes: str, rows: int):
    compiled = compile_case(capability, dtypes, rows)
    used = aot.resources(compiled)
    assert used.spills == 0, used
    assert used.shared <= aot.SHARED_MEMORY[capability], used
    assert used.registers * 32 * used.warps <= 65536, used
    ptx, blocks = compiled.asm["ptx"], kernels.options(rows, DTYPES[dtypes][2])
    multiplied = math.prod(blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS"))
    if dtypes.startswith("fp32"):
        assert "mma.sync" not in ptx
    elif "wgmma.mma_async" not in ptx:  # no warp multiplies what another does
        assert ptx.count("mma.sync.aligned.m16n8k16") * 16 * 8 * 16 * used.warps == multiplied
    assert "cp.async" in ptx  # weights are fetched ahead


def test_what_it_refuses():
    def reason(**problem) -> str | None:
        usual = {"operator": "linear_forward", "device": "cuda", "dtype": torch.bfloat16}
        return backend.unsupported(dispatch.Problem(**usual | problem))

    assert reason() is None
    assert reason(deterministic=True, needs=("fp8",)) is None
    assert "x must be fp32, bf16 or fp16" in reason(dtype=torch.float64)
    if not triton.knobs.runtime.interpret:
        assert "set TRITON_INTERPRET=1" in reason(device="cpu")


def main() -> None:
    """``PYTHONPATH=.:tests python tests/linear/test_linear_triton_aot.py``: compile everything and record the
    figures."""
    figures = {
        f"sm_{capability}, {dtypes}": {
            f"{rows} rows": aot.resources(compile_case(capability, dtypes, rows)) for rows in ROWS
        }
        for capability in aot.SHARED_MEMORY
        for dtypes in DTYPES
    }
    aot.record(Path(__file__).parents[2] / "benchmarks" / "results" / "triton_aot.json", "linear", figures)


if __name__ == "__main__":
    main()
