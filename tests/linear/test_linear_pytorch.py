"""The operator as a citizen of PyTorch, and its module."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from linear_cases import DTYPES, make_case
from torch import nn

from aar_kernels import use_backend
from aar_kernels.linear import linear, pack
from aar_kernels.nn import PackedLinear


@pytest.mark.parametrize("seed", range(6))
def test_opcheck(backend, seed):
    """Schema, fake implementation, and tracing with dynamic shapes."""
    case = make_case(seed, DTYPES[seed % 3], M=5, K=40, N=50)
    arguments = (case.x, case.packed.data, case.packed.scale, case.bias, 50, case.activation is not None, backend)
    torch.library.opcheck(torch.ops.aar_kernels.linear_forward.default, arguments)


@pytest.fixture
def compiled(backend):
    torch.compiler.reset()
    with use_backend(backend), torch.no_grad():
        yield lambda function, **options: torch.compile(function, fullgraph=True, **options)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(compiled, dtype):
    torch.manual_seed(0)
    block = nn.Sequential(
        PackedLinear.from_linear(nn.Linear(24, 40), dtype=dtype, activation="gelu_tanh"),
        PackedLinear.from_linear(nn.Linear(40, 24), dtype=dtype),
    )
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = compiled(block, backend=counter)
    for rows in (2, 3, 7, 20):
        x = torch.randn(2, rows, 24)
        assert torch.equal(run(x), block(x))
    assert counter.frame_count <= 2  # the second is dynamic, and there is no third


def test_compiled_by_inductor(fast):
    torch.compiler.reset()
    packed, bias = pack(torch.randn(40, 24), dtype=torch.int8), torch.randn(40)

    def function(x):
        return linear(x * 2, packed, bias, activation="gelu_tanh") + 1

    with use_backend(fast), torch.no_grad():
        x = torch.randn(3, 24)
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x))
    torch.compiler.reset()


def test_inference_mode_and_autocast(backend):
    module, x = PackedLinear.from_linear(nn.Linear(24, 40)), torch.randn(3, 24)
    with torch.no_grad():
        expected = module(x, backend=backend)
    with torch.inference_mode():
        assert torch.equal(module(x, backend=backend), expected)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_module(backend, dtype, bias):
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(2, 3, 24)
    module = PackedLinear.from_linear(layer, dtype=dtype, activation="gelu_tanh")
    expected = linear(x, pack(layer.weight, dtype=dtype), layer.bias, activation="gelu_tanh", backend=backend)
    assert torch.equal(module(x, backend=backend), expected)
    other = PackedLinear.from_linear(nn.Linear(24, 40, bias=bias), dtype=dtype, activation="gelu_tanh")
    other.load_state_dict(module.state_dict())
    twin = copy.deepcopy(module)
    for parameter in layer.parameters():
        parameter.zero_()  # the module holds copies
    for each in (module, other, twin):
        assert torch.equal(each(x, backend=backend), expected)
    assert "in_features=24, out_features=40" in repr(module)


@torch.no_grad()
def test_converting_the_module(backend):
    """To bf16 the weight becomes what `pack` would have made of it; int8 keeps its numbers."""
    layer, x = nn.Linear(24, 40), torch.randn(3, 24)
    module = PackedLinear.from_linear(layer).to(torch.bfloat16)
    assert torch.equal(module.packed.data, pack(layer.weight, dtype=torch.bfloat16).data)
    assert module(x, backend=backend).dtype == torch.float32
    module = PackedLinear.from_linear(layer, dtype=torch.int8).to(torch.bfloat16)
    expected = F.linear(x, module.packed.dequantize(), module.bias.float())
    torch.testing.assert_close(module(x, backend=backend), expected)
    fp8 = PackedLinear.from_linear(layer, dtype=torch.float8_e4m3fn)
    before = fp8.packed.dequantize()
    assert torch.equal(fp8.to(torch.bfloat16).packed.dequantize(), before)
    assert fp8.data.dtype == torch.float8_e4m3fn
    meta = PackedLinear.from_linear(layer).to("meta")
    assert meta(x.to("meta")).shape == (3, 40)
