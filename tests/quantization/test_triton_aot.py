"""Every kernel of the Triton backend compiled for GPUs that this machine need not have: registers, spills,
memory."""

from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import aot  # noqa: E402
import torch  # noqa: E402

from aar_kernels import dispatch  # noqa: E402
from aar_kernels._triton import ASSERTING  # noqa: E402
from aar_kernels.quantization import triton as backend  # noqa: E402
from aar_kernels.quantization import triton_grids_kernels as grids  # noqa: E402
from aar_kernels.quantization import triton_kernels as kernels  # noqa: E402
from aar_kernels.quantization import triton_projected_kernels as projected  # noqa: E402

FLOAT, CODE = "*fp32", "*i64"
LAYOUT = {"layout": "*i32"}
DECODE = {"out": FLOAT, "codes": CODE, "table": FLOAT, "bias": FLOAT} | LAYOUT
RESIDUAL = (
    dict.fromkeys(("x", "residual", "rows", "book", "norms", "table", "bias"), FLOAT)
    | {"codes": CODE}
    | LAYOUT
)
TRAINING = {"mask": "*i1"} | dict.fromkeys(("quantized", "residual_sum", "residuals", "loss"), FLOAT)
EUCLIDEAN = {"COSINE": False, "PER_SCALE": False, "KEEP_ROWS": False}
TRAIN = {"COSINE": False, "PER_SCALE": True, "KEEP_ROWS": True}


