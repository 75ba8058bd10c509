"""Every kernel of the Triton backend compiled for GPUs that this machine need not have: registers, spills, memory."""

from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import aot  # noqa: E402
import torch  # noqa: E402

from aar_kernels import dispatch  # noqa: E402
from aar_kernels.attention import triton as backend  # noqa: E402
from aar_kernels.attention import triton_kernels as kernels  # noqa: E402

FLOAT, STRIDES = "*fp32", ("i32",) * 3
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
NAMES = ("forward", "query_grad", "key_grad", "step", "norm", "combine")


def compile_one(name: str, capability: int, dim: int, dtype: str, *, cosine: bool = True) -> aot.Resources:
    """Kernel ``name``, with the pinned block sizes. The step splits its keys, as one that does not needs no more."""
    kernel = getattr(kernels, f"{name}_kernel")
    element = f"*{dtype}"
    types = dict.fromkeys(("out", "q", "k", "v", "x", "grad", "dq", "dk", "dv", "cache_k", "cache_v"), element)
    types |= dict.fromkeys(("lse", "norms", "deltas", "parts"), FLOAT) | {"ends": "*i32", "starts": "*i32"}
    if name == "step":
        types["out"] = FLOAT
    if cosine:
        types |= dict.fromkeys(("head_log_scale", "k_norms", "q_norms", "d_scale"), FLOAT)
    if dtype == "fp32":
        types["balances"] = FLOAT
    types |= {argument: STRIDES for argument in kernel.arg_names if argument.endswith("strides")}
    types["softmax_scale"] = "fp32"
    rows = "rows" if name in ("norm", "combine") else name
    constants = {"D": dim} | kernels.config(rows, capability // 10, dim, SIZES[dtype])
    return aot.resources(aot.compile_kernel(kernel, types, constants, capability))


# Compiling takes seconds per kernel, so that not everything is tested everywhere; `main` records all of it.
TESTED = [
    *((name, capability, 64, "bf16") for capability in (80, 90) for name in NAMES),
    *((name, capability, 128, "bf16") for capability in (80, 90) for name in NAMES[:4]),
    *((name, 90, 64, "fp32") for name in NAMES[:4]),
    ("forward", 90, 96, "fp16"),
    ("forward", 100, 64, "bf16"),
]


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize(("name", "capability", "dim", "dtype"), TESTED)
def test_resources(name: str, capability: int, dim: int, dtype: str):
    used = compile_one(name, capability, dim, dtype)
    assert used.spills == 0, used
    assert used.shared <= aot.SHARED_MEMORY[capability], used


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize("name", NAMES[:4])
def test_plain_attention(name: str):
    used = compile_one(name, 90, 64, "bf16", cosine=False)
    assert used.spills == 0, used


def test_what_it_refuses():
    def reason(**problem) -> str | None:
        usual = {"operator": "attention_forward", "device": "cuda", "dtype": torch.bfloat16, "dim": 64}
        return backend.unsupported(dispatch.Problem(**usual | problem))

    assert reason() is None
    assert reason(deterministic=True, needs_grad=True) is None
    assert "float32, bfloat16 or float16 only" in reason(dtype=torch.float64)
    assert "head_dim 32 to 128 only" in reason(dim=16)
    assert "head_dim 32 to 128 only" in reason(dim=129)
    if not triton.knobs.runtime.interpret:
        assert "set TRITON_INTERPRET=1" in reason(device="cpu")


def main() -> None:
    """``PYTHONPATH=.:tests python tests/attention/test_attention_triton_aot.py``: compile everything and record it."""
    figures = {
        f"sm_{capability}, head_dim {dim}, {dtype}": {
            name: compile_one(name, capability, dim, dtype) for name in NAMES
        }
        for capability in aot.SHARED_MEMORY
        for dtype in ("bf16", "fp32")
        for dim in (64, 128)
    }
    aot.record(Path(__file__).parents[2] / "benchmarks" / "results" / "triton_aot.json", "attention", figures)


if __name__ == "__main__":
    main()
