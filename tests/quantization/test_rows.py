"""Rows in place of codes: whatever decodes takes mixtures of codes too, on sequences and on grids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantization.cases import Case, as_dtype, assert_decoding, assert_steps, make_case
from quantization.grid_cases import make_grid_case

from aar_kernels import BackendError, quantization

DECODERS = ["decode", "decode_scales", "next_scale_inputs"]
SEEDS = range(12)


def both(seed: int) -> list[Case]:
    return [make_case(seed), make_grid_case(seed)]


def random_rows(case: Case) -> torch.Tensor:
    shape = len(case.x), case.levels.schedule.total, case.levels.latent_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_decoding_of_rows(fast, seed, name):
    for case in both(seed):
        assert_decoding(random_rows(case), case, name, fast)


@pytest.mark.parametrize("seed", SEEDS)
def test_step_of_rows(fast, seed):
    for case in both(seed):
        assert_steps(random_rows(case), case, fast)


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_rows_of_codes_are_the_codes(backend, seed):
    for case in both(seed):
        levels = case.levels
        codes = torch.randint(levels.codebook_size, (len(case.x), levels.schedule.total))
        books = levels.codebooks.expand(levels.schedule.num_scales, -1, -1)
        parts = codes.split(list(levels.schedule.lengths), dim=1)
        rows = torch.cat([F.embedding(part, book) for part, book in zip(parts, books, strict=True)], dim=1)
        for name in DECODERS:
            function = getattr(quantization, name)
            by_rows, by_codes = function(rows, levels, backend=backend), function(codes, levels, backend=backend)
            torch.testing.assert_close(by_rows, by_codes, rtol=1e-5, atol=1e-5)


def test_gradients_of_rows():
    for case in (make_case(1, latent=3, size=7, batch=2), make_grid_case(2, latent=3, size=7, batch=2)):
        levels = as_dtype(case.levels, torch.float64)
        rows = random_rows(case).double().requires_grad_()
        torch.autograd.gradcheck(lambda rows, levels=levels: quantization.decode(rows, levels), rows, fast_mode=True)


@pytest.mark.parametrize("name", [*DECODERS, "step"])
def test_opcheck(fast, name):
    case = make_grid_case(7, batch=2, latent=8)
    rows, levels = random_rows(case), case.levels.arguments()
    arguments = rows, *levels, case.levels.schedule.length, fast
    if name == "step":
        arguments = case.rows(torch.float32).contiguous(), rows[:, : levels[3][0]].contiguous(), *levels, 0, fast
    torch.library.opcheck(getattr(torch.ops.aar_kernels, f"msrq_{name}").default, arguments)


@torch.no_grad()
def test_a_changed_phi_is_seen(fast):
    case = make_grid_case("VAR", size=50, batch=1)
    levels, rows = as_dtype(case.levels, torch.float32), random_rows(case)
    before = quantization.decode(rows, levels, backend=fast)
    levels.phi_weights[0].neg_()
    after = quantization.decode(rows, levels, backend=fast)
    assert torch.equal(after, quantization.decode(rows, as_dtype(levels, torch.float32), backend=fast))
    assert not torch.equal(after, before)


def test_wrong_rows(backend):
    case = make_case(0, latent=8, batch=2)
    rows = random_rows(case)
    for wrong in (rows[:, 1:], rows[..., 1:]):
        with pytest.raises(ValueError, match=r"rows must be \[batch, \d+, 8\]"):
            quantization.decode(wrong, case.levels, backend=backend)
    with pytest.raises(ValueError, match="codes must be int64"):
        quantization.decode(rows[0], case.levels, backend=backend)


def test_backends_without_rows_say_so():
    case = make_case(0, latent=8, batch=2)
    with pytest.raises(BackendError, match="triton: "):
        quantization.decode(random_rows(case), case.levels, backend="triton")
