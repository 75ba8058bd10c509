"""The Triton backend in Triton's interpreter, against the float64 reference. Small cases: the interpreter is slow.

The LSTM is PyTorch's here, which on a GPU is cuDNN's: what is tested is what goes into it and comes out.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import interpreter
from helpers import assert_as_accurate
from normed_cases import check_norm, check_normed_layers
from seanet_cases import (
    check_bf16,
    check_lstm,
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
from test_seanet_streaming import in_chunks, lengths, make_causal

from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import Conv, Residual, Stream, lstm, pack, pack_lstm, stack, triton_kernels
from aar_kernels.seanet import triton as backend


def short_input(seed: int, layers: list) -> torch.Tensor:
    return make_input(seed, inputs_of(layers), 1 + seed * 7 % 40)


@pytest.mark.parametrize("seed", range(14))
def test_random_stacks(seed):
    layers = make_layers(seed)
    check_stack(layers, short_input(seed, layers), "triton", blocks=())


@pytest.mark.parametrize("make", [make_conv, make_transposed, make_residual])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 33, 300])
def test_lengths(make, length):
    """Down to signals that are shorter than their padding."""
    torch.manual_seed(length)
    for seed in range(2):
        layers = [make(random.Random(seed + length), 3, 17)]
        check_stack(layers, make_input(seed, 3, length), "triton", blocks=())


@pytest.mark.parametrize("widest", [16, 128])
@pytest.mark.parametrize("shortcut", [True, False])
def test_residual_blocks_in_one_launch_and_in_two(monkeypatch, shortcut, widest):
    """Causal or not, and where the input begins with what came before."""
    monkeypatch.setattr(triton_kernels, "FUSED_CHANNELS", widest)
    torch.manual_seed(0)
    first = Conv(torch.randn(20, 33, 3) / 10, torch.randn(20), dilation=2)
    narrow, around = (Conv(torch.randn(33, n, 1) / n**0.5, torch.randn(33)) for n in (20, 33))
    block = Residual(first, narrow, around if shortcut else None)
    check_stack([block], torch.randn(2, 33, 40), "triton", blocks=())
    block = replace(block, first=replace(first, causal=True))
    check_stack([block], x := torch.randn(2, 33, 40), "triton", blocks=())
    net = PackedSEANet([block])
    torch.testing.assert_close(in_chunks(Stream(net), x, 0, backend="triton"), net(x, backend="triton"))


@pytest.mark.parametrize("channels", [(260, 40), (40, 70)])
def test_whole_tiles_and_parts_of_them(channels):
    """More steps, columns and channels than a tile, of wide layers and of others; the items share tiles."""
    torch.manual_seed(0)
    inputs, outputs = channels
    conv = Conv(torch.randn(outputs, inputs, 4) / (4 * inputs) ** 0.5, torch.randn(outputs), stride=2, elu=True)
    check_stack([conv], torch.randn(3, inputs, 75), "triton", blocks=())


def test_elu():
    """Accurate near zero too, and where it ends."""
    x = torch.cat([torch.linspace(-20, 5, 2001), torch.tensor([0.0, -1e-30, 1e-30, -1e-7, -1e4, 3e38, -3e38])])
    packed = pack([Conv(torch.ones(1, 1, 1), elu=True)])
    exact = F.elu(x.double())
    error = (stack(x[None, None], packed, backend="triton")[0, 0] - exact).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * exact.abs()).all()
    special = stack(torch.tensor([[[torch.nan, torch.inf, -torch.inf]]]), packed, backend="triton")[0, 0]
    assert special[0].isnan()
    assert special[1:].tolist() == [torch.inf, -1.0]


@pytest.mark.parametrize("seed", range(4))
def test_bf16_weights(seed):
    layers = make_layers(seed) if seed else make_wide_layers(seed)
    check_bf16(layers, short_input(seed, layers), "triton")


@pytest.mark.parametrize("seed", range(5))
def test_fp16(seed):
    """As accurate as PyTorch in fp16, which rounds each layer's output too."""
    layers = make_layers(seed)
    x, packed = short_input(seed, layers).half(), pack(layers, dtype=torch.float16)
    exact = stack(x.double(), packed._replace(weights=packed.weights.double()), backend="reference")
    plain = stack(x, packed, backend="reference")
    assert_as_accurate(stack(x, packed, backend="triton"), plain, exact)


