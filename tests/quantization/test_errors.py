"""Wrong input meets the same answer on every backend: an error that names what is wrong, or a documented
result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import as_dtype, make_case

from aar_kernels import BackendError, ScaleSchedule, quantization
from aar_kernels.nn import MultiScaleResidualQuantizer
from aar_kernels.quantization import Levels

CASE = make_case(
    0, latent=8, size=32, batch=2, kind="multiscale", sharing="partial", masked="absent", shared=False
)
LEVELS, X = CASE.levels, CASE.x
TOTAL = LEVELS.schedule.total
CODES = torch.zeros(2, TOTAL, dtype=torch.int64)
MASK = torch.ones(2, CASE.length, dtype=torch.bool)
DECODERS = ["decode", "decode_scales", "next_scale_inputs"]


@pytest.mark.parametrize("x", [X[0], X[:, :7], X[:, :, :0], X[None], X.to(torch.int64)])
@pytest.mark.parametrize("name", ["encode", "quantize"])
def test_wrong_input(backend, name, x):
    with pytest.raises(ValueError, match=r"x must be"):
        getattr(quantization, name)(x, LEVELS, backend=backend)


@pytest.mark.parametrize("mask", [MASK.float(), MASK[:, :-1], MASK[:1], MASK[..., None]])
@pytest.mark.parametrize("name", ["encode", "quantize"])
def test_wrong_mask(backend, name, mask):
    with pytest.raises(ValueError, match=r"mask must be bool \[2, \d+\], got"):
        getattr(quantization, name)(X, LEVELS, mask=mask, backend=backend)


@pytest.mark.parametrize("codes", [CODES[0], CODES[:, :-1], CODES.int(), CODES.float()])
@pytest.mark.parametrize("name", DECODERS)
def test_wrong_codes(backend, name, codes):
    with pytest.raises(ValueError, match=rf"codes must be int64 \[batch, {TOTAL}\], got"):
        getattr(quantization, name)(codes, LEVELS, backend=backend)


@pytest.mark.parametrize("length", [0, -1])
@pytest.mark.parametrize("name", DECODERS)
def test_wrong_length(backend, name, length):
    with pytest.raises(ValueError, match="length"):
        getattr(quantization, name)(CODES, LEVELS, length=length, backend=backend)


@pytest.mark.parametrize("code", [32, -2, 2**40, -(2**62)])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("place", [0, -1])
def test_codes_out_of_range(backend, name, code, place):
    codes = CODES.clone()
    codes[-1, place] = code
    with pytest.raises(RuntimeError, match=r"codes must be in \[-1, 32\)"):
        getattr(quantization, name)(codes, LEVELS, backend=backend)


@pytest.mark.parametrize("code", [32, -2])
def test_codes_out_of_range_in_a_step(backend, code):
    with pytest.raises(RuntimeError, match=r"codes must be in \[-1, 32\)"):
        quantization.step(0, torch.zeros(1, 5, 8), torch.tensor([[code]]), LEVELS, backend=backend)


def test_wrong_step(backend):
    f_hat = torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match="scale 99 is outside"):
        quantization.step(99, f_hat, CODES[:, :1], LEVELS, backend=backend)
    with pytest.raises(ValueError, match="codes must be int64"):
        quantization.step(0, f_hat, CODES[:, :2], LEVELS, backend=backend)
    for wrong in (f_hat[:1], f_hat[0], f_hat[..., :7], f_hat[:, :0]):
        with pytest.raises(ValueError, match="f_hat must be"):
            quantization.step(0, wrong, CODES[:, :1], LEVELS, backend=backend)


@pytest.mark.parametrize("index", [-1, 10**6])
def test_samples_out_of_range(backend, index):
    samples = torch.zeros(LEVELS.codebooks.shape[:2], dtype=torch.int64)
    samples[-1, -1] = index
    with pytest.raises((RuntimeError, IndexError)):
        quantization.quantize(X, LEVELS, statistics=True, samples=samples, backend=backend)


@pytest.mark.parametrize("samples", [CODES, torch.zeros(LEVELS.codebooks.shape[:2])])
def test_wrong_samples(backend, samples):
    with pytest.raises(ValueError, match="samples must be"):
        quantization.quantize(X, LEVELS, statistics=True, samples=samples, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebooks": LEVELS.codebooks[:2]}, "codebooks must be"),
        ({"codebooks": LEVELS.codebooks[:, :0]}, "codebooks must be"),
        ({"codebooks": LEVELS.codebooks.int()}, "one floating dtype"),
        ({"phi_index": (0,)}, "phi_index needs one entry"),
        ({"phi_index": (9,) * LEVELS.schedule.num_scales}, "names kernels outside"),
        ({"phi_biases": LEVELS.phi_biases[:-1]}, "phi weights but"),
        ({"phi_weights": [weight[:, :, :0] for weight in LEVELS.phi_weights]}, "a phi weight must be"),
        ({"phi_weights": [weight.double() for weight in LEVELS.phi_weights]}, "one floating dtype"),
        ({"phi_biases": [bias[:7] for bias in LEVELS.phi_biases]}, "a phi bias must be"),
        ({"metric": "manhattan"}, "metric must be one of"),
    ],
)
def test_wrong_levels(backend, change, message):
    levels = dataclasses.replace(LEVELS, **change)
    for call in (
        lambda: quantization.encode(X, levels, backend=backend),
        lambda: quantization.decode(CODES, levels),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_module_checks_its_own_channels(backend):
    module = MultiScaleResidualQuantizer(12, schedule=ScaleSchedule([1, 4]), latent_dim=8, codebook_size=4)
    for call in (module.encode, module):
        with pytest.raises(ValueError, match=r"x must be \[batch, 12, T\]"):
            call(torch.zeros(1, 8, 4))


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"unknown backend 'fortran'; one of native, flash, triton, reference"):
        quantization.encode(X, LEVELS, backend="fortran")


def test_a_forced_backend_that_cannot_run_says_why_for_all():
    with pytest.raises(BackendError) as error:
        quantization.decode(CODES, as_dtype(LEVELS, torch.float64), backend="native")
    native, flash, triton, reference = str(error.value).splitlines()[1:]
    assert native.startswith("  native: ")
    assert flash == "  flash: has no kernel for this operator"
    assert triton.startswith("  triton: ")
    assert reference == "  reference: can run this call, but another backend was asked for"


def test_an_empty_batch(backend):
    x = X[:0]
    assert quantization.encode(x, LEVELS, backend=backend).shape == (0, TOTAL)
    assert quantization.decode(CODES[:0], LEVELS, backend=backend).shape == (0, 8, LEVELS.schedule.length)
    assert quantization.decode_scales(CODES[:0], LEVELS, backend=backend).shape[1] == 0
    assert quantization.next_scale_inputs(CODES[:0], LEVELS, backend=backend).shape == (0, TOTAL - 1, 8)
    f_hat, following = quantization.step(0, torch.zeros(0, 5, 8), CODES[:0, :1], LEVELS, backend=backend)
    assert f_hat.shape == (0, 5, 8)
    assert following.shape == (0, LEVELS.schedule.lengths[1], 8)
    quantized, codes, loss, statistics = quantization.quantize(x, LEVELS, statistics=True, backend=backend)
    assert quantized.shape == x.shape
    assert codes.shape == (0, TOTAL)
    assert loss == 0
    assert not statistics.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf(backend, bad):
    """An item with one has no codes; its neighbours do not notice, and neither do the statistics."""
    x = torch.cat([X, X.flip(0), X], dim=0)
    poisoned = x.clone()
    poisoned[1, 3, 2] = poisoned[4, 0, -1] = bad
    good = torch.tensor([0, 2, 3, 5])
    codes = quantization.encode(poisoned, LEVELS, backend=backend)
    assert torch.equal(codes[good], quantization.encode(x[good], LEVELS, backend=backend))
    assert (codes[[1, 4]] == -1).all()

    quantized, trained, loss, statistics = quantization.quantize(
        poisoned, LEVELS, statistics=True, backend=backend
    )
    expected, _, _, expected_statistics = quantization.quantize(
        x[good], LEVELS, statistics=True, backend=backend
    )
    assert torch.equal(trained, codes)
    assert torch.equal(quantized[good], expected)
    assert not loss.isfinite()
    torch.testing.assert_close(statistics, expected_statistics)


def test_samples_of_rows_without_a_code_are_zero(backend):
    """So that neither padding nor a NaN is ever put into a codebook."""
    poisoned = X.clone()
    poisoned[0, 0, 0] = torch.nan
    mask = MASK.clone()
    mask[1] = False
    samples = torch.arange(2).repeat(LEVELS.codebooks.shape[0], 16)
    *_, statistics = quantization.quantize(
        poisoned, LEVELS, mask=mask, statistics=True, samples=samples, backend=backend
    )
    assert not statistics.any()


def test_huge_values_are_still_numbers(backend):
    """The squares of these overflow; the codes must be codes all the same."""
    codes = quantization.encode(X * 1e30, LEVELS, backend=backend)
    assert ((codes >= 0) & (codes < 32)).all()


def test_a_code_of_minus_one_is_a_row_of_zeros(backend):
    """Decoding no codes at all leaves the biases of phi, and nothing where there is no phi."""
    plain = Levels(LEVELS.schedule, LEVELS.codebooks)
    assert not quantization.decode(CODES - 1, plain, backend=backend).any()
    bias = sum(0.5 * LEVELS.phi_biases[k] for k in LEVELS.phi_index)
    decoded = quantization.decode(CODES - 1, LEVELS, backend=backend)
    torch.testing.assert_close(decoded, bias[None, :, None].expand_as(decoded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster_size": torch.ones(2, 4)}, r"cluster_size \[E, K\]"),
        ({"embed_avg": torch.ones(2, 3, 5)}, "embed_avg must be"),
        ({"embed_avg": torch.ones(2, 4, 3).mT}, "contiguous"),
        ({"codebooks": torch.ones(2, 3, 4).double()}, "one dtype"),
        ({"statistics": torch.ones(29)}, "statistics must be"),
        ({"statistics": torch.ones(31)}, "statistics must be"),
    ],
)
def test_wrong_update(backend, change, message):
    tensors = {
        "codebooks": torch.ones(2, 3, 4), "cluster_size": torch.ones(2, 3), "embed_avg": torch.ones(2, 3, 4),
        "statistics": torch.ones(30),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        quantization.update(**tensors | change, backend=backend)
    quantization.update(**tensors, backend=backend)
