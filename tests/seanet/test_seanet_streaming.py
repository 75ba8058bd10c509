"""A signal in chunks gives what the whole gives."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_accurate
from seanet_cases import make_lstm, make_wide_layers
from stream_cases import in_chunks, lengths, make_causal

from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import Conv, ConvTranspose, Stream, pack, stack
from aar_kernels.seanet.api import stack_chunk
from aar_kernels.seanet.encodec import encodec_layers


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


def causal_stack():
    """Layers that keep steps for every reason: before a stride, for the mirrored end, and without ELU or with it."""
    torch.manual_seed(0)
    return pack([
        Conv(torch.randn(5, 2, 7) / 4, torch.randn(5), causal=True),
        Conv(torch.randn(7, 5, 4) / 5, torch.randn(7), stride=4, causal=True, elu=True),
        ConvTranspose(torch.randn(7, 3, 6) / 5, torch.randn(3), stride=3, causal=True, elu=True),
    ])  # fmt: skip


@pytest.mark.parametrize("block", [1, 2, 7, 40])
def test_blocks_change_nothing(fast, block):
    packed, x = causal_stack(), torch.randn(2, 2, 80, generator=torch.Generator().manual_seed(0))
    whole, state, parts = stack(x, packed, backend=fast), torch.empty(2, packed.state_size), []
    for begin, end in ((0, 12), (12, 16), (16, 56), (56, 80)):
        options = {"last": end == 80, "block": block, "backend": fast}
        parts.append(stack_chunk(x[..., begin:end], packed, state, begin, **options))
    assert torch.equal(torch.cat(parts, 2), whole)


def test_states_are_those_of_the_reference(fast):
    """A stream may go on with another backend."""
    packed, x = causal_stack(), torch.randn(2, 2, 28, generator=torch.Generator().manual_seed(0))
    states = torch.full((2, 2, packed.state_size), torch.nan)
    for name, state in zip((fast, "reference"), states, strict=True):
        for position in (0, 20):
            stack_chunk(x[..., position : position + 20 - position // 5 * 3], packed, state, position, backend=name)
    assert states[0].isfinite().all()
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-5)


def test_layers_of_one_run_are_one_call(fast):
    """Of an encoder with an LSTM there are three."""
    layers = [Conv(torch.randn(6, 6, 3), causal=True)] * 3
    stream = Stream(PackedSEANet([*layers, make_lstm(0, 6, 1)[0], *layers]))
    stream(torch.randn(1, 6, 8), backend=fast)
    with torch.profiler.profile() as profile:
        stream(torch.randn(1, 6, 1), backend=fast)
    calls = [event.name for event in profile.events() if event.name.startswith("aar_native::")]
    assert calls == [f"aar_native::seanet_{name}" for name in ("stack_chunk", "lstm", "stack_chunk")]


def test_refused_chunks_leave_the_stream_as_it_was(backend):
    stream = Stream(net := PackedSEANet(make_causal(3, True)))
    size = -(-stream.first // stream.hop) * stream.hop
    x = torch.randn(2, 3, 2 * size)
    with pytest.raises(ValueError, match="x must be"):
        stream(x[..., :size].double(), backend=backend)
    parts = [stream(x[..., :size], backend=backend)]
    with pytest.raises(ValueError, match=r"state must be torch\.float32 \[1, size\], got torch\.float32 \[2, "):
        stream(x[:1, :, size:], backend=backend)
    parts.append(stream(x[..., size:], last=True, backend=backend))
    torch.testing.assert_close(torch.cat(parts, 2), net(x, backend=backend), rtol=1e-4, atol=1e-5)


def test_inference_mode(backend):
    stream = Stream(net := PackedSEANet(make_causal(3, True)))
    size = -(-stream.first // stream.hop) * stream.hop
    x = torch.randn(2, 3, 2 * size)
    with torch.inference_mode():
        parts = [stream(chunk, backend=backend) for chunk in x.split(size, 2)]
    torch.testing.assert_close(torch.cat(parts, 2), net(x, backend=backend), rtol=1e-4, atol=1e-5)


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
