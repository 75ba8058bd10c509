"""Results against float64, what the rows of a result depend on, and what quantising the weight costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import error64
from linear_cases import DTYPES, FP8, ROWS, check, make_case, plain

from aar_kernels.linear import PackedWeight, linear, pack

names = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(backend, seed):
    check(make_case(seed), backend)


@names
@pytest.mark.parametrize("rows", ROWS)
def test_rows(fast, rows, dtype):
    check(make_case(rows, dtype, M=rows, K=300, N=161), fast)


@names
@pytest.mark.parametrize("sizes", [(24, 4096, 1024), (2, 1024, 4096), (62, 1024, 3072)], ids=str)
def test_sizes_of_a_model(fast, sizes, dtype):
    check(make_case(0, dtype, **dict(zip("MKN", sizes, strict=True))), fast)


@names
def test_more_leading_dimensions_and_strides(backend, dtype):
    case = make_case(1, dtype, M=30, K=40, N=50)
    expected = linear(case.x, case.packed, case.bias, backend=backend)
    x = case.x.view(5, 3, 2, 40)
    assert torch.equal(linear(x, case.packed, case.bias, backend=backend), expected.view(5, 3, 2, 50))
    transposed = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not transposed.is_contiguous()
    assert torch.equal(linear(transposed, case.packed, case.bias, backend=backend), expected.view(5, 3, 2, 50))
    one = linear(case.x[0], case.packed, backend=backend)
    assert one.shape == (50,)
    wide_bias = torch.randn(50, 3)
    strided = linear(case.x, case.packed, wide_bias[:, 1], backend=backend)
    assert torch.equal(strided, linear(case.x, case.packed, wide_bias[:, 1].contiguous(), backend=backend))


def test_no_rows(backend):
    case = make_case(2, M=0, K=40, N=50)
    assert linear(case.x, case.packed, backend=backend).shape == (0, 50)
    assert linear(case.x.view(3, 0, 40), case.packed, case.bias, backend=backend).shape == (3, 0, 50)


@names
def test_a_row_does_not_depend_on_the_others(fast, dtype):
    """To the last bit, through every size of tile; nor does a NaN reach another row."""
    case = make_case(3, dtype, M=64, K=600, N=100)
    alone = torch.cat([linear(row, case.packed, case.bias, activation="gelu_tanh", backend=fast)
                       for row in case.x.split(1)])  # fmt: skip
    for count in range(1, 65):
        together = linear(case.x[:count], case.packed, case.bias, activation="gelu_tanh", backend=fast)
        assert torch.equal(together, alone[:count]), count
    case.x[7, 11] = torch.nan
    poisoned = linear(case.x, case.packed, case.bias, activation="gelu_tanh", backend=fast)
    good = torch.arange(64) != 7
    assert poisoned[7].isnan().all()
    assert torch.equal(poisoned[good], alone[good])


@names
@pytest.mark.parametrize("sizes", [(1, 300, 300), (40, 300, 300), (250, 70, 16), (7, 520, 40)], ids=str)
def test_the_number_of_threads_changes_no_bit(fast, sizes, dtype):
    case = make_case(4, dtype, **dict(zip("MKN", sizes, strict=True)))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(linear(case.x, case.packed, case.bias, backend=fast))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_gelu(fast):
    """Each value that can matter, through a weight that is the identity; far from zero it is x or zero."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([0.0, 1e-30, -1e-30, 1e4, -1e4, 3e38, -3e38])])
    packed = pack(torch.ones(1, 1))
    ours = linear(x[:, None], packed, activation="gelu_tanh", backend=fast)[:, 0]
    exact = F.gelu(x.double(), approximate="tanh")
    theirs = F.gelu(x, approximate="tanh")
    eps = torch.finfo(torch.float32).eps
    small = x.abs() <= 12
    assert error64(ours[small], exact[small]) <= error64(theirs[small], exact[small]) + eps
    relative = ((ours - exact) / exact)[x > 0].abs().max()
    assert relative <= 4 * eps
    assert (ours[x < -12] == 0).all()
    assert linear(torch.tensor([[torch.nan]]), packed, activation="gelu_tanh", backend=fast).isnan().all()
    assert linear(torch.tensor([[torch.inf]]), packed, activation="gelu_tanh", backend=fast).isinf().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@names
def test_half_precision_is_computed_in_float32(backend, half, dtype):
    case = make_case(5, dtype, M=9, K=300, N=40)
    x, bias = case.x.to(half), torch.randn(40).to(half)
    result = linear(x, case.packed, bias, activation="gelu_tanh", backend=backend)
    wide = linear(x.float(), case.packed, bias.float(), activation="gelu_tanh", backend=backend)
    assert result.dtype == half
    assert torch.equal(result, wide.to(half))


