"""Snake and symmetric padding on the Triton backend, in its interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import interpreter
from seanet_cases import check_bf16, check_stack, inputs_of, make_input
from snake_cases import make_dac_layers, make_unit, with_snake
from stream_cases import in_chunks, make_causal

from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import Conv, ConvTranspose, Stream, pack, stack


@pytest.mark.parametrize("seed", [1, 2, 3, 5, 6])
def test_random_stacks(seed):
    layers = make_dac_layers(seed)
    check_stack(layers, make_input(seed, inputs_of(layers), 60), "triton", blocks=())


@pytest.mark.parametrize("dilation", [1, 9])
def test_residual_unit(dilation):
    torch.manual_seed(dilation)
    check_stack([make_unit(20, dilation)], torch.randn(2, 20, 40), "triton", blocks=())
    check_bf16([make_unit(20, dilation)], torch.randn(2, 20, 40), "triton")


@pytest.mark.parametrize("length", [6, 7, 8, 30])
@pytest.mark.parametrize("reflect", [False, True])
def test_symmetric_padding(length, reflect):
    torch.manual_seed(length)
    for kernel, stride in ((4, 2), (6, 3), (8, 3)):
        conv = Conv(torch.randn(20, 5, kernel), None, stride, reflect=reflect, symmetric=True)
        transposed = ConvTranspose(torch.randn(20, 5, kernel), None, stride, symmetric=True)
        check_stack([conv, transposed], torch.randn(2, 5, length), "triton", blocks=())


@pytest.mark.parametrize("alpha", [1.0, 0.3, -2.5, 17.0])
def test_each_value_that_can_matter(alpha):
    powers = torch.logspace(-8, 12, 2001)
    x = torch.cat([torch.linspace(-20, 20, 2001), powers, -powers, torch.arange(1000) * torch.pi / alpha])
    packed = pack([Conv(torch.ones(1, 1, 1), snake=torch.tensor([alpha]))])
    exact = stack(x.double()[None, None], packed._replace(weights=packed.weights.double()), backend="reference")[0, 0]
    ours = stack(x[None, None], packed, backend="triton")[0, 0]
    assert ((ours - exact).abs() <= 4 * torch.finfo(torch.float32).eps * x.abs()).all()
    special = stack(torch.tensor([[[torch.nan, torch.inf, -torch.inf]]]), packed, backend="triton")
    assert special.isnan().all()


@pytest.mark.parametrize("seed", range(2))
def test_chunks_give_what_the_whole_gives(seed):
    net = PackedSEANet([with_snake(layer) for layer in make_causal(seed, False)])
    stream = Stream(net)
    x = torch.randn(2, net.inputs, 5 * stream.hop + 1)
    torch.testing.assert_close(in_chunks(stream, x, seed, backend="triton"), net(x, backend="triton"))


def test_no_items():
    packed = pack([make_unit(5, 3)])
    assert stack(torch.empty(0, 5, 9), packed, backend="triton").shape == (0, 5, 9)


interpreter.isolate(globals())
