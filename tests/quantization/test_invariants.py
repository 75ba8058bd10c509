"""Equations that hold for every quantizer, whatever its numbers are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import as_dtype, make_case
from helpers import assert_as_accurate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aar_kernels import ScaleSchedule
from aar_kernels.quantization import Levels, decode, decode_scales, encode, next_scale_inputs, quantize, step
from aar_kernels.quantization.reference import area_down, linear_up

seeds = st.integers(0, 10**6).map(
    lambda seed: make_case(seed, latent=seed % 19 + 1, size=(32, 7, 50)[seed % 3])
)
examples = settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@examples
@given(seeds)
def test_steps_are_next_scale_inputs_one_at_a_time(backend, case):
    levels, length = case.levels, case.length
    codes = encode(case.x, levels, mask=case.mask, backend=backend)
    f_hat, inputs = torch.zeros(len(case.x), length, levels.latent_dim), []
    scales = decode_scales(codes, levels, length=length, backend=backend)
    for s, part in enumerate(codes.split(list(levels.schedule.lengths), dim=1)):
        f_hat, following = step(s, f_hat, part, levels, backend=backend)
        assert torch.equal(f_hat, scales[s].mT)
        inputs.append(following)
    assert inputs[-1].shape[1] == 0
    assert torch.equal(
        next_scale_inputs(codes, levels, length=length, backend=backend), torch.cat(inputs, dim=1)
    )


@examples
@given(seeds)
def test_the_last_scale_is_the_whole(backend, case):
    codes = encode(case.x, case.levels, mask=case.mask, backend=backend)
    whole = decode(codes, case.levels, length=case.length, backend=backend)
    assert torch.equal(whole, decode_scales(codes, case.levels, length=case.length, backend=backend)[-1])


@examples
@given(seeds)
def test_items_of_a_batch_do_not_meet(backend, case):
    """Each item alone has the codes, the decoding and the quantization that it has in the batch."""
    codes = encode(case.x, case.levels, mask=case.mask, backend=backend)
    decoded = decode(codes, case.levels, backend=backend)
    quantized, trained, _, _ = quantize(case.x, case.levels, mask=case.mask, backend=backend)
    assert torch.equal(trained, codes)
    double = as_dtype(case.levels, torch.float64)
    for b in range(min(len(case.x), 3)):
        item, mask = case.x[b : b + 1], None if case.mask is None else case.mask[b : b + 1]
        assert torch.equal(encode(item, case.levels, mask=mask, backend=backend), codes[b : b + 1])
        alone = decode(codes[b : b + 1], case.levels, backend=backend)
        exact = decode(codes[b : b + 1], double)
        assert_as_accurate(alone, decoded[b : b + 1], exact)
        again, _, _, _ = quantize(item, case.levels, mask=mask, backend=backend)
        torch.testing.assert_close(again, quantized[b : b + 1])


@examples
@given(seeds)
def test_training_and_inference_agree(backend, case):
    """Quantized, where there are frames, is the decoding of the codes, and codes are those of `encode`."""
    quantized, codes, _, _ = quantize(case.x, case.levels, mask=case.mask, backend=backend)
    assert torch.equal(codes, encode(case.x, case.levels, mask=case.mask, backend=backend))
    decoded = decode(codes, case.levels, length=case.length, backend="reference")
    exact = decode(codes, as_dtype(case.levels, torch.float64), length=case.length)
    # Per scale the estimator adds and subtracts the residual: a rounding of its size each time.
    size = (
        max(case.x.abs().max().item() if case.x.numel() else 0.0, 1.0) + exact.abs().max().item()
        if exact.numel()
        else 1
    )
    allowed = 4 * case.levels.schedule.num_scales * torch.finfo(torch.float32).eps * size
    if case.mask is not None:
        assert (quantized.masked_select(~case.mask[:, None]) == 0).all()
        quantized, decoded = (t.masked_fill(~case.mask[:, None], 0) for t in (quantized, decoded))
    torch.testing.assert_close(quantized, decoded, rtol=0, atol=allowed)


@examples
@given(seeds)
def test_padding_content_does_not_matter(backend, case):
    case.mask = torch.arange(case.length).expand(len(case.x), -1) % 3 != 2
    poisoned = case.x.masked_fill(~case.mask[:, None], torch.nan)
    first = quantize(case.x, case.levels, mask=case.mask, statistics=True, backend=backend)
    second = quantize(poisoned, case.levels, mask=case.mask, statistics=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    codes = encode(poisoned, case.levels, mask=case.mask, backend=backend)
    assert torch.equal(codes, first[1])


@examples
@given(seeds)
def test_a_full_mask_is_no_mask(backend, case):
    case.x, everything = case.x.contiguous(), torch.ones(len(case.x), case.length, dtype=torch.bool)
    assert torch.equal(
        encode(case.x, case.levels, mask=everything, backend=backend),
        encode(case.x, case.levels, backend=backend),
    )


def test_a_sum_of_codes_is_recovered(backend):
    """Codebooks whose scales differ by far more than their codes: the greedy search finds what was summed."""
    generator = torch.Generator().manual_seed(0)
    codebooks = (
        torch.randn(4, 20, 16, generator=generator) * torch.tensor([1.0, 0.02, 4e-4, 8e-6])[:, None, None]
    )
    levels = Levels(ScaleSchedule([9] * 4), codebooks)
    codes = torch.randint(20, (5, 36), generator=generator)
    x = decode(codes, as_dtype(levels, torch.float64)).float()
    assert torch.equal(encode(x, levels, backend=backend)[:, :27], codes[:, :27])
    first = dataclasses.replace(levels, schedule=ScaleSchedule([9]), codebooks=codebooks[:1])
    assert torch.equal(
        encode(decode(codes[:, :9], first, backend=backend), first, backend=backend), codes[:, :9]
    )


def test_plain_residual_quantization_is_a_naive_loop(backend):
    generator = torch.Generator().manual_seed(0)
    codebooks = torch.randn(5, 40, 12, generator=generator) / 2
    x = torch.randn(3, 12, 21, generator=generator)

    residual, expected = x, []
    for book in codebooks:
        distance = (residual.mT[:, :, None] - book).square().sum(-1)
        expected.append(distance.argmin(-1))
        residual = residual - book[expected[-1]].mT

    levels = Levels(ScaleSchedule([21] * 5), codebooks)
    codes = encode(x, levels, backend=backend)
    assert torch.equal(codes, torch.cat(expected, dim=1))
    torch.testing.assert_close(decode(codes, levels, backend=backend), x - residual)
    cosine = dataclasses.replace(levels, metric="cosine")
    nearest = torch.cosine_similarity(x.mT[:, :, None], codebooks[0], dim=-1).argmax(-1)
    assert torch.equal(encode(x, cosine, backend=backend)[:, :21], nearest)


@pytest.mark.parametrize(("length", "n"), [(75, 16), (7, 7), (5, 9), (10, 1), (1, 4)])
def test_area_windows(length, n):
    """Token i is the mean over [floor(i T / n), ceil((i + 1) T / n)), of real frames alone."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, length, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, length, generator=generator) < 0.5
    for b in range(2):
        for i in range(n):
            window = slice(i * length // n, -((-(i + 1) * length) // n))
            torch.testing.assert_close(area_down(rows, n)[b, i], rows[b, window].mean(dim=0))
            real = rows[b, window][mask[b, window]]
            expected = real.mean(dim=0) if len(real) else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(area_down(rows, n, mask)[b, i], expected)


@pytest.mark.parametrize(("n", "length"), [(16, 75), (1, 5), (9, 5), (3, 4)])
def test_linear_interpolation(n, length):
    """Frame t lies at (t + 1/2) n / T - 1/2 among the tokens, and stays at the ends beyond them."""
    rows = torch.randn(1, n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, row in enumerate(linear_up(rows, length)[0]):
        position = min(max((t + 0.5) * n / length - 0.5, 0.0), n - 1.0)
        left = int(position)
        weight, right = position - left, min(left + 1, n - 1)
        torch.testing.assert_close(row, (1 - weight) * rows[0, left] + weight * rows[0, right])


def test_fewer_levels_use_the_first_codebooks(backend):
    """Their codes are the first ones of the whole quantizer; training is of all codebooks or none."""
    case = make_case(3, kind="plain", sharing="absent", masked="absent", shared=False, batch=3, latent=8)
    lengths = case.levels.schedule.lengths
    codes = encode(case.x, case.levels, backend=backend)
    for count in range(1, len(lengths)):
        fewer = dataclasses.replace(case.levels, schedule=ScaleSchedule(lengths[:count]))
        assert torch.equal(encode(case.x, fewer, backend=backend), codes[:, : sum(lengths[:count])])
        expected = decode_scales(codes, case.levels, backend=backend)[count - 1]
        assert torch.equal(decode(codes[:, : sum(lengths[:count])], fewer, backend=backend), expected)
        with pytest.raises(ValueError, match="training needs a level for each"):
            quantize(case.x, fewer, backend=backend)
