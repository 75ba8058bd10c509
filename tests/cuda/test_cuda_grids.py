"""Quantizers of grids on a GPU against the reference in float64 on the CPU. Skipped where there is no GPU.

``AAR_TEST_DEVICE=cpu`` runs the same on the CPU, to test these tests.
"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_accurate, require
from quantization.cases import as_dtype, assert_codes
from quantization.grid_cases import GridCase, make_grid_case, random_grid_codes
from test_cuda_backends import DEVICE, on_device, pytestmark  # noqa: F401

from aar_kernels import quantization
from aar_kernels.precision import without_tf32

SEEDS = ["VAR", *range(24)]


@pytest.fixture(params=["triton", "reference"])
def backend(request) -> str:
    return require("msrq_encode", request.param)


@pytest.fixture(autouse=True)
def _surroundings(nan_filled_empty):
    with without_tf32():  # the reference convolves with PyTorch
        yield


@pytest.mark.parametrize("seed", SEEDS)
def test_encode(backend, seed):
    case = make_grid_case(seed)
    levels, x, _ = on_device(case)
    assert_codes(quantization.encode(x, levels, backend=backend).cpu(), case)


@pytest.mark.parametrize("batch", [1, 3, 40, 200])
def test_published_sizes_at_every_number_of_parts(backend, batch):
    """Codes are those of float64, and those of each item alone."""
    x = torch.randn(batch, 32, 16, 16, generator=torch.Generator().manual_seed(batch))
    case = GridCase(make_grid_case("VAR").levels, x, None)
    levels, x, _ = on_device(case)
    codes = quantization.encode(x, levels, backend=backend)
    assert_codes(codes.cpu(), case)
    if backend == "triton":
        for b in {0, batch - 1}:
            assert torch.equal(quantization.encode(x[b : b + 1], levels, backend=backend)[0], codes[b])


@pytest.mark.parametrize("name", ["decode", "decode_scales", "next_scale_inputs"])
@pytest.mark.parametrize("seed", SEEDS)
def test_decode(backend, seed, name):
    """Of codes, and of rows in their place."""
    case = make_grid_case(seed)
    double, (levels, _, _) = as_dtype(case.levels, torch.float64), on_device(case)
    function = getattr(quantization, name)
    rows = torch.randn(*random_grid_codes(case).shape, levels.latent_dim, generator=torch.Generator().manual_seed(0))
    for tokens, wide in ((random_grid_codes(case),) * 2, (rows, rows.double())):
        ours = function(tokens.to(DEVICE), levels, backend=backend)
        plain = function(tokens, case.levels, backend="reference")
        assert_as_accurate(ours.cpu(), plain, function(wide, double, backend="reference"))


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_are_next_scale_inputs_one_at_a_time(backend, seed):
    case = make_grid_case(seed)
    levels, x, _ = on_device(case)
    codes, f_hat, inputs = random_grid_codes(case).to(DEVICE), torch.zeros_like(x).flatten(2).mT, []
    for s, part in enumerate(codes.split(list(levels.schedule.lengths), dim=1)):
        f_hat, following = quantization.step(s, f_hat, part, levels, backend=backend)
        inputs.append(following)
    expected = quantization.next_scale_inputs(codes, levels, backend=backend)
    torch.testing.assert_close(torch.cat(inputs, dim=1), expected, rtol=1e-5, atol=1e-5)
