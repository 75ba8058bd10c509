"""Every backend against plain PyTorch modules in float64, in the shapes at which kernels go wrong."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from seanet_cases import (
    check_bf16,
    check_lstm,
    check_lstm_bf16,
    check_stack,
    inputs_of,
    make_conv,
    make_input,
    make_layers,
    make_lstm,
    make_residual,
    make_transposed,
    make_wide_layers,
)
from torch import nn

from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import Conv, ConvTranspose, Residual, lstm, pack, pack_lstm, stack


@pytest.mark.parametrize("seed", range(100))
def test_random_stacks(fast, seed):
    layers = make_layers(seed)
    check_stack(layers, make_input(seed, inputs_of(layers)), fast)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 9, 1000, 100_000])
def test_lengths(fast, length):
    """Down to signals that are shorter than their padding, up to one of many blocks."""
    torch.manual_seed(length)
    layers = [
        Conv(torch.randn(8, 1, 7) / 3),
        Residual(
            Conv(torch.randn(4, 8, 3) / 5, dilation=2),
            Conv(torch.randn(8, 4, 1) / 2),
            Conv(torch.randn(8, 8, 1) / 3),
        ),
        Conv(torch.randn(12, 8, 10) / 9, stride=5, elu=True),
        ConvTranspose(torch.randn(12, 3, 10) / 5, stride=5, elu=True),
    ]
    check_stack(layers, torch.randn(2, 1, length), fast, blocks=(1, 11, 5000) if length < 10_000 else (5000,))


@pytest.mark.parametrize("channels", [(300, 70), (40, 300), (129, 128)])
def test_sums_longer_than_a_chain(fast, channels):
    torch.manual_seed(0)
    inputs, outputs = channels
    layers = [
        Conv(torch.randn(outputs, inputs, 8) / (8 * inputs) ** 0.5, torch.randn(outputs), stride=4),
        ConvTranspose(torch.randn(outputs, inputs, 8) / (2 * outputs) ** 0.5, torch.randn(inputs), stride=4, elu=True),
    ]
    check_stack(layers, torch.randn(1, inputs, 203), fast)


@pytest.mark.parametrize("length", [1, 2, 3, 14, 97, 260])
@pytest.mark.parametrize("seed", range(5))
def test_steps_in_pairs(fast, seed, length):
    """Blocks that begin and end inside a pair change nothing."""
    check_stack(make_wide_layers(seed), make_input(seed, 64, length), fast)


def test_pairs_of_long_sums(fast):
    """The latents' convolution in its published size, and half of it: many chains of each of seven taps."""
    torch.manual_seed(0)
    layers = [Conv(torch.randn(512, 256, 7) / 42, torch.randn(512), elu=True), Conv(torch.randn(256, 512, 7) / 60)]
    check_stack(layers, torch.randn(1, 256, 75), fast, blocks=(7,))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("make", [make_layers, make_wide_layers])
