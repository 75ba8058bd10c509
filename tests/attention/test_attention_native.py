"""The compiled backend: every instruction set, sanitizers, threads, and that unwritten outputs would show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import attention_case, by_steps, forward_and_gradients
from helpers import require

from aar_kernels import ScaleSchedule, build
from aar_kernels.attention import scale_attention

HERE = Path(__file__).parent
LEVELS = ("portable", "avx2", "avx512")
SANITIZED = {"ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000"}


@pytest.fixture(autouse=True)
def native():
    return require("attention_forward", "native")


def detected() -> list[str]:
    report = dict(part.split("=") for part in torch.ops.aar_native.isa_report().split(";"))
    return report["detected"].split(",")


def run_equality(level: str, cases: int, **environment: str) -> None:
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "AAR_KERNELS_ISA": level} | environment
    command = [sys.executable, str(HERE / "attention_equality.py"), level, str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("equal\n")


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    """With memory from malloc full of large numbers, so that scratch which is read unwritten changes the result."""
    if level not in detected():
        pytest.skip(f"{level}: this processor has {detected()}")
    run_equality(level, 8, MALLOC_PERTURB_="128")


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


def test_sanitizers(sanitizer_runtime, tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing, at any level, with all of malloc's memory NaN."""
    record = build.build(tmp_path / "library", tmp_path / "objects", sanitize="address,undefined")
    assert "_native_torch" in record["built"], record["left_out"]
    for level in detected():
        library = {"AAR_KERNELS_LIBRARY_DIR": str(tmp_path / "library"), "LD_PRELOAD": sanitizer_runtime}
        run_equality(level, 3, **library, **SANITIZED)


def test_vectors_wider_than_this_machine(sanitizer_runtime, tmp_path, monkeypatch):
    """The tiling of AVX-512 (16 lanes, 32 registers) in portable code, under the sanitizers: what differs from the
    real level is then a few instructions."""
    monkeypatch.setenv("CXX", os.environ.get("CXX", "c++") + " -DAAR_LANES=16")
    record = build.build(tmp_path / "library", tmp_path / "objects", sanitize="address,undefined")
    assert "_native_torch" in record["built"], record["left_out"]
    library = {"AAR_KERNELS_LIBRARY_DIR": str(tmp_path / "library"), "LD_PRELOAD": sanitizer_runtime}
    run_equality("portable", 3, **library, **SANITIZED)


def test_results_do_not_depend_on_the_number_of_threads():
    """One head for several threads too, which then share its rows."""
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            result = []
            for batch, heads in ((1, 1), (3, 2)):
                case = attention_case("published", batch=batch, heads=heads)
                result += [*forward_and_gradients(case, "native").values(), by_steps(case, "native")[0]]
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(ours, single) for ours, single in zip(other, results[0], strict=True))


def test_outputs_start_as_nan():
    """The kernels' outputs are allocated by `aten::new_empty`, which the fixture `fill_empty` makes fill them."""
    case = attention_case(0)
    with torch.profiler.profile() as profile:
        forward_and_gradients(case, "native")
    names = [event.name for event in profile.events()]
    for operator, outputs in (("attention_forward", 2), ("attention_backward", 4)):
        inside = names[names.index(f"aar_native::{operator}") :]
        assert inside[: 4 * outputs + 4].count("aten::new_empty") >= outputs
        assert "aten::fill_" in inside


def test_storage_formats_round_as_pytorch_does():
    """A token that sees itself alone is copied through fp32: every bf16 and fp16 number survives."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        v = bits.view(dtype).reshape(-1, 1, 1, 64)
        q = torch.zeros_like(v)
        out = scale_attention(q, q, v, ScaleSchedule([1]), backend="native")
        assert torch.equal(out.isnan(), v.isnan())
        assert torch.equal(out[~v.isnan()], v[~v.isnan()])
    # Means of neighbours lie halfway between two numbers.
    for dtype in (torch.bfloat16, torch.float16):
        finite = bits.view(dtype)[bits.view(dtype).float().abs() < 1e38][:60000].reshape(-1, 60)
        v = torch.stack([finite, finite.roll(1, dims=1)], dim=1)[:, :, None]
        q = torch.zeros_like(v)
        out = scale_attention(q, q, v, ScaleSchedule([2]), backend="native")
        assert torch.equal(out[:, 0], (v.float().sum(1) / 2).to(dtype))
