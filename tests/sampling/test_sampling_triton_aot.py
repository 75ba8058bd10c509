"""The kernel compiled for GPUs that this machine need not have: registers, spills, memory, and no fused product."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import aot  # noqa: E402
import torch  # noqa: E402

from aar_kernels import dispatch  # noqa: E402
from aar_kernels._triton import ASSERTING  # noqa: E402
from aar_kernels.sampling import triton as backend  # noqa: E402
from aar_kernels.sampling import triton_kernels as kernels  # noqa: E402

SETTINGS = dict.fromkeys(("conditional", "unconditional", "scale"), "fp32") | {"top_p": "fp64", "position": "i64"}
EVERYTHING = {"GREEDY": False, "TOP_K": True, "TOP_P": True}
GREEDY = {"GREEDY": True, "TOP_K": False, "TOP_P": False}
# Compiling takes seconds per kernel, so that not everything is tested everywhere; `main` records all of it.
TESTED = [(80, 1024), (90, 1024), (90, kernels.MAX_VOCABULARY), (100, 1024)]


def compile_case(capability: int, vocabulary: int, flags: dict[str, bool]):
    types = {"codes": "*i64", "logits": "*fp32", "uncond": "*fp32", "seeds": "*i64"} | SETTINGS
    return aot.compile_kernel(kernels.sample_kernel, types, flags | kernels.options(vocabulary) | ASSERTING, capability)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize(("capability", "vocabulary"), TESTED)
def test_resources(capability: int, vocabulary: int):
    compiled = compile_case(capability, vocabulary, EVERYTHING)
    used = aot.resources(compiled)
    assert used.spills == 0, used
    assert used.shared <= aot.SHARED_MEMORY[capability], used
    assert used.registers * 32 * used.warps <= 65536, used
    assert "__assertfail" in compiled.asm["ptx"]  # logits that cannot be sampled
    # Codes are equal on all backends because each product and each sum is rounded, and denormals stay.
    assert "fma" not in compiled.asm["ptx"]
    assert ".ftz" not in compiled.asm["ptx"]
    assert ".approx" not in compiled.asm["ptx"]


def test_what_it_refuses():
    def reason(**problem) -> str | None:
        usual = {"operator": "sampling_sample", "device": "cuda", "dtype": torch.float32, "dim": 1024}
        return backend.unsupported(dispatch.Problem(**usual | problem))

    assert reason() is None
    assert reason(deterministic=True) is None
    assert "at most 16384 codes" in reason(dim=16385)
    if not triton.knobs.runtime.interpret:
        assert "set TRITON_INTERPRET=1" in reason(device="cpu")


def main() -> None:
    """``PYTHONPATH=.:tests python tests/sampling/test_sampling_triton_aot.py``: compile everything and record the
    figures."""
    figures = {
        f"sm_{capability}, {vocabulary} codes": {
            "sample": aot.resources(compile_case(capability, vocabulary, EVERYTHING)),
            "sample, greedy": aot.resources(compile_case(capability, vocabulary, GREEDY)),
        }
        for capability, vocabulary in itertools.product(aot.SHARED_MEMORY, (1024, kernels.MAX_VOCABULARY))
    }
    aot.record(Path(__file__).parents[2] / "benchmarks" / "results" / "triton_aot.json", "sampling", figures)


if __name__ == "__main__":
    main()
