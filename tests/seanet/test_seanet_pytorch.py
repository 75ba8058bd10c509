"""The operators as citizens of PyTorch, and their module."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from seanet_cases import inputs_of, make_input, make_layers, make_lstm

from aar_kernels import use_backend
from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import Conv, lstm, module, pack, pack_lstm, stack
from aar_kernels.seanet.api import stack_chunk


@pytest.mark.parametrize("seed", range(4))
def test_opcheck(backend, seed):
    """Schemas, fake implementations, and tracing with dynamic shapes."""
    layers = make_layers(seed)
    packed, x = pack(layers), make_input(seed, inputs_of(layers), 30).mT
    arguments = (x, packed.weights, packed.layers, seed, backend)
    torch.library.opcheck(torch.ops.aar_kernels.seanet_stack.default, arguments)
    packed = pack([Conv(torch.randn(5, 3, 4), stride=2, causal=True)])
    for position in (0, 4):
        arguments = (torch.randn(2, 8, 3), packed.weights, packed.layers, torch.randn(2, packed.state_size), position)
        torch.library.opcheck(torch.ops.aar_kernels.seanet_stack_chunk.default, (*arguments, seed % 2 == 0, 0, backend))
    packed = pack_lstm(make_lstm(seed, 6, 2)[0])
    state = torch.randn(2, 2, 2, 6) if seed > 1 else None
    arguments = (torch.randn(2, 7, 6), packed.weights, 6, seed % 2 == 0, state, backend)
    torch.library.opcheck(torch.ops.aar_kernels.seanet_lstm.default, arguments)


def small_net() -> PackedSEANet:
    torch.manual_seed(0)
    narrow = Conv(torch.randn(3, 6, 1), elu=True)
    return PackedSEANet([Conv(torch.randn(6, 2, 5), stride=2), make_lstm(0, 6, 1)[0], narrow])


def test_compiled(backend):
    """Without a break, with numerics equal to eager, and once for all lengths."""
    torch.compiler.reset()
    net, counter = small_net(), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with use_backend(backend), torch.no_grad():
        run = torch.compile(net, fullgraph=True, backend=counter)
        for length in (9, 20, 33, 57):
            x = torch.randn(2, 2, length)
            assert torch.equal(run(x), net(x))
    assert counter.frame_count <= 2  # the second is dynamic, and there is no third
    torch.compiler.reset()


def test_compiled_chunks(backend):
    """The state is written in place, and positions are no constants."""
    torch.compiler.reset()
    packed = pack([Conv(torch.randn(5, 2, 4), stride=2, causal=True)])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    x, state = torch.randn(2, 2, 40), torch.empty(2, packed.state_size)
    with torch.no_grad():
        run = torch.compile(partial(stack_chunk, backend=backend), fullgraph=True, backend=counter)
        chunks = [run(x[..., at : at + 4], packed, state, at) for at in range(0, 40, 4)]
        torch.testing.assert_close(torch.cat(chunks, 2), stack(x, packed, backend=backend), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3  # the first, another that is no beginning, and all others
    torch.compiler.reset()


def test_compiled_by_inductor(fast):
    torch.compiler.reset()
    net, x = small_net(), torch.randn(2, 2, 30)

    def function(x):
        return net(x * 2) + 1

    with use_backend(fast), torch.no_grad():
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x))
    torch.compiler.reset()


def test_empty_batch(backend):
    packed = pack(make_layers(1))
    x = torch.randn(0, packed.fields[0].inputs, 9)
    assert stack(x, packed, backend=backend).shape[0] == 0
    assert lstm(torch.randn(0, 6, 9), pack_lstm(make_lstm(0, 6, 1)[0]), backend=backend).shape == (0, 6, 9)


def test_inputs_that_are_views(backend):
    """Transposed, strided, expanded; the results lie channels last."""
    layers = [Conv(torch.randn(4, 6, 3), torch.randn(4))]
    packed, packed_lstm = pack(layers), pack_lstm(make_lstm(0, 6, 1)[0])
    x = torch.randn(2, 6, 20)
    views = [x.mT.contiguous().mT, torch.randn(2, 6, 40)[..., ::2].copy_(x), x.flip(0).flip(0)]
    for run, weights in ((stack, packed), (lstm, packed_lstm)):
        expected = run(x, weights, backend=backend)
        assert expected.mT.is_contiguous()
        assert all(torch.equal(run(view, weights, backend=backend), expected) for view in views)
        expanded = run(x[:1].expand(3, -1, -1), weights, backend=backend)
        torch.testing.assert_close(expanded, expected[:1].expand(3, -1, -1))


def test_inference_mode_and_autocast(backend):
    net, x = small_net(), torch.randn(2, 2, 30)
    expected = net(x, backend=backend)
    with torch.inference_mode():
        assert torch.equal(net(x, backend=backend), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(x, backend=backend), expected)


def test_module(backend):
    net, other, x = small_net(), small_net(), torch.randn(2, 2, 30)
    expected = net(x, backend=backend)
    assert not list(net.parameters())
    for buffer in other.buffers():
        buffer.zero_()
    assert not torch.equal(other(x, backend=backend), expected)
    other.load_state_dict(net.state_dict())
    for each in (other, copy.deepcopy(net)):
        assert torch.equal(each(x, backend=backend), expected)


def test_packed_weights_are_copies(backend):
    layers, (description, module) = [Conv(torch.randn(4, 6, 3), torch.randn(4))], make_lstm(0, 6, 1)
    packed, packed_lstm, x = pack(layers), pack_lstm(description), torch.randn(2, 6, 20)
    before = stack(x, packed, backend=backend), lstm(x, packed_lstm, backend=backend)
    for tensor in (layers[0].weight, layers[0].bias, *module.parameters()):
        tensor.zero_()
    assert torch.equal(stack(x, packed, backend=backend), before[0])
    assert torch.equal(lstm(x, packed_lstm, backend=backend), before[1])


@pytest.mark.parametrize("first", [False, True])
def test_long_signals_pass_an_lstm_in_chunks(backend, first, monkeypatch):
    """In place, so that there is one signal of its width in memory; the net's own input is nobody's to overwrite."""
    torch.manual_seed(0)
    layers = [Conv(torch.randn(6, 6, 3)), make_lstm(0, 6, 2)[0], Conv(torch.randn(3, 6, 1), elu=True)]
    net, x = PackedSEANet(layers[1:] if first else layers), torch.randn(2, 6, 50)
    expected, kept = net(x, backend=backend), x.clone()
    monkeypatch.setattr(module, "LSTM_STEPS", 16)
    ours = net(x, backend=backend)
    assert torch.equal(ours, expected) if backend == "native" else torch.allclose(ours, expected, atol=1e-5)
    assert torch.equal(x, kept)
