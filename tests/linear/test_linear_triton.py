"""The Triton backend in Triton's interpreter, against float64. Small cases: the interpreter is slow."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import interpreter
from linear_cases import DTYPES, FP8, check, make_case, plain

from aar_kernels.linear import PackedWeight, linear, pack
from aar_kernels.linear.triton_kernels import FEW_ROWS, MANY_ROWS

WEIGHTS = pytest.mark.parametrize("dtype", [*DTYPES, FP8], ids=str)


@WEIGHTS
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(seed, x_dtype, dtype):
    """Ragged in every direction."""
    sizes = {"M": (1, 3, 17, 33)[seed], "K": (1, 100, 300, 129)[seed], "N": (33, 1, 17, 100)[seed]}
    case = make_case(seed, dtype, **sizes)
    check(case._replace(x=case.x.to(x_dtype)), "triton")


@WEIGHTS
@pytest.mark.parametrize("rows", [16, FEW_ROWS, FEW_ROWS + 1, MANY_ROWS + 1])
def test_every_tile(rows, dtype):
    x_dtype = torch.float32 if rows % 2 and dtype == torch.bfloat16 else torch.bfloat16
    case = make_case(rows, dtype, M=rows, K=70, N=20)
    check(case._replace(x=case.x.to(x_dtype)), "triton")


def test_every_number_of_fp8():
    """Widened exactly, denormals and both zeros too: one weight is one product."""
    bits = torch.arange(256, dtype=torch.uint8)
    bits = bits[(bits & 0x7F) != 0x7F]  # NaN, which a packed weight has not
    rows = bits.view(FP8)[:, None]
    packed = PackedWeight(rows, torch.ones(len(bits)), len(bits))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = linear(torch.ones(1, 1, dtype=dtype), packed, backend="triton")[0]
        assert torch.equal(found, rows[:, 0].to(dtype))


@WEIGHTS
def test_rows_as_on_a_gpu(dtype):
    """There the weight lies as [N, K]."""
    case = make_case(7, dtype, M=5, K=40, N=50)
    flat = case.packed._replace(data=case.packed.rows.contiguous())
    assert torch.equal(linear(case.x, flat, backend="triton"), linear(case.x, case.packed, backend="triton"))


@WEIGHTS
def test_a_nan_reaches_its_row_alone(dtype):
    case = make_case(3, dtype, M=20, K=70, N=20)
    before = linear(case.x, case.packed, activation="gelu_tanh", backend="triton")
    case.x[7, 11] = torch.nan
    after = linear(case.x, case.packed, activation="gelu_tanh", backend="triton")
    assert after[7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(after[others], before[others])


def test_gelu_far_from_zero():
    x = torch.tensor([[-3e38], [-1e4], [-12.0], [0.0], [12.0], [1e4], [3e38], [torch.inf], [torch.nan]])
    found = linear(x, pack(torch.ones(1, 1)), activation="gelu_tanh", backend="triton")
    torch.testing.assert_close(found, torch.nn.functional.gelu(x, approximate="tanh"), equal_nan=True)


def test_strides_no_rows_and_bias_in_another_dtype():
    case = make_case(1, torch.int8, M=30, K=40, N=50)
    x, bias = case.x.T.contiguous().T, torch.randn(50, 3, dtype=torch.bfloat16)[:, 1]
    assert not x.is_contiguous()
    found = linear(x.view(5, 6, 40), case.packed, bias, backend="triton").flatten(0, 1)
    torch.testing.assert_close(found, plain(case._replace(bias=bias.float(), activation=None), torch.float32))
    assert linear(x[:0], case.packed, bias, backend="triton").shape == (0, 50)


def test_opcheck():
    case = make_case(2, torch.int8, M=5, K=40, N=50)
    arguments = (case.x.bfloat16(), case.packed.data, case.packed.scale, case.bias, 50, True, "triton")
    torch.library.opcheck(torch.ops.aar_kernels.linear_forward.default, arguments)


interpreter.isolate(globals())
