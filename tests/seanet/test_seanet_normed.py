"""Norms over time: alone, and in nets whose convolutions have them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from normed_cases import check_norm, check_normed_layers, make_normed_layers

from aar_kernels import use_backend
from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import Conv, ConvTranspose, Norm, Residual, Stream, norm_, pack

UNIT = Norm(torch.ones(4), torch.zeros(4))


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 15, 16, 33, 512, 5000])
@pytest.mark.parametrize("length", [1, 2, 7, 300])
def test_norm(backend, channels, length):
    for batch, offset, added in ((1, 0.0, False), (3, 0.0, True), (2, 1000.0, False)):
        check_norm(channels, length, batch, offset, added, backend)


def test_long_signals(fast):
    """Many chunks, whose moments are put together."""
    check_norm(32, 100_000, 1, 3.0, False, fast)


@pytest.mark.parametrize("seed", range(40))
def test_layers(fast, seed):
    check_normed_layers(seed, (1, 2, 5, 30, 111, 700)[seed % 6], fast)


@pytest.mark.parametrize("kernel", [4, 7, 8, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_a_transposed_convolution_is_trimmed_behind_its_norm(backend, kernel, causal):
    torch.manual_seed(kernel)
    weight, bias, scale, shift = torch.randn(3, 4, kernel), torch.randn(4), torch.randn(4), torch.randn(4)
    x = torch.randn(2, 3, 9)

    def plain(dtype):
        y = F.conv_transpose1d(x.to(dtype), weight.to(dtype), bias.to(dtype), 4)
        total = kernel - 4
        left = 0 if causal else total - total // 2
        return F.group_norm(y, 1, scale.to(dtype), shift.to(dtype))[..., left : left + 36]

    net = PackedSEANet([ConvTranspose(weight, bias, 4, causal, norm=Norm(scale, shift))])
    assert_as_accurate(net(x, backend=backend), plain(torch.float32), plain(torch.float64))


def test_a_residual_block(backend):
    """The reference of the whole block in plain PyTorch, which the other tests compare with."""
    torch.manual_seed(0)
    first = Conv(torch.randn(3, 4, 3), torch.randn(3), norm=Norm(torch.randn(3), torch.randn(3)))
    narrow = Conv(torch.randn(4, 3, 1), torch.randn(4), norm=Norm(torch.randn(4), torch.randn(4)))
    shortcut = Conv(torch.randn(4, 4, 1), torch.randn(4), norm=Norm(torch.randn(4), torch.randn(4)))
    x = torch.randn(2, 4, 50)

    def conv(layer, x, dtype):
        x = F.pad(x, (1, 1), mode="reflect") if layer.weight.shape[2] == 3 else x
        y = F.conv1d(x, layer.weight.to(dtype), layer.bias.to(dtype))
        return F.group_norm(y, 1, layer.norm.weight.to(dtype), layer.norm.bias.to(dtype))

    def plain(dtype, around):
        y = conv(narrow, F.elu(conv(first, F.elu(x.to(dtype)), dtype)), dtype)
        return y + (x.to(dtype) if around is None else conv(around, x.to(dtype), dtype))

    for around in (None, shortcut):
        net = PackedSEANet([Residual(first, narrow, around)])
        assert_as_accurate(net(x, backend=backend), plain(torch.float32, around), plain(torch.float64, around))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_batch_change_nothing(fast, threads):
    net, before = PackedSEANet(make_normed_layers(1)), torch.get_num_threads()
    x = torch.randn(5, net.inputs, 4000, generator=torch.Generator().manual_seed(0))
    try:
        torch.set_num_threads(1)
        alone = torch.cat([net(item[None], backend=fast) for item in x])
        torch.set_num_threads(threads)
        assert torch.equal(net(x, backend=fast), alone)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_a_number(backend):
    """It spoils its item, and no other."""
    x = torch.randn(3, 50, 4).mT
    x[1, 2, 7], x[2, 0, 0] = torch.nan, torch.inf
    norm_(x, UNIT.weight, UNIT.bias, backend=backend)
    assert x[0].isfinite().all()
    assert x[1].isnan().all()
    assert not x[2].isfinite().any()


def test_opcheck(backend):
    add = torch.randn(2, 9, 4)
    arguments = (torch.randn(2, 9, 4), UNIT.weight, UNIT.bias, 1e-5, add, backend)
    torch.library.opcheck(torch.ops.aar_kernels.seanet_norm_.default, arguments)


def test_the_version_counter_tells_of_the_write(backend):
    x = torch.randn(2, 9, 4).mT
    before = x._version
    norm_(x, UNIT.weight, UNIT.bias, backend=backend)
    assert x._version > before


def test_compiled(backend):
    torch.compiler.reset()
    net = PackedSEANet(make_normed_layers(3))
    with use_backend(backend), torch.no_grad():
        run = torch.compile(net, fullgraph=True, backend="aot_eager")
        for length in (9, 20, 33):
            x = torch.randn(2, net.inputs, length)
            assert torch.equal(run(x), net(x))
    torch.compiler.reset()


def test_module(backend):
    net, x = PackedSEANet(make_normed_layers(0)), torch.randn(2, PackedSEANet(make_normed_layers(0)).inputs, 30)
    kept = x.clone()
    expected = net(x, backend=backend)
    assert torch.equal(x, kept)
    assert not list(net.parameters())
    other = PackedSEANet(make_normed_layers(0))
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(net.state_dict())
    for each in (other, copy.deepcopy(net)):
        assert torch.equal(each(x, backend=backend), expected)
    assert net(x[:0], backend=backend).shape == (0, *expected.shape[1:])


def test_bad_input(backend):
    x, (scale, shift, _) = torch.randn(2, 9, 4).mT, (UNIT.weight, UNIT.bias, None)
    for wrong, message in (
        ((x.contiguous(), scale, shift), "channels last"),
        ((x, scale[:3], shift), "x must be"),
        ((x, scale, shift[:3]), "scale and shift"),
        ((x, scale, shift.double()), "scale and shift"),
        ((x.double(), scale, shift), "x must be"),
    ):
        with pytest.raises(ValueError, match=message):
            norm_(*wrong, backend=backend)
    with pytest.raises(ValueError, match="add must be"):
        norm_(x, scale, shift, add=x[..., 1:], backend=backend)


def test_where_no_norm_can_be():
    conv = Conv(torch.randn(4, 4, 3), norm=UNIT)
    with pytest.raises(ValueError, match="use PackedSEANet"):
        pack([conv])
    with pytest.raises(ValueError, match="a stream never has"):
        Stream(PackedSEANet([conv]))
    with pytest.raises(ValueError, match="do not fit together"):
        PackedSEANet([Residual(conv, Conv(torch.randn(4, 3, 1)))])


def test_the_binding_checks_what_could_read_outside(fast):
    call, x, scale = torch.ops.aar_native.seanet_norm_, torch.randn(2, 9, 4), UNIT.weight
    for wrong in (
        (x[0], scale, scale, 1e-5, None),
        (x, scale[:3], scale, 1e-5, None),
        (x, scale, scale[:3], 1e-5, None),
        (x, scale, scale, 1e-5, x[:1]),
        (x.mT, torch.ones(9), torch.ones(9), 1e-5, None),
        (x.double(), scale, scale, 1e-5, None),
    ):
        with pytest.raises(RuntimeError, match="aar_native"):
            call(*wrong)
