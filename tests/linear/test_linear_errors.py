"""Wrong input meets the same answer on every backend: an error that names what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aar_kernels import BackendError
from aar_kernels.linear import linear, pack
from aar_kernels.nn import PackedLinear

X, WEIGHT, BIAS = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
PACKED = pack(WEIGHT)


@pytest.mark.parametrize("x", [X[:, :7], X.to(torch.int64), torch.tensor(1.0), X.T])
def test_wrong_input(backend, x):
    with pytest.raises(ValueError, match=r"x must be floating point \[\.\.\., 8\], got"):
        linear(x, PACKED, backend=backend)


@pytest.mark.parametrize("bias", [BIAS[:4], BIAS[None], BIAS.int()])
def test_wrong_bias(backend, bias):
    with pytest.raises(ValueError, match=r"bias must be floating point \[5\], got"):
        linear(X, PACKED, bias, backend=backend)


def test_wrong_activation(backend):
    with pytest.raises(ValueError, match="activation must be None or"):
        linear(X, PACKED, activation="gelu", backend=backend)


@pytest.mark.parametrize("weight", [WEIGHT[0], WEIGHT[None], WEIGHT[:0], WEIGHT[:, :0], WEIGHT.int()])
def test_wrong_weight(weight):
    with pytest.raises(ValueError, match=r"weight must be floating point \[N, K\], got"):
        pack(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.uint8])
def test_wrong_storage(backend, dtype):
    with pytest.raises(ValueError, match="dtype must be .*32, .*bfloat16, .*int8 or torch.float8_e4m3fn, got"):
        pack(WEIGHT, dtype=dtype)
    with pytest.raises(ValueError, match="a packed weight holds fp32, bf16, int8 or fp8"):
        linear(X, PACKED._replace(data=PACKED.data.to(dtype)), backend=backend)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_narrow_numbers_of_a_weight_that_is_not_finite(dtype, bad):
    weight = WEIGHT.clone()
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or an Inf"):
        pack(weight, dtype=dtype)


def test_gradients(backend):
    x, bias = X.clone().requires_grad_(), BIAS.clone().requires_grad_()
    for arguments in ((x, PACKED), (X, PACKED, bias)):
        with pytest.raises(ValueError, match="not differentiable"):
            linear(*arguments, backend=backend)
        with torch.no_grad():
            linear(*arguments, backend=backend)
    assert not linear(X, pack(WEIGHT.clone().requires_grad_()), backend=backend).requires_grad
    module = PackedLinear.from_linear(nn.Linear(8, 5))
    assert not list(module.parameters())
    assert not module(X, backend=backend).requires_grad


def test_a_forced_backend_that_cannot_run_says_why():
    with pytest.raises(BackendError, match=r"native: (computes in float32, not in torch\.float64|no native library)"):
        linear(X.double(), PACKED, backend="native")
    with pytest.raises(BackendError, match=r"native: (has no fp8|no native library)"):
        linear(X, pack(WEIGHT, dtype=torch.float8_e4m3fn), backend="native")


def test_devices_must_agree(backend):
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        linear(X.to("meta"), PACKED, backend=backend)


def test_the_binding_checks_what_could_read_outside(fast):
    """It is the last line before raw pointers."""
    int8 = pack(WEIGHT, dtype=torch.int8)
    call = torch.ops.aar_native.linear_forward
    for wrong in (
        (X[:, :7].contiguous(), PACKED.data, None, None, 5, False),
        (X, PACKED.data, None, None, 17, False),
        (X, PACKED.data, None, None, 0, False),
        (X, PACKED.data, None, BIAS[:4].clone(), 5, False),
        (X, WEIGHT, None, None, 5, False),
        (X, int8.data, None, None, 5, False),
        (X, int8.data, int8.scale[:4].clone(), None, 5, False),
        (X, PACKED.data.half(), None, None, 5, False),
        (X.T.contiguous().T, PACKED.data, None, None, 5, False),
        (X.double(), PACKED.data, None, None, 5, False),
    ):
        with pytest.raises(RuntimeError, match="aar_native"):
            call(*wrong)