def test_an_item_does_not_depend_on_the_others():
    layers = make_layers(5)
    x, packed = torch.randn(5, inputs_of(layers), 13), pack(layers)
    together = stack(x, packed, backend="triton")
    x[1] = torch.nan
    assert torch.equal(stack(x, packed, backend="triton")[[0, 2, 3, 4]], together[[0, 2, 3, 4]])


def test_no_items():
    packed = pack(make_layers(5))
    x = torch.empty(0, packed.fields[0].inputs, 13)
    assert stack(x, packed, backend="triton").shape == stack(x, packed, backend="reference").shape


@pytest.mark.parametrize("channels", [1, 5, 33])
@pytest.mark.parametrize("skip", [True, False])
def test_lstm(channels, skip):
    x = torch.randn(2, channels, 40, generator=torch.Generator().manual_seed(channels))
    check_lstm(channels, channels, 1 + channels % 3, x, "triton", skip=skip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lstm_state(dtype):
    packed = pack_lstm(make_lstm(0, 20, 2)[0], dtype=dtype)
    x, state = torch.randn(3, 20, 17), torch.randn(2, 2, 3, 20)
    results = [lstm(x, packed, state=state, return_state=True, backend=name) for name in ("triton", "reference")]
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_lstm_weights_are_unpacked_once_and_never_stale():
    packed = pack_lstm(make_lstm(0, 20, 2)[0])
    x = torch.randn(3, 20, 17)
    before, entries = lstm(x, packed, backend="triton"), len(backend._lstms)
    assert torch.equal(lstm(x, packed, backend="triton"), before)
    assert len(backend._lstms) == entries
    packed.weights.neg_()
    torch.testing.assert_close(
        lstm(x, packed, backend="triton"), lstm(x, packed, backend="reference"), rtol=1e-5, atol=1e-6
    )
    del packed
    assert len(backend._lstms) == entries - 1


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_chunks_give_what_the_whole_gives(seed, reflect):
    """To rounding: the interpreter's product of a row depends on its place in the tile."""
    layers = make_causal(seed, reflect)
    net, exact = PackedSEANet(layers), PackedSEANet(layers, dtype=torch.float64)
    stream = Stream(net)
    for length in lengths(stream, seed)[2:]:
        x = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(seed))
        result = in_chunks(stream, x, seed, backend="triton")
        assert_as_accurate(result, net(x, backend="triton"), exact(x.double(), backend="reference"))


@pytest.mark.parametrize("channels", [1, 5, 33, 512])
@pytest.mark.parametrize("length", [1, 7, 300])
def test_norm(channels, length):
    for batch, offset, added in ((1, 0.0, False), (3, 0.0, True), (2, 1000.0, False)):
        check_norm(channels, length, batch, offset, added, "triton")


def test_norm_of_a_long_signal(monkeypatch):
    """More blocks than parts, the last of which is short."""
    monkeypatch.setattr(triton_kernels, "PARTS", 3)
    check_norm(32, 700, 2, 3.0, True, "triton")


@pytest.mark.parametrize("seed", range(4))
def test_normed_layers(seed):
    check_normed_layers(seed, (1, 2, 5, 30)[seed], "triton")


def test_opcheck():
    packed = pack(make_layers(3))
    x = torch.randn(2, 8, packed.fields[0].inputs)
    arguments = (x, packed.weights, packed.layers, 0, "triton")
    torch.library.opcheck(torch.ops.aar_kernels.seanet_stack.default, arguments)


interpreter.isolate(globals())
