"""The compiled backend at every instruction set, and under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import require

from aar_kernels import build

HERE = Path(__file__).parent
LEVELS = ("portable", "avx2", "avx512")


@pytest.fixture(autouse=True)
def native():
    return require("sampling_sample", "native")


def detected() -> list[str]:
    report = dict(part.split("=") for part in torch.ops.aar_native.isa_report().split(";"))
    return report["detected"].split(",")


def run_equality(level: str, cases: int, **environment: str) -> None:
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "AAR_KERNELS_ISA": level} | environment
    command = [sys.executable, str(HERE / "sampling_equality.py"), level, str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("equal\n")


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    """All draw the reference's codes, with memory from malloc full of large numbers."""
    if level not in detected():
        pytest.skip(f"this processor has no {level}")
    run_equality(level, 20, MALLOC_PERTURB_="128")


def test_sanitizers_and_wider_vectors(tmp_path, monkeypatch):
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing; the portable level is built with the 16 lanes of
    AVX-512, which this machine need not have."""
    compiler = os.environ.get("CXX", "c++")
    runtime = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*compiler.split(), f"-print-file-name={name}"]
        try:
            path = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        except OSError as error:
            pytest.skip(f"no compiler: {error}")
        if not path.is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        runtime.append(str(path.resolve()))
    # This operator's sources alone: sanitized code is slow to compile.
    ours = ("isa.cpp", "torch_library.cpp", *(path.name for path in build.SOURCES.rglob("*sampling*.cpp")))
    others = {path.name for path in build.SOURCES.rglob("*.cpp")}.difference(ours)
    shutil.copytree(build.SOURCES, tmp_path / "csrc", ignore=lambda *_: others)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(build, "TARGETS", {"_native_torch": build.TARGETS["_native_torch"]})
    monkeypatch.setenv("CXX", f"{compiler} -DAAR_LANES=16")
    record = build.build(tmp_path / "library", tmp_path / "objects", sanitize="address,undefined")
    assert "_native_torch" in record["built"], record["left_out"]
    for level in detected():
        run_equality(
            level, 8, AAR_KERNELS_LIBRARY_DIR=str(tmp_path / "library"), LD_PRELOAD=os.pathsep.join(runtime),
            ASAN_OPTIONS="detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000",
        )  # fmt: skip