def cases(capability: int, dim: int) -> dict[str, tuple]:
    """Name -> kernel, types of its run-time pointers, constants."""
    phi, plain = {"D": dim, "TAPS": 9}, {"D": dim, "TAPS": 1}
    search, rows = kernels.search_blocks(capability // 10, dim), kernels.row_blocks(dim)
    return {
        "encode": (kernels.residual_kernel, RESIDUAL, phi | EUCLIDEAN | search),
        "encode, cosine": (kernels.residual_kernel, RESIDUAL, phi | EUCLIDEAN | search | {"COSINE": True}),
        "encode, no phi": (kernels.residual_kernel, RESIDUAL | {"bias": None}, plain | EUCLIDEAN | search),
        "quantize": (kernels.residual_kernel, RESIDUAL | TRAINING, phi | TRAIN | search),
        "decode": (kernels.decode_kernel, DECODE, phi | {"KEEP_SCALES": False} | rows | ASSERTING),
        "decode_scales": (kernels.decode_kernel, DECODE, phi | {"KEEP_SCALES": True} | rows | ASSERTING),
        "step": (
            kernels.step_kernel,
            DECODE | {"base": FLOAT, "pooled": FLOAT},
            phi | kernels.step_blocks(dim, 75, 66) | ASSERTING,
        ),
        "last step": (
            kernels.step_kernel, DECODE | {"base": FLOAT}, phi | kernels.step_blocks(dim, 75, 75) | ASSERTING,
        ),
        "pool": (kernels.pool_kernel, {"out": FLOAT, "sequences": FLOAT} | LAYOUT, {"D": dim} | rows),
        "table": (
            kernels.table_kernel,
            {"out": FLOAT, "codebooks": FLOAT, "kernels": FLOAT, "pairs": "*i32"},
            phi | kernels.TABLE,
        ),
        "phi gradient": (
            kernels.phi_grad_kernel,
            {"out": FLOAT, "residuals": FLOAT, "codes": CODE, "codebooks": FLOAT} | LAYOUT,
            phi | kernels.PHI_GRAD,
        ),
    }


PROJECTED = dict.fromkeys(("projected", "rows", "book", "norms", "table"), FLOAT) | {"codes": CODE, "sound": "*i1"}


def projected_cases(dim: int) -> dict[str, tuple]:
    """The kernels of factorised quantizers, as `cases`."""
    sizes = {"D": dim, "COSINE": True}
    return {
        "project": (
            projected.project_kernel,
            dict.fromkeys(("out", "x", "weight", "bias"), FLOAT) | {"channels": "i32"},
            projected.PROJECT,
        ),
        "levels": (projected.levels_kernel, PROJECTED | LAYOUT, sizes | projected.search_blocks(dim)),
        "levels, euclidean": (
            projected.levels_kernel, PROJECTED | LAYOUT, sizes | projected.search_blocks(dim) | {"COSINE": False},
        ),
        "decode": (
            projected.decode_kernel,
            dict.fromkeys(("out", "book", "weight", "bias"), FLOAT) | {"codes": CODE, "channels": "i32"} | LAYOUT,
            {"D": dim} | projected.decode_blocks(dim) | ASSERTING,
        ),
    }


def grid_cases(dim: int) -> dict[str, tuple]:
    """The kernels of quantizers of grids, as `cases`."""
    sizes, cells, base = {"D": dim}, grids.cell_blocks(dim), {"base": FLOAT}
    search = sizes | grids.SEARCH | {"BLOCK_D": cells["BLOCK_D"], "COSINE": False}
    up, phi = sizes | cells | ASSERTING | {"SIGN": 1.0}, sizes | grids.PHI | {"SIDE": 3, "SIGN": -1.0}
    searched = dict.fromkeys(("rows", "book", "norms"), FLOAT) | {"keys": CODE, "sound": "*i1"}
    tokens = {"out": FLOAT, "rows": FLOAT, "codes": CODE}
    products = dict.fromkeys(("out", "images", "weight", "bias"), FLOAT)
    return {
        "pool": (grids.pool_kernel, {"out": FLOAT, "images": FLOAT}, sizes | cells),
        "search": (grids.search_kernel, searched, search),
        "search, cosine": (grids.search_kernel, searched, search | {"COSINE": True}),
        "up": (grids.up_kernel, tokens, up),
        "up of rows": (grids.up_kernel, tokens | {"codes": None}, up),
        "up, no phi": (grids.up_kernel, tokens | base, up | {"SIGN": -1.0}),
        "phi": (grids.phi_kernel, products | base, phi),
        "phi of the first scale": (grids.phi_kernel, products, phi | {"SIGN": 1.0}),
    }


HOT = ("encode", "quantize", "decode", "phi gradient")
# Bytes of a thread that older Tritons hold in memory; of the newest that was tried, nothing.
SPILLS = {"quantize": 16} if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else {}
# Compiling takes seconds per kernel, so that not everything is tested everywhere; `main` records all of it.
TESTED = {(80, 64): None, (90, 64): None, (80, 128): HOT, (90, 128): HOT, (100, 64): HOT[:1]}


def measure(capability: int, dim: int, names: tuple[str, ...] | None = None) -> dict[str, aot.Resources]:
    return compiled(cases(capability, dim), capability, names)


def compiled(kernels: dict[str, tuple], capability: int, names: tuple[str, ...] | None = None):
    return {
        name: aot.resources(aot.compile_kernel(kernel, types, constants, capability))
        for name, (kernel, types, constants) in kernels.items()
        if names is None or name in names
    }


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize(("capability", "dim"), TESTED)
def test_resources(capability: int, dim: int):
    for name, used in measure(capability, dim, TESTED[capability, dim]).items():
        assert used.spills <= SPILLS.get(name, 0), (name, used)
        assert used.shared <= aot.SHARED_MEMORY[capability], (name, used)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize(("capability", "dim"), [(80, 8), (90, 8), (90, 64)])
def test_resources_of_factorised_quantizers(capability: int, dim: int):
    for name, used in compiled(projected_cases(dim), capability).items():
        assert used.spills == 0, (name, used)
        assert used.registers * 32 * used.warps <= 65536 // 2, (name, used)  # two programs at least on a processor
        assert used.shared <= aot.SHARED_MEMORY[capability] // 2, (name, used)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
def test_resources_of_grids(capability: int):
    for name, used in compiled(grid_cases(32), capability).items():
        assert used.spills == 0, (name, used)
        assert used.registers * 32 * used.warps <= 65536 // 2, (name, used)  # two programs at least on a processor
        assert used.shared <= aot.SHARED_MEMORY[capability] // 2, (name, used)


def test_what_it_refuses():
    def reason(**problem) -> str | None:
        usual = {"operator": "msrq_decode", "device": "cuda", "dtype": torch.float32}
        return backend.unsupported(dispatch.Problem(**usual | problem))

    assert reason() is None
    assert reason(deterministic=True) is None
    assert "float32 codebooks only" in reason(dtype=torch.float64)
    assert "not differentiable" in reason(needs_grad=True)
    assert reason(needs=("grids", "rows in place of codes")) is None
    assert reason(needs=("rows in place of codes",)).startswith("rows in place of codes of sequences run on")
    if not triton.knobs.runtime.interpret:
        assert "set TRITON_INTERPRET=1" in reason(device="cpu")


def main() -> None:
    """``PYTHONPATH=.:tests python tests/quantization/test_triton_aot.py``: compile everything and record the
    figures."""
    figures = {
        f"sm_{capability}, latent {dim}": measure(capability, dim)
        for capability in aot.SHARED_MEMORY
        for dim in (64, 128)
    } | {
        f"sm_{capability}, factorised, {dim} channels": compiled(projected_cases(dim), capability)
        for capability in aot.SHARED_MEMORY
        for dim in (8, 64)
    } | {
        f"sm_{capability}, grids, latent {dim}": compiled(grid_cases(dim), capability)
        for capability in aot.SHARED_MEMORY
        for dim in (32, 64)
    }
    aot.record(Path(__file__).parents[2] / "benchmarks" / "results" / "triton_aot.json", "quantization", figures)


if __name__ == "__main__":
    main()
