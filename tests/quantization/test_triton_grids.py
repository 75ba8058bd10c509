"""Quantizers of grids on Triton, in its interpreter, against the float64 reference. Small cases: it is slow."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import interpreter
import test_grids as grids
import test_rows as rows
from quantization.cases import as_dtype, assert_codes, assert_decoding, assert_steps, make_case, near_ties
from quantization.grid_cases import GridCase, make_grid_case, random_grid_codes

from aar_kernels import BackendError, GridSchedule, quantization
from aar_kernels.quantization import triton_grids_kernels as kernels

SMALL = GridSchedule([1, (2, 3), (5, 4)])
# Every width and number of phi, metric and way of sharing codebooks; the numbers of channels and codes are no multiples
# of a block, and some are of several.
CASES = {
    "one phi": make_grid_case(0, schedule=SMALL, latent=5, size=33),
    "no phi, cosine": make_grid_case(1, schedule=SMALL, latent=8, widths=(), metric="cosine", size=150, shared=False),
    "phi of two sizes": make_grid_case(2, schedule=SMALL, batch=2, latent=16, widths=(1, 5), shared=False),
    "four phi, wide": make_grid_case(3, schedule=SMALL, batch=1, latent=40, widths=(3,) * 4, size=300),
    "coarse scales that are finer": make_grid_case(5, schedule=GridSchedule([(7, 2), (3, 9), (4, 3)]), batch=2),
    "two equal scales": make_grid_case(6, schedule=GridSchedule([(3, 2), (3, 2)]), batch=3, metric="cosine"),
    "a line of one channel": make_grid_case(4, schedule=GridSchedule([(1, 4), (1, 19)]), latent=1, batch=2),
    "one cell": make_grid_case(7, schedule=GridSchedule([1]), latent=64, batch=2),
    "random": make_grid_case(2, batch=2),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture(params=[1, 1000])
def programs(request, monkeypatch) -> None:
    """All codes in one part, or as many parts as there are blocks of codes."""
    monkeypatch.setattr(kernels, "PROGRAMS", request.param)


@every_case
def test_encode(case):
    assert_codes(quantization.encode(case.x, case.levels, backend="triton"), case)


@every_case
@pytest.mark.parametrize("name", grids.DECODERS)
def test_decode(case, name):
    assert_decoding(random_grid_codes(case), case, name, "triton")


@every_case
def test_step(case):
    assert_steps(random_grid_codes(case), case, "triton")


def test_rows_in_place_of_codes():
    case = CASES["phi of two sizes"]
    for name in grids.DECODERS:
        assert_decoding(rows.random_rows(case), case, name, "triton")
    assert_steps(rows.random_rows(case), case, "triton")


def whole(batch: int) -> GridCase:
    """In whole numbers and dyadic weights, of which sums are exact: NumPy, which interprets a dot product, adds in no
    fixed order."""
    case = make_grid_case(0, schedule=GridSchedule([1, 2]), latent=3, size=300, batch=batch)
    books, *phi = ((4 * weight).round() for weight in case.levels.weights)
    levels = dataclasses.replace(case.levels, codebooks=books, phi_weights=phi[:1], phi_biases=phi[1:])
    return GridCase(levels, case.x.round(), None)


def test_an_item_does_not_depend_on_its_batch(programs):
    """Nor on how many programs share its codes."""
    case = whole(9)
    codes = quantization.encode(case.x, case.levels, backend="triton")
    assert torch.equal(codes, quantization.encode(case.x, case.levels, backend="reference"))
    decoded = quantization.decode(codes, case.levels, backend="triton")
    for b in range(0, 9, 4):
        item = slice(b, b + 1)
        assert torch.equal(quantization.encode(case.x[item], case.levels, backend="triton"), codes[item])
        assert torch.equal(quantization.decode(codes[item], case.levels, backend="triton"), decoded[item])


@pytest.mark.parametrize("period", [7, 70, 140])
def test_the_first_of_equal_codes_wins(programs, period):
    """Within a block of codes, and across blocks and parts."""
    case = whole(2)
    levels = dataclasses.replace(case.levels, codebooks=case.levels.codebooks[:, torch.arange(300) % period])
    codes = quantization.encode(case.x, levels, backend="triton")
    assert codes.max() < period
    assert torch.equal(codes, quantization.encode(case.x, levels, backend="reference"))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_encode_between_two_codes(programs, metric):
    case = near_ties(metric)
    levels = dataclasses.replace(case.levels, schedule=GridSchedule([20]))
    case = GridCase(levels, case.x.unflatten(2, (20, 20)), None)
    assert_codes(quantization.encode(case.x, levels, backend="triton"), case)


def test_steps_are_next_scale_inputs_one_at_a_time(backend):
    grids.test_steps_are_next_scale_inputs_one_at_a_time(backend, 6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf(programs, backend, bad):
    """An item of three, whose rows stand in one block with those of the others."""
    case = whole(3)
    poisoned = case.x.clone()
    poisoned[1, 0, -1, -1] = bad
    codes = quantization.encode(poisoned, case.levels, backend=backend)
    assert (codes[1] == -1).all()
    assert torch.equal(codes[::2], quantization.encode(case.x[::2], case.levels, backend=backend))


def test_an_empty_batch(backend):
    grids.test_an_empty_batch(backend)


@pytest.mark.parametrize("code", [-2, 33, 2**32 + 3])
@pytest.mark.parametrize("token", [0, -1])
def test_codes_out_of_range(code, token):
    """Also one beyond what the keys leave of an integer, and one of the last scale, which inputs do without."""
    case = CASES["one phi"]
    codes = random_grid_codes(case)
    codes[1, token] = code
    for name in grids.DECODERS:
        with pytest.raises(RuntimeError, match="codes must be in"):
            getattr(quantization, name)(codes, case.levels, backend="triton")
    scale, part = (0, codes[:, :1]) if token == 0 else (2, codes[:, -20:])
    with pytest.raises(RuntimeError, match="codes must be in"):
        quantization.step(scale, case.rows(torch.float32), part, case.levels, backend="triton")


@torch.no_grad()
def test_changed_weights_are_seen():
    case = whole(1)
    levels, codes = as_dtype(case.levels, torch.float32), random_grid_codes(case)
    before = quantization.decode(codes, levels, backend="triton")
    for weight in levels.weights:
        weight.add_(1)
        after = quantization.decode(codes, levels, backend="triton")
        assert torch.equal(after, quantization.decode(codes, as_dtype(levels, torch.float32), backend="triton"))
        assert not torch.equal(after, before)
        before = after


def test_any_memory_layout_and_dtype():
    case = whole(2)
    codes = quantization.encode(case.x, case.levels, backend="triton")
    for x in (case.x.contiguous(memory_format=torch.channels_last), case.x.bfloat16()):
        assert torch.equal(quantization.encode(x, case.levels, backend="triton"), codes)
    strided = dataclasses.replace(case.levels, codebooks=case.levels.codebooks.mT.contiguous().mT)
    assert torch.equal(quantization.encode(case.x, strided, backend="triton"), codes)


@pytest.mark.parametrize("name", ["encode", "decode", "step"])
def test_opcheck(name):
    case = CASES["one cell"]
    rows, codes, levels = case.rows(torch.float32).contiguous(), random_grid_codes(case), case.levels.arguments()
    arguments = {
        "encode": (rows, None, *levels, "triton"),
        "decode": (codes, *levels, 1, "triton"),
        "step": (rows, codes, *levels, 0, "triton"),
    }
    torch.library.opcheck(getattr(torch.ops.aar_kernels, f"msrq_{name}").default, arguments[name])


def test_what_it_refuses():
    case = CASES["one phi"]
    with pytest.raises(BackendError, match="triton: float32 codebooks only"):
        quantization.encode(case.x, as_dtype(case.levels, torch.float64), backend="triton")
    levels = dataclasses.replace(case.levels, codebooks=case.levels.codebooks.clone().requires_grad_())
    with pytest.raises(BackendError, match="triton: not differentiable"):
        quantization.decode(random_grid_codes(case), levels, backend="triton")
    case = make_case(0, latent=8, batch=2)
    with pytest.raises(BackendError, match="triton: rows in place of codes of sequences run on the reference"):
        quantization.decode(rows.random_rows(case), case.levels, backend="triton")


interpreter.isolate(globals())
