"""Causal layers, a signal in chunks, and how a stream is judged."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from seanet_cases import make_conv, make_lstm, make_residual, make_transposed, make_wide_layers

from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import Conv, Residual, Stream


def causal(layer, reflect: bool):
    if isinstance(layer, Residual):
        return replace(layer, first=causal(layer.first, reflect))
    return replace(layer, causal=True, **({"reflect": reflect} if isinstance(layer, Conv) else {}))


def make_causal(seed: int, reflect: bool) -> list:
    """Layers of every kind in random order, an LSTM among them."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    channels, layers = 3, []
    for make in chance.sample([make_conv, make_transposed, make_residual, make_conv, None], 5):
        outputs = chance.choice((1, 3, 16, 20))
        if make is None:
            layers.append(make_lstm(seed, channels, 2)[0])
        else:
            layers.append(causal(make(chance, channels, outputs), reflect))
            channels = outputs
    return layers


def in_chunks(stream: Stream, x: torch.Tensor, seed: int, **options) -> torch.Tensor:
    """Through chunks of random multiples of the hop, and a last one of any length."""
    chance, outputs, begin = random.Random(seed), [], 0
    while True:
        size = stream.hop * chance.choice((1, 1, 2, 5))
        if begin == 0:
            size = max(size, -(-stream.first // stream.hop) * stream.hop)
        chunk = x[..., begin : begin + size]
        begin += size
        last = begin > x.shape[2] or (begin == x.shape[2] and chance.random() < 0.5)  # or an empty one follows
        outputs.append(stream(chunk, last=last, **options))
        if last:
            return torch.cat(outputs, 2)


def lengths(stream: Stream, seed: int) -> list[int]:
    """A whole number of hops, not one, and less than a first chunk, than a hop."""
    chance, first = random.Random(seed), -(-stream.first // stream.hop) * stream.hop
    ragged = first + 6 * stream.hop + chance.randrange(stream.hop)
    return [first + 17 * stream.hop, ragged, chance.randint(1, first), chance.randint(1, stream.hop), 1]


def check_streams(seed: int, backend: str) -> None:
    """To the last bit what the whole gives: layers of every kind, and such as are computed in pairs of steps."""
    dtype = (torch.float32, torch.bfloat16)[seed // 2 % 2]
    for layers in (make_causal(seed, seed % 2 == 0), make_wide_layers(seed, causal=True)):
        net = PackedSEANet(layers, dtype=dtype)
        stream = Stream(net)
        for length in lengths(stream, seed):
            x = torch.randn(2, net.inputs, length, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(in_chunks(stream, x, seed, backend=backend), net(x, backend=backend))
