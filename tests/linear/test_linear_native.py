"""The compiled backend: every instruction set, sanitizers, and that unwritten outputs would show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import require
from linear_cases import make_case

from aar_kernels import build
from aar_kernels.linear import linear

HERE = Path(__file__).parent
MALLOC_FILLED = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000"


@pytest.fixture(autouse=True)
def native():
    return require("linear_forward", "native")


def detected() -> list[str]:
    report = dict(part.split("=") for part in torch.ops.aar_native.isa_report().split(";"))
    return report["detected"].split(",")


def run_equality(level: str, cases: int, **environment: str) -> None:
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "AAR_KERNELS_ISA": level} | environment
    command = [sys.executable, str(HERE / "linear_equality.py"), level, str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("equal\n")


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_instruction_set(level):
    """With memory from malloc full of large numbers, so that scratch which is read unwritten changes the result."""
    if level not in detected():
        pytest.skip(f"{level}: this processor has {detected()}")
    run_equality(level, 40, MALLOC_PERTURB_="128")


@pytest.fixture(scope="module")
def sanitizer_runtime() -> str:
    """What must be loaded before Python: the runtime, and libstdc++, whose exceptions it intercepts."""
    compiler = os.environ.get("CXX", "c++").split()
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        try:
            done = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no compiler: {error}")
        path = Path(done.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"{' '.join(compiler)} has no {name}")
        paths.append(str(path.resolve()))
    return os.pathsep.join(paths)


@pytest.mark.parametrize("lanes", ["of this machine", "16"])
def test_sanitizers(sanitizer_runtime, tmp_path, monkeypatch, lanes):
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing, at any level, with all of malloc's memory NaN; nor
    in the tiling of AVX-512 (16 lanes, 32 registers) in portable code."""
    levels = detected()
    if lanes == "16":
        monkeypatch.setenv("CXX", os.environ.get("CXX", "c++") + " -DAAR_LANES=16")
        levels = ["portable"]
    record = build.build(tmp_path / "library", tmp_path / "objects", sanitize="address,undefined")
    assert "_native_torch" in record["built"], record["left_out"]
    for level in levels:
        run_equality(
            level, 20, AAR_KERNELS_LIBRARY_DIR=str(tmp_path / "library"), LD_PRELOAD=sanitizer_runtime,
            ASAN_OPTIONS=MALLOC_FILLED,
        )  # fmt: skip


def test_outputs_start_as_nan():
    """The output is allocated by `aten::new_empty`, which the fixture `nan_filled_empty` makes fill it."""
    case = make_case(0)
    with torch.profiler.profile() as profile:
        linear(case.x, case.packed, backend="native")
    inside = [event.name for event in profile.events()]
    inside = inside[inside.index("aar_native::linear_forward") :]
    assert "aten::new_empty" in inside
    assert "aten::fill_" in inside
