"""DAC's layers: Snake in place of ELU, symmetric padding."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from seanet_cases import make_layers, make_wide_layers
from torch import Tensor

from aar_kernels.seanet import LSTM, Conv, ConvTranspose, Residual


def alphas(channels: int) -> Tensor:
    return torch.randn(channels).exp() * (torch.rand(channels) - 0.1).sign()


def with_snake(layer, symmetric: bool = False):
    if isinstance(layer, LSTM):
        return layer
    if isinstance(layer, Residual):
        return replace(layer, first=with_snake(layer.first), narrow=with_snake(layer.narrow))
    channels = layer.weight.shape[0 if isinstance(layer, ConvTranspose) else 1]
    return replace(layer, elu=False, snake=alphas(channels), symmetric=symmetric, causal=layer.causal and not symmetric)


def make_dac_layers(seed: int) -> list:
    """Layers of any kind, most with Snake and, as far as their padding goes, half of them symmetric."""
    chance = random.Random(seed)
    layers = make_layers(seed) if seed % 4 else make_wide_layers(seed)
    return [with_snake(layer, chance.random() < 0.5) if chance.random() < 0.8 else layer for layer in layers]


def long_enough(layers: list, x: Tensor) -> Tensor:
    """Without what fills up the last stride, a layer can leave nothing of a short signal."""
    return x if x.shape[2] > 200 else torch.cat([x, torch.randn(*x.shape[:2], 200)], 2)


def make_unit(channels: int, dilation: int) -> Residual:
    """DAC's residual unit, of wide and narrow weights."""
    first = Conv(torch.randn(channels, channels, 7) / (7 * channels) ** 0.5, torch.randn(channels), dilation=dilation)
    first = replace(first, reflect=False, snake=alphas(channels))
    narrow = Conv(torch.randn(channels, channels, 1) / channels**0.5, torch.randn(channels), snake=alphas(channels))
    return Residual(first, narrow)
