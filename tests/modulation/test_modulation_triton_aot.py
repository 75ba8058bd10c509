"""Every kernel of the Triton backend compiled for GPUs that this machine need not have: registers, spills, memory."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

import aot  # noqa: E402
import torch  # noqa: E402

from aar_kernels import dispatch  # noqa: E402
from aar_kernels.modulation import triton as backend  # noqa: E402
from aar_kernels.modulation import triton_kernels as kernels  # noqa: E402


def cases(channels: int, dtype: str) -> dict[str, tuple]:
    """Name -> kernel, types of its run-time arguments, constants. Rows in ``dtype``, conditions in fp32."""
    row = {"C": channels} | kernels.row_block(channels)
    plain = dict.fromkeys(("x", "modulated"), dtype) | dict.fromkeys(("scale", "shift", "statistics"), "*fp32")
    plain |= {"eps": "fp32"}
    gated = plain | {"y": dtype, "x_new": dtype, "gate": "*fp32"}
    grads = dict.fromkeys(("grad_modulated", "x", "grad_x"), dtype)
    grads |= dict.fromkeys(("scale", "statistics", "partial"), "*fp32")
    gated_grads = grads | dict.fromkeys(("grad_x_new", "y", "grad_y"), dtype) | {"gate": "*fp32"}
    rows = row | {"ROWS": kernels.BLOCK_ROWS}
    reduce = {"C": channels} | kernels.REDUCE
    return {
        "layer_norm_modulate": (kernels.forward_kernel, plain, row),
        "gated_residual_modulate": (kernels.forward_kernel, gated, row),
        "gradient of layer_norm_modulate": (kernels.backward_kernel, grads, rows),
        "gradient of gated_residual_modulate": (kernels.backward_kernel, gated_grads, rows),
        "reduction": (kernels.reduce_kernel, {"partial": "*fp32", "sums": "*fp32"}, reduce),
    }


def measure(capability: int, channels: int, dtype: str) -> dict[str, aot.Resources]:
    return {
        name: aot.resources(aot.compile_kernel(kernel, types, constants, capability))
        for name, (kernel, types, constants) in cases(channels, dtype).items()
    }


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize(
    ("capability", "channels", "dtype"),
    [(80, 1024, "*fp32"), (90, 1024, "*bf16"), (90, 1152, "*fp16"), (90, 2048, "*fp32")],
)
def test_resources(capability: int, channels: int, dtype: str):
    for name, used in measure(capability, channels, dtype).items():
        assert used.spills == 0, (name, used)
        assert used.shared <= 16 << 10, (name, used)
        assert used.registers <= 128, (name, used)  # so that a multiprocessor holds 16 warps or more


def test_what_it_refuses():
    def reason(**problem) -> str | None:
        usual = {"operator": "modulation_forward", "device": "cuda", "dtype": torch.bfloat16, "dim": 1024}
        return backend.unsupported(dispatch.Problem(**usual | problem))

    assert reason() is None
    assert reason(needs_grad=True, deterministic=True) is None
    assert "x must be fp32, bf16 or fp16" in reason(dtype=torch.float64)
    assert "up to 16384 channels" in reason(dim=20000)
    if not triton.knobs.runtime.interpret:
        assert "set TRITON_INTERPRET=1" in reason(device="cpu")
