"""Every kernel of the Triton backend compiled for GPUs that this machine need not have: registers, spills, memory."""

from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import aot  # noqa: E402
import torch  # noqa: E402

from aar_kernels import dispatch  # noqa: E402
from aar_kernels.seanet import triton as backend  # noqa: E402
from aar_kernels.seanet import triton_kernels as kernels  # noqa: E402

DTYPES = {"fp32": ("*fp32", "*fp32"), "bf16 weights": ("*fp32", "*bf16"), "fp16": ("*fp16", "*fp16")}
# Of the published SAT: taps, channels, columns, stride, ELU, and channels of a shortcut or None.
CONVS = {
    "first": (7, 1, 32, 1, False, None),
    "down 2": (4, 32, 64, 2, True, None),
    "down 4": (8, 64, 128, 4, True, None),
    "down 5": (10, 128, 256, 5, True, None),
    "down 8": (16, 256, 512, 8, True, None),
    "latents": (7, 512, 1024, 1, True, None),
    "from latents": (7, 1024, 512, 1, False, None),
    "up 8": (2, 512, 8 * 256, 1, True, None),
    "up 5": (2, 256, 5 * 128, 1, True, None),
    "up 4": (2, 128, 4 * 64, 1, True, None),
    "up 2": (2, 64, 2 * 32, 1, True, None),
    "last": (7, 32, 1, 1, True, None),
    "residual 256, first": (3, 256, 128, 1, True, None),
    "residual 256, second": (1, 128, 256, 1, True, 256),
    "residual 256, identity": (1, 128, 256, 1, True, 0),
}
RESIDUALS = {  # channels in, hidden, out, and of a shortcut
    "residual 16": (16, 8, 16, 16),
    "residual 32": (32, 16, 32, 32),
    "residual 64": (64, 32, 64, 64),
    "residual 128": (128, 64, 128, 128),
    "residual 128, identity": (128, 64, 128, 0),
}
NORMS = ("moments", "norm")
SNAKES = ("snake",)


def compiled(name: str, dtype: str, capability: int) -> aot.Resources:
    x, weights = DTYPES[dtype]
    if name in CONVS:
        taps, channels, columns, stride, elu, shortcut = CONVS[name]
        types = {"x": x, "weights": weights, "out": x} | ({} if shortcut is None else {"around": x})
        reflect = taps > 2  # shorter ones are transposed, or of one tap
        constants = {"C": channels, "N": columns, "TAPS": taps, "STRIDE": stride, "DILATION": 1, "REFLECT": reflect}
        constants |= {"ELU": elu, "SHORTCUT": shortcut or 0} | kernels.conv_block(taps, channels, columns)
        return aot.resources(aot.compile_kernel(kernels.conv_kernel, types, constants, capability))
    if name in NORMS:
        types, constants = {"x": x, "moments": "*fp32"}, dict(kernels.NORM)
        if name == "norm":
            types |= {"scale": x, "shift": x, "add": x, "eps": "fp32"}
            constants |= {"C": 128, "PARTS": kernels.PARTS}
        kernel = getattr(kernels, f"{name}_kernel")
        return aot.resources(aot.compile_kernel(kernel, types, constants, capability))
    if name in SNAKES:
        types, constants = {"x": x, "alpha": weights, "out": x}, {"C": 96, **kernels.SNAKE}
        return aot.resources(aot.compile_kernel(kernels.snake_kernel, types, constants, capability))
    channels, hidden, outputs, shortcut = RESIDUALS[name]
    types = {"x": x, "first": weights, "second": weights, "out": x}
    constants = {"C": channels, "H": hidden, "N": outputs, "TAPS": 3, "DILATION": 1, "REFLECT": True}
    constants |= {"SHORTCUT": shortcut} | kernels.residual_block(hidden, outputs)
    return aot.resources(aot.compile_kernel(kernels.residual_kernel, types, constants, capability))


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize(
    ("name", "dtype", "capability"),
    [
        ("down 4", "fp32", 80), ("latents", "fp16", 90), ("last", "bf16 weights", 80), ("residual 64", "fp32", 100),
        ("residual 128", "bf16 weights", 90), ("residual 256, second", "fp32", 90), ("residual 128", "fp16", 100),
        ("moments", "fp32", 80), ("norm", "fp32", 90), ("snake", "bf16 weights", 90),
    ],
)  # fmt: skip
def test_resources(name, dtype, capability):
    used = compiled(name, dtype, capability)
    assert used.spills == 0, used
    assert used.shared <= 48 << 10, used  # so that a multiprocessor holds three programs or more


def test_what_it_refuses():
    def reason(**problem) -> str | None:
        usual = {"operator": "seanet_stack", "device": "cuda", "dtype": torch.float32}
        return backend.unsupported(dispatch.Problem(**usual | problem))

    assert reason() is None
    assert reason(dtype=torch.float16) is None
    assert "fp32 or fp16" in reason(dtype=torch.float64)
    if not triton.knobs.runtime.interpret:
        assert "set TRITON_INTERPRET=1" in reason(device="cpu")


def main() -> None:
    """``PYTHONPATH=.:tests python tests/seanet/test_seanet_triton_aot.py``: compile everything and record it."""
    figures = {
        f"sm_{capability}, {dtype}": {
            name: compiled(name, dtype, capability) for name in (*CONVS, *RESIDUALS, *NORMS, *SNAKES)
        }
        for capability in aot.SHARED_MEMORY
        for dtype in DTYPES
    }
    aot.record(Path(__file__).parents[2] / "benchmarks" / "results" / "triton_aot.json", "seanet", figures)


if __name__ == "__main__":
    main()
