"""Every kernel of the Triton backend compiled for GPUs that this machine need not have: registers, spills, memory."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from aar_kernels.quantization import triton_kernels as kernels
from tests import aot

F, I = "*fp32", "*i64"
LAYOUT = {"layout": "*i32"}
DECODE = {"out": F, "codes": I, "table": F, "bias": F} | LAYOUT
RESIDUAL = {name: F for name in ("x", "residual", "rows", "book", "norms", "table", "bias")} | {"codes": I} | LAYOUT
TRAINING = {"mask": "*i1"} | {name: F for name in ("quantized", "residual_sum", "residuals", "loss")}
EUCLIDEAN = {"COSINE": False, "PER_SCALE": False, "KEEP_ROWS": False}
TRAIN = {"COSINE": False, "PER_SCALE": True, "KEEP_ROWS": True}


def cases(capability: int, dim: int) -> dict[str, tuple]:
    """Name -> kernel, types of its run-time pointers, constants."""
    phi, plain, block = {"D": dim, "TAPS": 9}, {"D": dim, "TAPS": 1}, {"BLOCK_D": dim}
    search = kernels.SEARCH[capability // 10] | block
    rows = kernels.row_blocks(dim)
    return {
        "encode": (kernels.residual_kernel, RESIDUAL, phi | EUCLIDEAN | search),
        "encode, cosine": (kernels.residual_kernel, RESIDUAL, phi | EUCLIDEAN | search | {"COSINE": True}),
        "encode, no phi": (kernels.residual_kernel, RESIDUAL | {"bias": None}, plain | EUCLIDEAN | search),
        "quantize": (kernels.residual_kernel, RESIDUAL | TRAINING, phi | TRAIN | search),
        "decode": (kernels.decode_kernel, DECODE, phi | {"KEEP_SCALES": False} | rows),
        "decode_scales": (kernels.decode_kernel, DECODE, phi | {"KEEP_SCALES": True} | rows),
        "step": (kernels.decode_kernel, DECODE | {"base": F}, phi | {"KEEP_SCALES": False} | rows),
        "pool": (kernels.pool_kernel, {"out": F, "sequences": F} | LAYOUT, {"D": dim} | rows),
        "table": (
            kernels.table_kernel,
            {"out": F, "codebooks": F, "kernels": F, "pairs": "*i32"},
            phi | kernels.TABLE,
        ),
        "phi gradient": (
            kernels.phi_grad_kernel,
            {"out": F, "residuals": F, "codes": I, "codebooks": F} | LAYOUT,
            phi | kernels.PHI_GRAD,
        ),
    }


def measure(capability: int, dim: int) -> dict[str, aot.Resources]:
    return {
        name: aot.resources(aot.compile_kernel(kernel, types, constants, capability))
        for name, (kernel, types, constants) in cases(capability, dim).items()
    }


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_resources(capability: int, dim: int):
    for name, used in measure(capability, dim).items():
        assert used.spills == 0, (name, used)
        assert used.shared <= aot.SHARED_MEMORY[capability], (name, used)
