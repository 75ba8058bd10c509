"""The CUDA kernels compiled by nvcc for GPUs that this machine need not have: registers, spills, shared memory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulated
import pytest

from aar_kernels import ScaleSchedule, build

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SOURCES = sorted((build.SOURCES / "cuda").glob("*.cu"))
ARCHITECTURES = {"sm_80": "arch=compute_80,code=sm_80", "sm_90a": "arch=compute_90a,code=sm_90a"}
DEVICES = {"sm_80": emulated.Device(108, 163 << 10, 1), "sm_90a": emulated.Device()}
REGISTERS = 65536  # of a multiprocessor
KERNELS = {
    # name in the object: readable name, threads of a block, blocks of a multiprocessor that it was written for
    "encode_kernelILi32ELi2E": ("encode, latent up to 32", 256, 2),
    "encode_kernelILi64ELi2E": ("encode, latent up to 64", 256, 2),
    "encode_kernelILi128ELi1E": ("encode, latent up to 128", 256, 1),
    "decode_kernelILb0E": ("decode, decode_scales", 256, 4),
    "decode_kernelILb1E": ("next_scale_inputs, step", 256, 3),
}


def compile_for(architecture: str) -> dict[str, dict[str, int]]:
    """Readable name -> what ptxas says of the kernel."""
    figures = {}
    for source in SOURCES:
        command = [NVCC, *build.NVCC_FLAGS, "-gencode", ARCHITECTURES[architecture], "-Xptxas", "-v", "-c", str(source)]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        pattern = (
            r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads\s+ptxas info\s*: Used (\d+) registers"
        )
        for mangled, *numbers in re.findall(pattern, done.stderr):
            names = [name for name in KERNELS if name in mangled]
            assert names, f"{mangled} is not in KERNELS"
            fields = ("stack", "spill_stores", "spill_loads", "registers")
            figures[KERNELS[names[0]][0]] = dict(zip(fields, map(int, numbers), strict=True))
    return figures


def plans(architecture: str) -> dict[str, dict[str, int]]:
    """How the published sizes are laid out there, and how much shared memory a block takes."""
    lengths = list(ScaleSchedule.quadratic(16, 75).lengths)
    return {
        f"batch {batch}, latent {dim}": emulated.plan(batch, 75, dim, 1024, 9, lengths, DEVICES[architecture])
        for dim in (64, 128)
        for batch in (1, 8, 32, 256, 1024)
    }


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, int]]]:
    if NVCC is None:
        pytest.skip("there is no nvcc: what the compiler makes of the kernels is not tested")
    with ThreadPoolExecutor() as pool:
        return dict(zip(ARCHITECTURES, pool.map(compile_for, ARCHITECTURES), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_and_as_many_blocks_fit_as_were_meant_to(compiled, architecture):
    figures = compiled[architecture]
    assert len(figures) == len(KERNELS)
    for name, threads, blocks in KERNELS.values():
        used = figures[name]
        assert used["stack"] == used["spill_stores"] == used["spill_loads"] == 0, (name, used)
        assert -(-used["registers"] // 8) * 8 * threads * blocks <= REGISTERS, (name, used)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory(architecture):
    """At latent 64, two blocks with their reserved KB each fit in a multiprocessor."""
    available = DEVICES[architecture].shared
    for name, plan in plans(architecture).items():
        assert plan["shared"] <= available, name
        assert plan["workspace"] == 0, name
        if "latent 64" in name:
            assert 2 * (plan["shared"] + 1024) <= available + 1024, name


def main() -> None:
    """``PYTHONPATH=.:tests:tests/cuda python tests/cuda/test_cuda_compile.py``: compile and record the figures."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    report = {
        "compiled ahead of time, not run": True,
        "nvcc": re.search(r"V([\d.]+)", version)[1],
        "kernels": {architecture: compile_for(architecture) for architecture in ARCHITECTURES},
        "plans of encode": {architecture: plans(architecture) for architecture in ARCHITECTURES},
    }
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "cuda_aot.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