def test_threads_and_batch_change_nothing(fast, make, threads, batch):
    layers = make(5)
    x = torch.randn(7, inputs_of(layers), 500, generator=torch.Generator().manual_seed(0))
    description, _ = make_lstm(0, 40, 2)
    y = torch.randn(7, 40, 50, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([stack(item[None], pack(layers), backend=fast) for item in x])
        alone_lstm = torch.cat([lstm(item[None], pack_lstm(description), backend=fast) for item in y])
        torch.set_num_threads(threads)
        assert torch.equal(stack(x[:batch], pack(layers), backend=fast), alone[:batch])
        assert torch.equal(lstm(y[:batch], pack_lstm(description), backend=fast), alone_lstm[:batch])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@pytest.mark.parametrize("channels", [1, 5, 16, 40, 100])
def test_lstm(backend, channels, batch):
    """Against nn.LSTM, over more steps than are prepared at once."""
    x = torch.randn(batch, channels, 300 // batch, generator=torch.Generator().manual_seed(channels))
    check_lstm(channels, channels, 1 + channels % 3, x, backend, skip=batch > 1)


def test_lstm_saturated(fast):
    """Gates far from zero: sigmoid and tanh reach their limits without overflow."""
    x = torch.randn(2, 16, 20) * 1e4
    check_lstm(0, 16, 1, x, fast, skip=False)
    description, _ = make_lstm(0, 16, 1)
    x[1, 3, 5] = torch.nan
    out = lstm(x, pack_lstm(description), backend=fast)
    assert out[0].isfinite().all()
    assert out[1, :, 5:].isnan().all()


def test_elu(fast):
    """Each value that can matter, through a convolution that is the identity; it is accurate near zero too."""
    x = torch.cat([torch.linspace(-20, 5, 20001), torch.tensor([0.0, -1e-30, 1e-30, -1e-7, -1e4, 3e38, -3e38])])
    packed = pack([Conv(torch.ones(1, 1, 1), elu=True)])
    ours = stack(x[None, None], packed, backend=fast)[0, 0]
    exact = F.elu(x.double())
    assert ((ours - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs()).all()
    special = stack(torch.tensor([[[torch.nan, torch.inf, -torch.inf]]]), packed, backend=fast)[0, 0]
    assert special[0].isnan()
    assert special[1:].tolist() == [torch.inf, -1.0]


@pytest.mark.parametrize("seed", range(20))
def test_bf16_weights(backend, seed):
    layers = make_layers(seed) if seed % 4 else make_wide_layers(seed)
    check_bf16(layers, make_input(seed, inputs_of(layers)), backend)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", [5, 40, 100])
def test_bf16_lstm(backend, channels, batch):
    x = torch.randn(batch, channels, 30, generator=torch.Generator().manual_seed(channels))
    check_lstm_bf16(channels, channels, x, backend)


def test_bf16_is_near(backend):
    """What bf16 costs in accuracy: each weight is rounded by up to 2^-9, and errors add up as random numbers do."""
    layers, x = make_wide_layers(1), make_input(1, 64, 100)
    fp32, bf16 = (stack(x, pack(layers, dtype=dtype), backend=backend) for dtype in (torch.float32, torch.bfloat16))
    assert 1e-4 < (bf16 - fp32).norm() / fp32.norm() < 1e-2


# ------------------------------------------------------------------------------------------------------
# the reference, which is the definition, against PyTorch's modules and EnCodec's padding


@pytest.mark.parametrize("seed", range(20))
def test_conv_is_conv1d_with_encodec_padding(backend, seed):
    torch.manual_seed(seed)
    conv = make_conv(random.Random(seed), 3, 5)
    x = make_input(seed, 3).double() if backend == "reference" else make_input(seed, 3)
    span = (conv.weight.shape[2] - 1) * conv.dilation + 1
    extra = -x.shape[-1] % conv.stride
    total = span - conv.stride
    left, right = (total, extra) if conv.causal else (total - total // 2, total // 2 + extra)

    def plain(x):
        y = F.elu(x) if conv.elu else x
        if conv.reflect:  # as encodec.modules.conv.pad1d
            short = max(0, max(left, right) - y.shape[-1] + 1)
            y = F.pad(F.pad(y, (0, short)), (left, right), mode="reflect")
            y = y[..., : y.shape[-1] - short]
        else:
            y = F.pad(y, (left, right))
        bias = None if conv.bias is None else conv.bias.to(x.dtype)
        return F.conv1d(y, conv.weight.to(x.dtype), bias, conv.stride, dilation=conv.dilation)

    result = stack(x, pack([conv], dtype=x.dtype), backend=backend)
    assert result.shape[-1] == -(-x.shape[-1] // conv.stride)
    assert_as_accurate(result, plain(x), plain(x.double()))


@pytest.mark.parametrize("seed", range(20))
def test_conv_transpose_is_trimmed(backend, seed):
    torch.manual_seed(seed)
    layer, x = make_transposed(random.Random(seed), 3, 5), make_input(seed, 3)
    total = layer.weight.shape[2] - layer.stride
    left = 0 if layer.causal else total - total // 2

    def plain(x):
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        y = F.conv_transpose1d(F.elu(x) if layer.elu else x, layer.weight.to(x.dtype), bias, layer.stride)
        return y[..., left : left + x.shape[-1] * layer.stride]

    assert_as_accurate(stack(x, pack([layer]), backend=backend), plain(x), plain(x.double()))


@pytest.mark.parametrize("seed", range(10))
def test_residual_is_its_convolutions(backend, seed):
    torch.manual_seed(seed)
    block, x = make_residual(random.Random(seed), 6, 6), make_input(seed, 6)

    def plain(x):
        def run(conv, x, elu):
            alone = Conv(conv.weight, conv.bias, 1, conv.dilation, conv.causal, conv.reflect, elu)
            return stack(x, pack([alone], dtype=x.dtype), backend="reference")

        narrow = run(block.narrow, run(block.first, x, True), True)
        return narrow + (x if block.shortcut is None else run(block.shortcut, x, False))

    assert_as_accurate(stack(x, pack([block]), backend=backend), plain(x), plain(x.double()))


@pytest.mark.parametrize("channels", [2, 64])
def test_nan_stays_where_it_is_seen(fast, channels):
    """A NaN reaches the outputs whose window holds it, and no others, in a pair or not."""
    torch.manual_seed(0)
    layers = [Conv(torch.randn(64, channels, 5), reflect=False), Conv(torch.randn(3, 64, 1), elu=True)]
    x = torch.randn(1, channels, 50)
    x[0, 1, 20] = torch.nan
    out = stack(x, pack(layers), backend=fast)
    assert out[0, :, 18:23].isnan().all()
    assert out[0, :, :18].isfinite().all()
    assert out[0, :, 23:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nn_modules_in_sequence(dtype):
    """PackedSEANet runs stacks and LSTMs in turn."""
    description, module = make_lstm(0, 8, 2)
    before, after = nn.Conv1d(1, 8, 8, 4, dtype=dtype), nn.ConvTranspose1d(8, 1, 8, 4, dtype=dtype)
    layers = [
        Conv(before.weight, before.bias, 4),
        description,
        ConvTranspose(after.weight, after.bias, 4, elu=True),
    ]
    packed = PackedSEANet(layers, dtype=dtype)
    x = torch.randn(2, 1, 100, dtype=dtype)
    with torch.no_grad():
        y = before(F.pad(x, (2, 2), mode="reflect"))
        y = module.to(dtype)(y.permute(2, 0, 1))[0].permute(1, 2, 0) + y
        y = after(F.elu(y))[..., 2:-2]
        torch.testing.assert_close(packed(x), y)
