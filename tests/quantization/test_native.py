"""The compiled backend: every instruction set, sanitizers, its caches, and that unwritten outputs would
show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import as_dtype, make_case
from helpers import require

from aar_kernels import build, quantization

HERE = Path(__file__).parent
LEVELS = ("portable", "avx2", "avx512")


@pytest.fixture(autouse=True)
def native():
    return require("msrq_encode", "native")


def isa_report() -> dict[str, str]:
    return dict(part.split("=") for part in torch.ops.aar_native.isa_report().split(";"))


def run_equality(level: str, cases: int, **environment: str) -> None:
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "AAR_KERNELS_ISA": level} | environment
    command = [sys.executable, str(HERE / "equality.py"), level, str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("equal\n")


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    """With memory from malloc full of large numbers, so that scratch which is read unwritten changes the
    result."""
    report = isa_report()
    if level not in report["detected"].split(","):
        pytest.skip(f"{level}: this processor has {report['detected']}, this build {report['built']}")
    run_equality(level, 14, MALLOC_PERTURB_="128")


def test_an_instruction_set_that_is_not_there_is_not_run():
    """Asking for one that this processor lacks, or that does not exist, must not end in an illegal
    instruction."""
    missing = sorted(set(LEVELS) - set(isa_report()["detected"].split(",")))
    for level in [*missing, "sse9"]:
        script = (
            "import torch; from aar_kernels import dispatch, quantization; dispatch.operators(); "
            "print(torch.ops.aar_native.isa_report())"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"AAR_KERNELS_ISA": level},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stdout.strip().endswith(f"active={level}")


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
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing, at any level, with all of malloc's memory
    NaN."""
    record = build.build(tmp_path / "library", tmp_path / "objects", sanitize="address,undefined")
    assert "_native_torch" in record["built"], record["left_out"]
    for level in isa_report()["detected"].split(","):
        run_equality(
            level, 4, AAR_KERNELS_LIBRARY_DIR=str(tmp_path / "library"), LD_PRELOAD=sanitizer_runtime,
            ASAN_OPTIONS="detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000",
        )  # fmt: skip


def test_vectors_wider_than_this_machine(sanitizer_runtime, tmp_path, monkeypatch):
    """The tiling of AVX-512 (16 lanes, 32 registers) in portable code, under the sanitizers: what differs from the
    real level is then four instructions."""
    monkeypatch.setenv("CXX", os.environ.get("CXX", "c++") + " -DAAR_LANES=16")
    record = build.build(tmp_path / "library", tmp_path / "objects", sanitize="address,undefined")
    assert "_native_torch" in record["built"], record["left_out"]
    run_equality(
        "portable", 4, AAR_KERNELS_LIBRARY_DIR=str(tmp_path / "library"), LD_PRELOAD=sanitizer_runtime,
        ASAN_OPTIONS="detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000",
    )  # fmt: skip


def test_outputs_start_as_nan():
    """The kernels' outputs are allocated by `aten::new_empty`, which the fixture `fill_empty` makes fill
    them."""
    case = make_case(0)
    quantization.encode(case.x, case.levels, backend="native")  # packs the codebooks
    with torch.profiler.profile() as profile:
        quantization.encode(case.x, case.levels, backend="native")
    inside = [event.name for event in profile.events()]
    inside = inside[inside.index("aar_native::msrq_encode") :]
    assert "aten::new_empty" in inside
    assert "aten::fill_" in inside


# ------------------------------------------------------------------------------------------------------
# staleness


def codebooks_in_place(levels):
    levels.codebooks.copy_(levels.codebooks.flip(1))


def codebook_of_one_scale(levels):
    levels.codebooks[0].mul_(-1)


def phi_in_place(levels):
    for weight in levels.phi_weights:
        weight.neg_()


def phi_bias(levels):
    levels.phi_biases[0].add_(3)


def phi_data(levels):
    levels.phi_weights[0].data = torch.randn_like(levels.phi_weights[0])


CHANGES = [codebooks_in_place, codebook_of_one_scale, phi_in_place, phi_bias, phi_data]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_weight_is_never_served_stale(change):
    """Codes and decoding after the change are those of a quantizer made afresh from the new weights."""
    case = make_case(0, sharing="partial", kind="multiscale", masked="absent", batch=4, latent=16)
    levels, x = case.levels, case.x
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(levels.codebook_size, (4, levels.schedule.total), generator=generator)

    def results(levels):
        encoded = quantization.encode(x, levels, backend="native")
        return [encoded, quantization.decode(codes, levels, backend="native")]

    before = results(levels)
    assert all(torch.equal(a, b) for a, b in zip(results(levels), before, strict=True))  # from the caches
    change(levels)
    after, fresh = results(levels), results(as_dtype(levels, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))
    assert not torch.equal(after[1], before[1])


@torch.no_grad()
def test_a_table_serves_every_schedule_that_shares_its_weights():
    """Two quantizers over the same tensors, with other schedules, kernel assignments and metrics, do not
    mix."""
    case = make_case(0, sharing="partial", kind="multiscale", masked="absent", batch=4, latent=16)
    levels, scales = case.levels, case.levels.schedule.num_scales
    variants = [
        levels,
        quantization.Levels(
            levels.schedule, levels.codebooks, levels.phi_weights, levels.phi_biases,
            list(levels.phi_index)[::-1]
        ),
        quantization.Levels(levels.schedule, levels.codebooks),
        quantization.Levels(
            type(levels.schedule)([5] * scales), levels.codebooks, levels.phi_weights, levels.phi_biases,
            [0] * scales, "cosine",
        ),
    ]  # fmt: skip
    for _ in range(2):
        for variant in variants:
            codes = quantization.encode(case.x, variant, backend="native")
            assert torch.equal(codes, quantization.encode(case.x, variant, backend="reference"))
            decoded = quantization.decode(codes, variant, backend="native")
            torch.testing.assert_close(decoded, quantization.decode(codes, variant, backend="reference"))
