"""Random stacks and LSTMs, and how a result of one is judged."""

from __future__ import annotations

import random

import torch
from helpers import assert_as_accurate
from torch import Tensor, nn

from aar_kernels.seanet import LSTM, Conv, ConvTranspose, Residual, lstm, pack, pack_lstm, stack

# Around every width at which the kernels cut: lanes (4, 8, 16), a panel (16), two of them.
CHANNELS = (1, 2, 3, 5, 8, 15, 16, 17, 20, 24, 33, 40)
LENGTHS = (1, 2, 3, 5, 8, 13, 47, 49, 97, 300)
BLOCKS = (1, 2, 7, 40, 10_000)  # steps of a block; the last is the whole signal


def make_conv(chance: random.Random, inputs: int, outputs: int, **options) -> Conv:
    kernel, dilation = chance.choice((1, 2, 3, 7, 10)), chance.choice((1, 1, 2, 3))
    drawn = {
        "kernel": kernel, "dilation": dilation, "stride": chance.randint(1, min(5, (kernel - 1) * dilation + 1)),
        "causal": chance.random() < 0.5, "reflect": chance.random() < 0.5, "elu": chance.random() < 0.5,
        "bias": chance.random() < 0.8,
    } | options  # fmt: skip
    kernel, bias = drawn.pop("kernel"), drawn.pop("bias")
    weight = torch.randn(outputs, inputs, kernel) / (kernel * inputs) ** 0.5
    return Conv(weight, torch.randn(outputs) if bias else None, **drawn)


def make_transposed(chance: random.Random, inputs: int, outputs: int) -> ConvTranspose:
    stride = chance.choice((1, 2, 3, 5, 8))
    kernel = stride + chance.choice((0, 1, stride, 2 * stride + 1))
    weight = torch.randn(inputs, outputs, kernel) / (kernel * inputs / stride) ** 0.5
    bias = torch.randn(outputs) if chance.random() < 0.8 else None
    return ConvTranspose(weight, bias, stride, chance.random() < 0.5, chance.random() < 0.5)


def make_residual(chance: random.Random, channels: int, outputs: int) -> Residual:
    hidden = chance.choice(CHANNELS)
    first = make_conv(chance, channels, hidden, kernel=chance.choice((1, 3, 5)), stride=1)
    narrow = make_conv(chance, hidden, outputs, kernel=1, stride=1)
    shortcut = make_conv(chance, channels, outputs, kernel=1, stride=1)
    return Residual(first, narrow, None if channels == outputs and chance.random() < 0.7 else shortcut)


def make_layers(seed: int) -> list:
    """One to four layers of any kind."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    channels, layers = chance.choice(CHANNELS), []
    for _ in range(chance.randint(1, 4)):
        make = chance.choice((make_conv, make_transposed, make_residual))
        outputs = channels if make is make_residual and chance.random() < 0.5 else chance.choice(CHANNELS)
        layers.append(make(chance, channels, outputs))
        channels = outputs
    return layers


def make_wide_layers(seed: int, causal: bool = False) -> list:
    """Layers so wide that steps are computed in pairs: two taps and more, even and odd numbers of them."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    channels, layers = 64, []
    for taps in chance.sample((2, 2, 3, 4, 7), 3):
        stride, outputs, transposed = chance.choice((1, 2, 3)), chance.choice((64, 80, 96)), chance.random() < 0.5
        shape = (channels, outputs) if transposed else (outputs, channels)
        weight = torch.randn(*shape, taps * stride) / (channels * taps * (1 if transposed else stride)) ** 0.5
        make = ConvTranspose if transposed else Conv
        layers.append(make(weight, torch.randn(outputs), stride, causal=causal, elu=chance.random() < 0.5))
        channels = outputs
    return layers


def make_input(seed: int, channels: int, length: int | None = None) -> Tensor:
    chance = random.Random(seed + 1)
    length = chance.choice(LENGTHS) if length is None else length
    return torch.randn(chance.choice((1, 2, 3)), channels, length, generator=torch.Generator().manual_seed(seed))


def inputs_of(layers: list) -> int:
    return pack(layers).fields[0].inputs


def check_stack(layers: list, x: Tensor, backend: str, blocks=BLOCKS) -> None:
    """As accurate as plain PyTorch, and the same to the last bit whatever the block."""
    packed, exact = pack(layers), stack(x.double(), pack(layers, dtype=torch.float64), backend="reference")
    result = stack(x, packed, backend=backend)
    assert_as_accurate(result, stack(x, packed, backend="reference"), exact)
    for block in blocks:
        assert torch.equal(stack(x, packed, block=block, backend=backend), result), f"block {block}"


def widened(packed):
    """The same numbers in fp32."""
    return packed._replace(weights=packed.weights.float())


def check_bf16(layers: list, x: Tensor, backend: str) -> None:
    """Weights in bf16 are the numbers that they stand for: to the last bit what these give in fp32."""
    packed = pack(layers, dtype=torch.bfloat16)
    assert torch.equal(stack(x, packed, backend=backend), stack(x, widened(packed), backend=backend))


def check_lstm_bf16(seed: int, channels: int, x: Tensor, backend: str) -> None:
    packed = pack_lstm(make_lstm(seed, channels, 2)[0], dtype=torch.bfloat16)
    assert torch.equal(lstm(x, packed, backend=backend), lstm(x, widened(packed), backend=backend))


def make_lstm(seed: int, channels: int, layers: int, skip: bool = True) -> tuple[LSTM, nn.LSTM]:
    """The layer as data, and PyTorch's."""
    torch.manual_seed(seed)
    module = nn.LSTM(channels, channels, layers).requires_grad_(False)
    return LSTM(module.all_weights, skip), module


def plain_lstm(x: Tensor, module: nn.LSTM, skip: bool = True) -> Tensor:
    out = module(x.permute(2, 0, 1))[0].permute(1, 2, 0)
    return out + x if skip else out


def check_lstm(seed: int, channels: int, layers: int, x: Tensor, backend: str, skip: bool = True) -> None:
    description, module = make_lstm(seed, channels, layers, skip)
    plain = plain_lstm(x, module, skip)
    exact = plain_lstm(x.double(), module.double(), skip)
    assert_as_accurate(lstm(x, pack_lstm(description), backend=backend), plain, exact)
