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
from native_levels import LEVELS, check_level, check_sanitized, detected

from aar_kernels import quantization

SCRIPT = Path(__file__).parent / "equality.py"


@pytest.fixture(autouse=True)
def native():
    return require("msrq_encode", "native")


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_set(level):
    check_level(SCRIPT, level, cases=14)


def test_an_instruction_set_that_is_not_there_is_not_run():
    """Asking for one that this processor lacks, or that does not exist, must not end in an illegal
    instruction."""
    missing = sorted(set(LEVELS) - set(detected()))
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


def test_sanitizers():
    check_sanitized(SCRIPT, cases=4)


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
