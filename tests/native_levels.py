"""The compiled backend at each instruction set and under the sanitizers, in processes of their own.

An operator's folder holds a script ``equality.py LEVEL CASES`` that compares its native results with the reference and
prints "equal"; the functions here run it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from filelock import FileLock

from aar_kernels import build

TESTS = Path(__file__).parent
LEVELS = ("portable", "avx2", "avx512")


def isa_report() -> dict[str, str]:
    """"built", "detected" and "active" levels of this process."""
    return dict(part.split("=") for part in torch.ops.aar_native.isa_report().split(";"))


def detected() -> list[str]:
    return isa_report()["detected"].split(",")


def run_equality(script: Path, level: str, cases: int, environment: dict[str, str]) -> None:
    paths = os.pathsep.join([str(script.parent), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "AAR_KERNELS_ISA": level} | environment
    done = subprocess.run(
        [sys.executable, str(script), level, str(cases)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("equal\n")


def check_level(script: Path, level: str, cases: int) -> None:
    """With memory from malloc full of large numbers, so that scratch which is read unwritten changes the result."""
    if level not in detected():
        pytest.skip(f"{level}: this processor has {detected()}, this build {isa_report()['built']}")
    run_equality(script, level, cases, {"MALLOC_PERTURB_": "128"})


def check_sanitized(script: Path, cases: int) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing at any level, with all of malloc's memory NaN. The
    portable level has the tiling of AVX-512 (16 lanes, 32 registers), so that what differs from the real one on a
    machine without it is a few instructions."""
    environment = _sanitized()
    for level in detected():
        run_equality(script, level, cases, environment)


@functools.cache
def _sanitized() -> dict[str, str]:
    """The environment in which a sanitized library is loaded, built once for all operators; later test runs compile
    what has changed."""
    runtime, directory = _runtime(), TESTS.parent / "build" / "sanitized"
    compiler = os.environ.get("CXX", "c++") + " -DAAR_LANES=16"
    library = {"_native_torch": build.TARGETS["_native_torch"]}
    directory.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(directory / "lock"),  # of the processes that share the tests
        mock.patch.dict(os.environ, CXX=compiler),
        mock.patch.object(build, "TARGETS", library),
    ):
        record = build.build(directory / "library", directory / "objects", sanitize="address,undefined")
    assert "_native_torch" in record["built"], record["left_out"]
    return {
        "AAR_KERNELS_LIBRARY_DIR": str(directory / "library"), "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000",
    }  # fmt: skip


def _runtime() -> str:
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
