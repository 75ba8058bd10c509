"""Norms over time, alone and behind convolutions, and how a result of one is judged."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from helpers import assert_as_accurate
from seanet_cases import CHANNELS, make_conv, make_residual, make_transposed

from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import ConvTranspose, Norm, Residual, norm_


def check_norm(channels: int, length: int, batch: int, offset: float, added: bool, backend: str) -> None:
    """``offset``: how far the mean is from 0, in deviations."""
    generator = torch.Generator().manual_seed(channels * length)
    x, add = (torch.randn(batch, length, channels, generator=generator).mT for _ in range(2))
    x = (x + offset).mT.contiguous().mT
    scale, shift = torch.randn(2, channels, generator=generator)
    plain = torch.group_norm(x, 1, scale, shift) + (add if added else 0)
    exact = torch.group_norm(x.double(), 1, scale.double(), shift.double()) + (add.double() if added else 0)
    result = norm_(x, scale, shift, add=add if added else None, backend=backend)
    assert result is x
    assert_as_accurate(x, plain, exact)


def with_norm(layer, chance: random.Random):
    if isinstance(layer, Residual):
        convs = {"first": layer.first, "narrow": layer.narrow, "shortcut": layer.shortcut}
        return Residual(**{name: None if conv is None else with_norm(conv, chance) for name, conv in convs.items()})
    outputs = layer.weight.shape[1 if isinstance(layer, ConvTranspose) else 0]
    return replace(layer, norm=Norm(torch.randn(outputs), torch.randn(outputs), chance.choice((1e-5, 1e-3))))


def make_normed_layers(seed: int) -> list:
    """Two or three layers with norms, a residual block among them, and one without behind."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    inputs, middle, outputs = (chance.choice(CHANNELS) for _ in range(3))
    layers = [make_conv(chance, inputs, middle), make_residual(chance, middle, middle)]
    layers.append(make_transposed(chance, middle, outputs))
    return [with_norm(layer, chance) for layer in layers] + [make_conv(chance, outputs, 2)]


def check_normed_layers(seed: int, length: int, backend: str) -> None:
    layers = make_normed_layers(seed)
    x = torch.randn(2, PackedSEANet(layers).inputs, length, generator=torch.Generator().manual_seed(seed))
    exact = PackedSEANet(layers, dtype=torch.float64)(x.double(), backend="reference")
    net = PackedSEANet(layers)
    assert_as_accurate(net(x, backend=backend), net(x, backend="reference"), exact)