def test_float64_input(fast):
    """It is the reference's alone, and exact."""
    case = make_case(6, torch.int8, M=9, K=300, N=40)._replace(bias=None, activation=None)
    assert torch.equal(linear(case.x.double(), case.packed), plain(case, torch.float64))


# ------------------------------------------------------------------------------------------------------
# the packed weight


@pytest.mark.parametrize("dtype", [*DTYPES, FP8], ids=str)
@pytest.mark.parametrize(("channels", "depth"), [(1, 1), (16, 3), (17, 8), (100, 70)])
def test_what_a_packed_weight_stands_for(channels, depth, dtype):
    """fp32 exactly, bf16 its rounding, int8 within half a unit of it, fp8 within 1/16; the largest of a row exactly."""
    weight = torch.randn(channels, depth, generator=torch.Generator().manual_seed(depth))
    packed = pack(weight, dtype=dtype)
    exact = packed.dequantize()
    assert (packed.N, packed.K, packed.dtype, exact.dtype) == (channels, depth, dtype, torch.float32)
    panels = -(-channels // 16)
    assert packed.nbytes == panels * 16 * depth * dtype.itemsize + (4 * channels if dtype in (torch.int8, FP8) else 0)
    if dtype == torch.int8:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        assert torch.equal(packed.scale, scale[:, 0])
        assert ((exact - weight).abs() <= scale * (0.5 + 1e-5)).all()
        assert packed.data.abs().amax() == 127
    elif dtype == FP8:
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        assert torch.equal(packed.scale, scale[:, 0])
        # Half of a unit of three bits of mantissa, or of the smallest denormal.
        assert ((exact - weight).abs() <= (weight.abs() / 16).maximum(scale * 2.0**-10) * (1 + 1e-5)).all()
        assert packed.data.float().abs().amax() == 448
    else:
        assert torch.equal(exact, weight.to(dtype).float())


def test_int8_of_unusual_rows():
    """Zeros stay zeros; a row of denormals, and one of the largest numbers, still lies within half a unit."""
    weight = torch.tensor([[0.0, 0.0], [1e-44, -3e-45], [3.4e38, -1.7e38], [-1.0, 0.5]])
    exact = pack(weight, dtype=torch.int8).dequantize()
    assert not exact[0].any()
    assert exact.isfinite().all()
    assert ((exact - weight).abs() <= (weight.abs().amax(1, keepdim=True) / 254 * 1.001).clamp(min=1.2e-38)).all()


def test_a_packed_weight_is_a_copy(backend):
    weight, x = torch.randn(20, 30), torch.randn(2, 30)
    packed = pack(weight)
    before = linear(x, packed, backend=backend)
    weight.zero_()
    assert torch.equal(linear(x, packed, backend=backend), before)


@names
def test_rows_as_on_a_gpu(dtype):
    """There the weight stays [N, K]; the reference reads that layout too."""
    case = make_case(7, dtype, M=5, K=40, N=50)
    flat = PackedWeight(case.packed.rows.contiguous(), case.packed.scale, 50)
    assert flat.K == 40
    assert torch.equal(flat.dequantize(), case.packed.dequantize())
    assert torch.equal(flat.to("cpu").data, case.packed.data)
    result = linear(case.x, flat, case.bias, backend="reference")
    assert torch.equal(result, linear(case.x, case.packed, case.bias, backend="reference"))


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [(torch.bfloat16, 1e-3, 2.4e-3), (torch.int8, 5e-3, 1e-2), (FP8, 2e-2, 3.2e-2)]
)
def test_what_quantisation_costs(dtype, least, most):
    """The output's relative error (rms) with normally distributed weights, 1024 to a row.

    Expected: bf16 rounds by up to 2^-9 of a number, 1.7e-3 rms over a binade's mantissas; int8 by up to half of
    max|w| / 127, which is about 3.3 standard deviations of the weight / 127: 3.3 / 127 / sqrt(12) = 7.5e-3;
    fp8 has four bits less than bf16: 1.7e-3 * 16 = 2.7e-2.
    """
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(512, 1024, generator=generator) / 32, torch.randn(64, 1024, generator=generator)
    exact = F.linear(x.double(), weight.double())
    off = linear(x, pack(weight, dtype=dtype)).double() - exact
    assert least < (off.norm() / exact.norm()).item() < most
