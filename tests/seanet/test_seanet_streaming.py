"""A signal in chunks gives what the whole gives."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers import assert_as_accurate
from seanet_cases import make_conv, make_lstm, make_residual, make_transposed, make_wide_layers

from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import Conv, Residual, Stream
from aar_kernels.seanet.encodec import encodec_layers


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


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_chunks_give_what_the_whole_gives(backend, seed, reflect):
    layers = make_causal(seed, reflect)
    net, exact = PackedSEANet(layers), PackedSEANet(layers, dtype=torch.float64)
    stream = Stream(net)
    for length in lengths(stream, seed):
        x = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(seed))
        whole = net(x, backend=backend)
        for again in range(2):  # a last chunk is followed by the first of another signal
            result = in_chunks(stream, x, seed + again, backend=backend)
            if backend == "reference":
                assert_as_accurate(result, whole, exact(x.double()))
            else:
                assert torch.equal(result, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_chunks_that_end_inside_a_pair(fast, seed, dtype):
    layers = make_wide_layers(seed, causal=True)
    net = PackedSEANet([*layers, make_lstm(seed, layers[-1].bias.shape[0], 1)[0]], dtype=dtype)
    stream = Stream(net)
    for length in lengths(stream, seed):
        x = torch.randn(2, 64, length, generator=torch.Generator().manual_seed(seed))
        for again in range(2):
            assert torch.equal(in_chunks(stream, x, seed + again, backend=fast), net(x, backend=fast))


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("kernel", [3, 4, 5, 8])
def test_last_strides(fast, kernel, reflect):
    """A kernel as long as its stride needs no step before it, but those that the end of a signal mirrors."""
    torch.manual_seed(0)
    net = PackedSEANet([Conv(torch.randn(5, 2, kernel), stride=kernel // 3 * 2 + 1, causal=True, reflect=reflect)])
    stream = Stream(net)
    for length in range(1, 8 * stream.hop):
        x = torch.randn(1, 2, length)
        assert torch.equal(in_chunks(stream, x, length, backend=fast), net(x, backend=fast)), length


def test_lstm_alone(fast):
    """Its state after any number of steps, odd and even, is what the next steps need."""
    net = PackedSEANet([make_lstm(1, 33, 2)[0]])
    x = torch.randn(3, 33, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(in_chunks(Stream(net), x, 3, backend=fast), net(x, backend=fast))


def test_reset_forgets_the_signal(fast):
    stream = Stream(net := PackedSEANet(make_causal(3, True)))
    x = torch.randn(1, 3, 4 * -(-stream.first // stream.hop) * stream.hop)
    stream(x, backend=fast)
    stream.reset()
    assert torch.equal(stream(x, backend=fast), net(x, backend=fast))


@torch.no_grad()
def test_encodec(fast):
    """The 24 kHz model's structure is causal: encoder and decoder stream."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.EncodecConfig(num_filters=4, hidden_size=20, upsampling_ratios=[3, 2], num_lstm_layers=1)
    model = transformers.EncodecModel(config).eval()
    x = torch.randn(1, 1, 601, generator=torch.Generator().manual_seed(0))
    for network, hop, signal in ((model.encoder, 6, x), (model.decoder, 1, model.encoder(x))):
        stream = Stream(PackedSEANet(encodec_layers(network)))
        assert stream.hop == hop
        torch.testing.assert_close(in_chunks(stream, signal, 0, backend=fast), network(signal), rtol=1e-4, atol=1e-6)


def test_what_cannot_stream():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="needs causal layers"):
        Stream(PackedSEANet([Conv(torch.randn(3, 3, 3))]))
    Stream(PackedSEANet([Conv(torch.randn(3, 3, 1))]))  # sees one step only
    stream = Stream(PackedSEANet([Conv(torch.randn(3, 2, 8), stride=4, causal=True)]))
    assert (stream.hop, stream.first) == (4, 5)
    with pytest.raises(ValueError, match="T a multiple of 4"):
        stream(torch.randn(1, 2, 9))
    with pytest.raises(ValueError, match="the first chunk needs 5 steps for reflect padding, got 4"):
        stream(torch.randn(1, 2, 4))
    assert stream(torch.randn(1, 2, 8)).shape == (1, 3, 2)
    assert stream(torch.randn(1, 2, 4)).shape == (1, 3, 1)
    with pytest.raises(ValueError, match="a chunk without steps"):
        stream(torch.randn(1, 2, 0))
    assert stream(torch.randn(1, 2, 0), last=True).shape == (1, 3, 0)
    with pytest.raises(ValueError, match="a chunk without steps"):
        stream(torch.randn(1, 2, 0), last=True)
