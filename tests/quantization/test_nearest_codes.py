"""Every level of instructions, without torch: the very nearest codes, also where they are hard to screen.

The program runs wherever it is copied to, so that levels which this machine lacks can be checked on another, or in an
emulator.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from aar_kernels import build

PROGRAM = Path(__file__).with_name("nearest_codes.cpp")
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def _run(directory: Path, flags: list[str], kernels: list[Path]) -> str:
    compiler = [*os.environ.get("CXX", "c++").split(), *build.FLAGS, *flags, "-I", str(build.SOURCES / "include")]
    try:
        subprocess.run([*compiler, "--version"], check=True, capture_output=True)
    except OSError as error:
        pytest.skip(f"no compiler: {error}")
    steps = [build._compile(PROGRAM, directory, compiler)]
    for source in kernels:
        steps.append(build._compile(source, directory, [*compiler, *build.ISA_FLAGS[build._isa(source)]]))
    program = directory / "nearest_codes"
    objects = [step.output for step in steps]
    steps.append(build.Step(program, objects, [*compiler, *map(str, objects), "-o", str(program)]))
    assert build._make(steps, [program], directory) == {}
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_all_levels(tmp_path):
    kernels = [path for path in build._kernels() if path.stem == "isa" or path.stem.startswith("msrq_")]
    x86 = ["-DAAR_HAVE_X86=1"] if build._is_x86() else []
    assert "portable" in _run(tmp_path, ["-O2", *x86], kernels)


def test_the_tiling_of_avx512_under_sanitizers(tmp_path):
    """16 lanes in portable code."""
    sources = [build.SOURCES / "cpu" / name for name in ("isa.cpp", "msrq_portable.cpp")]
    assert _run(tmp_path, [*SANITIZE, "-DAAR_LANES=16"], sources).startswith("portable ran")
