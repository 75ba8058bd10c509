"""The Triton backend on a GPU, compiled, against float64; the interpreter's tests do the same without one."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_accurate
from linear_cases import DTYPES, FP8, make_case, plain

from aar_kernels.linear import linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("dtype", [*DTYPES, FP8], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33, 150, 512, 513, 1000])
@pytest.mark.parametrize("sizes", [(1024, 4096), (4096, 1024), (100, 33), (257, 300)], ids=str)
def test_accuracy(sizes, rows, x_dtype, dtype):
    case = make_case(rows, dtype, M=rows, K=sizes[0], N=sizes[1])
    case = case._replace(x=case.x.to(x_dtype))
    bias = None if case.bias is None else case.bias.cuda()
    arguments = case.x.cuda(), case.packed.to("cuda"), bias
    found = linear(*arguments, activation=case.activation, backend="triton")
    assert_as_accurate(found.cpu(), plain(case, torch.float32).to(x_dtype), plain(case, torch.float64))
    assert torch.equal(linear(*arguments, activation=case.activation, backend="triton"), found)
